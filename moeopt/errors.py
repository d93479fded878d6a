"""The errors moeopt raises: each is a `MoeoptError` and also the builtin error a caller would expect."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import PurePath
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class MoeoptError(Exception):
    """Base of every error raised by moeopt on purpose; its text is meant for the user."""


class PlanError(MoeoptError, ValueError):
    """A plan is malformed, or does not fit the model it is applied to."""


class SpaceError(MoeoptError, ValueError):
    """A search space cannot be built as asked, or numbers or a plan do not belong to it."""


class ModelError(MoeoptError, ValueError):
    """A model or checkpoint cannot be used: no experts, an unknown routing rule, an unreadable folder."""


class TaskError(MoeoptError, ValueError):
    """A task is unknown, or its data is missing or malformed."""


class SamplerError(MoeoptError, ValueError):
    """A sampler is unknown, or does not fit the space or study it is used with."""


class MethodError(MoeoptError, ValueError):
    """A one-shot method is unknown, or cannot do what it is asked on this model or these data."""


class FigureError(MoeoptError, ValueError):
    """A figure cannot be drawn from these values or written as asked, or a package that draws is missing."""


class StudyError(MoeoptError, ValueError):
    """A study cannot be created, opened or resumed as asked."""


class StorageError(MoeoptError, RuntimeError):
    """A study's storage cannot be reached, written or understood."""


class ExportError(MoeoptError, ValueError):
    """A plan or an output folder is not one that export can serve."""


class NonFiniteLossError(MoeoptError, ArithmeticError):
    """A plan made the loss NaN or infinite; `layer` is the first MoE layer whose output was not finite."""

    def __init__(self, message: str, layer: int | None) -> None:
        super().__init__(message)
        self.layer = layer


class OutOfMemoryError(MoeoptError, MemoryError):
    """A single sequence needs more memory than there is."""


def nearest(name: str, names: list[str]) -> str:
    """A hint for a mistyped name: `"; did you mean 'eep'?"`, or an empty string when nothing is close."""
    from difflib import get_close_matches

    lowered = {k.lower(): k for k in names}
    match = get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {lowered[match[0]]!r}?" if match else ""


def got(value: object) -> str:
    """A value of a wrong type, as a message names it: the value where it is short, else what it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not an instance of it"
    text = repr(value) if isinstance(value, (str, bytes, int, float, PurePath, type(None))) else ""
    return text if 0 < len(text) <= 120 else f"an object of type {type(value).__name__}"


def without_storage(call: Callable[P, R]) -> Callable[P, R]:
    """A call that says what to write instead of `storage=`, which it once took for what is no database."""

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if "storage" in kwargs:
            raise ModelError(
                "storage is the database of a study, moeopt.create_study(storage=...); where merged weights lie is "
                f"merged_weights; got storage={got(kwargs['storage'])}"
            )
        return call(*args, **kwargs)

    return checked
