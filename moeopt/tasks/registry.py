"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Task
from moeopt.tasks.boolq import boolq_task
from moeopt.tasks.drop import drop_task
from moeopt.tasks.generation import generation_task
from moeopt.tasks.gsm8k import gsm8k_task
from moeopt.tasks.math_problems import math_task
from moeopt.tasks.multiple_choice import multiple_choice_task
from moeopt.tasks.squad import squad_task
from moeopt.tasks.text import text_task
from moeopt.tasks.wic import wic_task

REGISTRY: dict[str, Callable[..., Task]] = {
    "boolq": boolq_task,
    "drop": drop_task,
    "generation": generation_task,
    "gsm8k": gsm8k_task,
    "math": math_task,
    "multiple_choice": multiple_choice_task,
    "squad": squad_task,
    "text": text_task,
    "wic": wic_task,
}
"""Name -> function(data, **options) -> Task. Add your own: `REGISTRY["mine"] = my_task`."""


def get(name: str, data: Any = None, **options: Any) -> Task:
    """The task of that name, its data read and checked.

    Args:
        name: a key of `REGISTRY`.
        data: where the data is; None for the task's hub data set, if it has one.
        **options: of the task's own function, such as `window=512` for "text".

    Raises:
        TaskError: if the name or an option is unknown, or the data is missing or malformed.
    """
    if name not in REGISTRY:
        raise TaskError(f"unknown task {name!r}{nearest(name, list(REGISTRY))} (there are {', '.join(REGISTRY)})")
    parameters = inspect.signature(REGISTRY[name]).parameters
    allowed = [p for p in parameters if p != "data"]
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed)
            raise TaskError(f"task {name!r} has no option {option!r}{hint} (it has {', '.join(allowed)})")
    if data is None and parameters["data"].default is inspect.Parameter.empty:
        raise TaskError(f"task {name!r} needs data: a file, a folder or a hub id")
    return REGISTRY[name](data, **options)
