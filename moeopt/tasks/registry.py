"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Task
from moeopt.tasks.generation import generation_task
from moeopt.tasks.lm_eval.catalogue import EEP, check_name, ours
from moeopt.tasks.lm_eval.task import PREFIX, lm_eval_task
from moeopt.tasks.mixture import MixtureTask, Use
from moeopt.tasks.mixture_file import MIXTURE, read_mixture
from moeopt.tasks.multiple_choice import multiple_choice_task
from moeopt.tasks.own import is_own, own_maker
from moeopt.tasks.prompting import OPTIONS, checked
from moeopt.tasks.text import text_task


def mixture_task(data: str | Path, *, use: Use = "share") -> MixtureTask:
    """Several tasks with weights, from a JSON file as at the top of `moeopt.tasks.mixture_file`.

    Args:
        data: the file.
        use: "share" or "all", see `moeopt.tasks.mixture`.

    Raises:
        TaskError: naming the file and whatever is missing, unknown or malformed in it.
    """
    return read_mixture(data, get, use=use)


REGISTRY: dict[str, Callable[..., Task]] = {
    "generation": generation_task,
    MIXTURE: mixture_task,
    "multiple_choice": multiple_choice_task,
    "text": text_task,
}
"""Name -> function(data, **options) -> Task. Add your own: `REGISTRY["mine"] = my_task`."""

PROMPTLESS = ("mixture", "text")
"""Tasks of `REGISTRY` that take neither shots nor chat."""
HARNESS_NAMES = {
    "shots": "num_fewshot", "chat": "apply_chat_template", "system": "system_instruction",
    "normalise": "metric, such as acc_norm",
}  # fmt: skip
"""What lm-evaluation-harness calls options of other tasks."""


def get(name: str, data: Any = None, **options: Any) -> Task:
    """The task of that name, its data read and checked.

    Args:
        name: a key of `REGISTRY`; the name of a published task, of lm-evaluation-harness or of ours in its YAML (see
            `moeopt.tasks.lm_eval.task`; "lm_eval:" may stand before it); or "FILE.py:NAME", a task class or function of
            a Python file, which is run (see `moeopt.tasks.own`).
        data: where the data is; None for the task's hub data set, if it has one.
        **options: of the task's own function, such as `window=512` for "text"; and for every task of examples that is
            none of the harness `shots`, `chat`, `system` and `separator`, see `moeopt.tasks.prompting`.

    Raises:
        TaskError: if the name or an option is unknown, or the data is missing or malformed.
    """
    published = not is_own(name) and name not in REGISTRY
    if published and "include_path" not in options:
        check_name(name.removeprefix(PREFIX), () if name.startswith(PREFIX) else REGISTRY)
    make = own_maker(name) if is_own(name) else REGISTRY.get(name, partial(lm_eval_task, name))
    parameters = inspect.signature(make).parameters
    allowed = [p for p in parameters if p != "data"]
    shared = [p for p in OPTIONS if p not in parameters and not published and name not in PROMPTLESS]
    for option in options:
        if option not in allowed + shared:
            hint = _renamed(name, option) if published else nearest(option, allowed + shared)
            raise TaskError(f"task {name!r} has no option {option!r}{hint} (it has {', '.join(allowed + shared)})")
    prompting = {option: options.pop(option) for option in shared if option in options}
    checked(**prompting)
    if "data" in parameters:
        if data is None and parameters["data"].default is inspect.Parameter.empty:
            raise TaskError(f"task {name!r} needs data: a file, a folder or a hub id")
        options["data"] = data
    elif data is not None:
        raise TaskError(f"task {name!r} takes no data, got {data!r}")
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise TaskError(f"task {name!r}: {error}") from None
    task = make(**options)
    return task.prompted(**prompting) if prompting else task


def summaries() -> dict[str, str]:
    """What each task of `REGISTRY`, and each published one of ours, is, in a line."""
    kinds = {name: (inspect.getdoc(make) or "").partition("\n")[0] for name, make in REGISTRY.items()}
    lines = {
        name: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for name, path in ours().items()
    }
    return kinds | {name: f"{line} EEP's prompt." if name.startswith(EEP) else line for name, line in lines.items()}


def _renamed(name: str, option: str) -> str:
    """What the harness calls an option, or where EEP's prompt of a task is."""
    eep = EEP + name.removeprefix(PREFIX)
    if option == "template":
        return f": the task's prompt is the harness's{f', that of EEP the task {eep!r}' if eep in ours() else ''}"
    if option in HARNESS_NAMES:
        return f": lm-evaluation-harness calls it {HARNESS_NAMES[option]}"
    return nearest(option, list(inspect.signature(lm_eval_task).parameters))
