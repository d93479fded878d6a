"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.arc import arc_challenge_task, arc_easy_task
from moeopt.tasks.base import Task
from moeopt.tasks.boolq import boolq_task
from moeopt.tasks.cb import cb_task
from moeopt.tasks.copa import copa_task
from moeopt.tasks.drop import drop_task
from moeopt.tasks.generation import generation_task
from moeopt.tasks.gsm8k import gsm8k_task
from moeopt.tasks.hellaswag import hellaswag_task
from moeopt.tasks.lm_eval.task import lm_eval_task
from moeopt.tasks.math_problems import math_task
from moeopt.tasks.mixture_file import mixture_task
from moeopt.tasks.mmlu import mmlu_task
from moeopt.tasks.multiple_choice import multiple_choice_task
from moeopt.tasks.multirc import multirc_task
from moeopt.tasks.openbookqa import openbookqa_task
from moeopt.tasks.own import is_own, own_maker
from moeopt.tasks.prompting import OPTIONS, checked
from moeopt.tasks.record import record_task
from moeopt.tasks.rte import rte_task
from moeopt.tasks.squad import squad_task
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
    "drop": drop_task,
    "generation": generation_task,
    "gsm8k": gsm8k_task,
    "hellaswag": hellaswag_task,
    "math": math_task,
    "mixture": mixture_task,
    "mmlu": mmlu_task,
    "multiple_choice": multiple_choice_task,
    "multirc": multirc_task,
    "openbookqa": openbookqa_task,
    "record": record_task,
    "rte": rte_task,
    "squad": squad_task,
    "text": text_task,
    "wic": wic_task,
    "winogrande": winogrande_task,
    "wsc": wsc_task,
}
"""Name -> function(data, **options) -> Task. Add your own: `REGISTRY["mine"] = my_task`."""

PROMPTLESS = ("mixture", "text")
"""Tasks that take neither shots nor chat; nor do those of lm-evaluation-harness, which has options of its own."""
HARNESS = "lm_eval:"


def get(name: str, data: Any = None, **options: Any) -> Task:
    """The task of that name, its data read and checked.

    Args:
        name: a key of `REGISTRY`; "lm_eval:" and the name of a task of lm-evaluation-harness; or "FILE.py:NAME", a task
            class or function of a Python file, which is run (see `moeopt.tasks.own`).
        data: where the data is; None for the task's hub data set, if it has one.
        **options: of the task's own function, such as `window=512` for "text"; and for every task of examples `shots`,
            `chat`, `system` and `separator`, see `moeopt.tasks.prompting`.

    Raises:
        TaskError: if the name or an option is unknown, or the data is missing or malformed.
    """
    harness, own = name.startswith(HARNESS), is_own(name)
    if not harness and not own and name not in REGISTRY:
        raise TaskError(f"unknown task {name!r}{nearest(name, list(REGISTRY))} (there are {', '.join(REGISTRY)})")
    make = own_maker(name) if own else REGISTRY.get(name, partial(lm_eval_task, name.removeprefix(HARNESS)))
    parameters = inspect.signature(make).parameters
    allowed = [p for p in parameters if p != "data"]
    shared = [p for p in OPTIONS if p not in parameters and not harness and name not in PROMPTLESS]
    for option in options:
        if option not in allowed + shared:
            hint = nearest(option, allowed + shared)
            raise TaskError(f"task {name!r} has no option {option!r}{hint} (it has {', '.join(allowed + shared)})")
    prompting = {option: options.pop(option) for option in shared if option in options}
    checked(**prompting)
    if "data" in parameters:
        if data is None and parameters["data"].default is inspect.Parameter.empty:
            raise TaskError(f"task {name!r} needs data: a file, a folder or a hub id")
        options["data"] = data
    elif data is not None:
        raise TaskError(f"task {name!r} takes no data, got {data!r}")
    for option, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and option not in options:
            raise TaskError(f"task {name!r} needs the option {option!r}")
    task = make(**options)
    return task.prompted(**prompting) if prompting else task
