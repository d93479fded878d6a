"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.arc import arc_challenge_task, arc_easy_task
from moeopt.tasks.base import Task
from moeopt.tasks.boolq import boolq_task
from moeopt.tasks.cb import cb_task
from moeopt.tasks.copa import copa_task
from moeopt.tasks.hellaswag import hellaswag_task
from moeopt.tasks.mmlu import mmlu_task
from moeopt.tasks.multiple_choice import multiple_choice_task
from moeopt.tasks.multirc import multirc_task
from moeopt.tasks.openbookqa import openbookqa_task
from moeopt.tasks.record import record_task
from moeopt.tasks.rte import rte_task
from moeopt.tasks.text import text_task
from moeopt.tasks.wic import wic_task
from moeopt.tasks.winogrande import winogrande_task
from moeopt.tasks.wsc import wsc_task

REGISTRY: dict[str, Callable[..., Task]] = {
    "arc_challenge": arc_challenge_task,
    "arc_easy": arc_easy_task,
    "boolq": boolq_task,
    "cb": cb_task,
    "copa": copa_task,
    "hellaswag": hellaswag_task,
    "mmlu": mmlu_task,
    "multiple_choice": multiple_choice_task,
    "multirc": multirc_task,
    "openbookqa": openbookqa_task,
    "record": record_task,
    "rte": rte_task,
    "text": text_task,
    "wic": wic_task,
    "winogrande": winogrande_task,
    "wsc": wsc_task,
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
