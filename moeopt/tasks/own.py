"""A user's own task, from a Python file: `moeopt search ... --task sums.py:sums --task-option top=50`.

    from moeopt.tasks import Example, MultipleChoiceTask

    def sums(top: int = 30) -> MultipleChoiceTask:
        rows = [(a, b) for a in range(10, top) for b in range(10, top)]
        return MultipleChoiceTask.from_rows(
            "sums", rows, lambda r: Example(f"{r}", f"add {r[0]}+{r[1]}=", (f"{sum(r)}", f"{sum(r) + 1}"), 0)
        )

A function that returns a task, or a subclass of `Task`; `--data` is its parameter `data`, task options are the others.
The file runs as any Python program of the user's: name only one that you trust. It may import what lies beside it. A
study records its name and a hash of its text, and is not resumed once the file has changed. No data file names such
code: a mixture's JSON takes registered tasks only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Task

_MODULE = "moeopt_task_"


def is_own(name: str) -> bool:
    """Whether a task's name is `FILE.py:NAME`."""
    return name.rpartition(":")[0].endswith(".py")


def own_maker(name: str) -> Callable[..., Task]:
    """What `FILE.py:NAME` names, as a function with the same parameters that gives a checked task.

    Raises:
        TaskError: if there is no such file, it fails, or has no such class or function. When called, also if what it
            gives is no task; what it raises itself passes through.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot read task file {path}: {error.strerror or error}") from error
    digest = hashlib.sha256(text).hexdigest()[:16]
    made = _named(path, digest, attribute)

    def make(*args: Any, **options: Any) -> Task:
        task = made(*args, **options)
        if not isinstance(task, Task):
            raise TaskError(f"{attribute!r} of {path} gives {type(task).__name__}, not a moeopt.tasks.Task")
        return _recorded(task, f"{path.name}:{attribute} {digest}")

    make.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
    return make


def _named(path: Path, digest: str, attribute: str) -> Callable[..., Any]:
    """The class or function of that name in a file."""
    module = _imported(path, _MODULE + digest)
    made: Callable[..., Any] | None = getattr(module, attribute, None)
    if made is None or not callable(made):
        defined = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        callables = [key for key in defined if callable(getattr(module, key))]
        listed = f" (it has {', '.join(callables)})" if callables else ""
        raise TaskError(f"{path} has no class or function {attribute!r}{nearest(attribute, callables)}{listed}")
    if inspect.isabstract(made):
        lacks = ", ".join(sorted(getattr(made, "__abstractmethods__")))  # noqa: B009
        raise TaskError(f"task {attribute!r} of {path} lacks {lacks}, which every moeopt.tasks.Task has")
    return made


def _recorded(task: Task, code: str) -> Task:
    """The task, of a subclass of its class whose `describe` tells where its code is from, also in copies of it."""
    kind = type(task)

    def describe(self: Task) -> dict[str, Any]:
        return {**kind.describe(self), "code": code}

    object.__setattr__(task, "__class__", type(kind.__name__, (kind,), {"describe": describe, "_original": kind}))
    return task


def original(task: Task) -> type[Task]:
    """The class that a task was made of, before what was recorded of it was put in front."""
    kind: type[Task] = vars(type(task)).get("_original", type(task))
    return kind


def module(task: Task | None) -> ModuleType | None:
    """The user's file as the module that a task's code is in; None for a task of any other module."""
    name = "" if task is None else original(task).__module__
    return sys.modules[name] if name.startswith(_MODULE) else None


def _imported(path: Path, name: str) -> Any:
    """The file as a module; its folder can be imported from while it runs."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code raises what it likes
        del sys.modules[name]
        raise TaskError(f"task file {path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module
