"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Task
from moeopt.tasks.boolq import boolq_task
from moeopt.tasks.lm_eval import lm_eval_task
from moeopt.tasks.multiple_choice import multiple_choice_task
from moeopt.tasks.text import text_task
from moeopt.tasks.wic import wic_task

REGISTRY: dict[str, Callable[..., Task]] = {
    "boolq": boolq_task,
    "multiple_choice": multiple_choice_task,
    "text": text_task,
    "wic": wic_task,
}
"""Name -> function(data, **options) -> Task. Add your own: `REGISTRY["mine"] = my_task`."""

HARNESS = "lm_eval:"


def get(name: str, data: Any = None, **options: Any) -> Task:
    """The task of that name, its data read and checked.

    Args:
        name: a key of `REGISTRY`, or "lm_eval:" and the name of a task of lm-evaluation-harness.
        data: where the data is; None for the task's hub data set, if it has one.
        **options: of the task's own function, such as `window=512` for "text".

    Raises:
        TaskError: if the name or an option is unknown, or the data is missing or malformed.
    """
    harness = name.removeprefix(HARNESS)
    if name not in REGISTRY and harness == name:
        raise TaskError(f"unknown task {name!r}{nearest(name, list(REGISTRY))} (there are {', '.join(REGISTRY)})")
    make = REGISTRY[name] if harness == name else partial(lm_eval_task, harness)
    parameters = inspect.signature(make).parameters
    allowed = [p for p in parameters if p != "data"]
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed)
            raise TaskError(f"task {name!r} has no option {option!r}{hint} (it has {', '.join(allowed)})")
    if data is None and parameters["data"].default is inspect.Parameter.empty:
        raise TaskError(f"task {name!r} needs data: a file, a folder or a hub id")
    return make(data, **options)
