"""What an evaluator, and so an objective, is given: checked when it is made, before any work."""

from __future__ import annotations

import os
from typing import Any

from moeopt.errors import ModelError, TaskError, got
from moeopt.evaluation.teacher import Compression
from moeopt.models import check_device, check_merged_weights, check_model
from moeopt.tasks import Task


def check_parts(model: Any, tokenizer: Any, task: Any) -> None:
    """Raise ModelError or TaskError, saying what was given, unless these are a model, its tokenizer and a task."""
    check_model(model)
    wrong = isinstance(tokenizer, (str, os.PathLike, type, Task)) or tokenizer is model
    if wrong or not callable(tokenizer):
        raise ModelError(
            f"tokenizer must be the model's tokenizer, as model, tokenizer = moeopt.load(...) gives it, got "
            f"{got(tokenizer)}"
        )
    if not isinstance(task, Task):
        hint = f"; moeopt.tasks.get({task!r:.80}) gives a task by name" if isinstance(task, str) else ""
        raise TaskError(f"task must be a moeopt.tasks.Task, got {got(task)}{hint}")


def check_settings(
    *,
    split: Any,
    limit: Any,
    batch_tokens: Any,
    max_length: Any,
    prefix_memory: Any,
    prefix_device: Any,
    merged_weights: Any,
    compression: Any,
) -> None:
    """Raise TaskError or ModelError, naming the argument, unless these are arguments of an evaluator."""
    if not isinstance(split, str):
        raise TaskError(f"split must be 'search', 'dev' or 'test', got {got(split)}")
    counts = {"limit": limit, "batch_tokens": batch_tokens, "max_length": max_length, "prefix_memory": prefix_memory}
    for name, value in counts.items():
        least, unit = (0, " bytes") if name == "prefix_memory" else (1, "")
        if value is None:
            continue
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TaskError(f"{name} must be an integer of at least {least}{unit}, got {got(value)}")
        if value < least:
            raise TaskError(f"{name} must be at least {least}{unit}, got {value}")
    if prefix_device is not None:
        check_device(prefix_device, "prefix_device")
    check_merged_weights(merged_weights)
    if compression is not None and not isinstance(compression, Compression):
        raise TaskError(f"compression must be a moeopt.evaluation.Compression, got {got(compression)}")
