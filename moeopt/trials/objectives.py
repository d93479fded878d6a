"""Objectives by name, with their directions, and constraints as texts.

An objective is ``"loss"`` (what a study without others minimises), ``"metric"``, ``"worst"`` (of a mixture, its worst
member's loss over the full model's), ``"bytes"``, ``"active"`` or ``"latency"``; of one member of a mixture,
``"loss:NAME"`` and ``"metric:NAME"``. Metrics are maximised, all else is minimised. A study keeps the names, in the
order of its trials' values, in its description; one that names none has the loss alone.

A constraint bounds one of them, as ``"bytes <= 24GB"``. It is Optuna's: a number by name (`FrozenTrial.constraints`),
at most 0 where it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moeopt.errors import StudyError, nearest

LOSS = "loss"
OF_TASK = (LOSS, "metric", "worst")
"""Objectives that are of scores; the others are of a plan."""
NAMES = (*OF_TASK, "bytes", "active", "latency")
OF_MEMBERS = (LOSS, "metric")
"""Objectives that a mixture has of each of its members, as ``"loss:NAME"``."""
PREFIX = "constraints:"
"""Of the system attributes that Optuna keeps a trial's constraints in."""

Direction = Literal["minimize", "maximize"]

UNITS = {
    "": 1, **{unit + "B": 1000**i for i, unit in enumerate(("", "k", "M", "G", "T"))},
    **{unit + "iB": 1024**i for i, unit in enumerate(("", "K", "M", "G", "T")) if i}, "KB": 1000,
}  # fmt: skip


def check_names(objectives: Any) -> tuple[str, ...]:
    """The names of objectives; StudyError, naming the one that is none or comes twice, unless they are such."""
    if isinstance(objectives, str):
        objectives = (objectives,)
    if not isinstance(objectives, (tuple, list)) or not objectives:
        raise StudyError(f"objectives must be names such as ('loss', 'bytes'), got {objectives!r:.120}")
    for name in objectives:
        _check_name(name)
        if objectives.count(name) > 1:
            raise StudyError(f"objective {name!r} is named twice")
    return tuple(objectives)


def _check_name(name: Any) -> None:
    kind, colon, member = name.partition(":") if isinstance(name, str) else (name, "", "")
    if kind not in NAMES or (colon and (kind not in OF_MEMBERS or not member)):
        raise StudyError(
            f"an objective is one of {', '.join(NAMES)}, or of a mixture's member as loss:NAME, got "
            f"{name!r:.80}{nearest(str(name), [*NAMES])}"
        )


def direction(name: str) -> Direction:
    """Whether an objective is minimised or maximised."""
    return "maximize" if name.partition(":")[0] == "metric" else "minimize"


def size_of(text: Any) -> int:
    """Bytes, from a number or a text such as ``"24GB"`` (10**9 bytes), ``"24GiB"`` (2**30) or ``"24e9"``.

    Raises:
        StudyError: when it is none, or below 1.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:e\+?\d+)?)\s*([kKMGT]?i?B)?\s*", str(text))
    size = float(match[1]) * UNITS.get(match[2] or "", math.nan) if match else math.nan
    if not 1 <= size < 1 << 63:
        raise StudyError(f"a size is a number of bytes, such as 24GB, 24GiB or 24e9, got {text!r:.80}")
    return round(size)


@dataclass(frozen=True)
class Constraint:
    """A bound of an objective's number.

    Args:
        name: of the objective.
        at_most: whether the bound is the largest that may be, or the smallest.
        bound: it.

    >>> str(parsed("bytes<=24GB")), parsed("bytes <= 100").value(120.0)
    ('bytes <= 24000000000', 20.0)
    """

    name: str
    at_most: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.name} {'<=' if self.at_most else '>='} {self.bound:.16g}"

    def value(self, number: float) -> float:
        """How much a number lies beyond the bound; at most 0 where it holds."""
        return number - self.bound if self.at_most else self.bound - number


def parsed(text: Any) -> Constraint:
    """The constraint that a text states.

    Raises:
        StudyError: when it states none.
    """
    match = re.fullmatch(r"\s*(\S.*?)\s*(<=|>=)\s*(\S+)\s*", text) if isinstance(text, str) else None
    if match is None:
        raise StudyError(f"a constraint is a text such as 'bytes <= 24GB' or 'metric >= 0.8', got {text!r:.120}")
    name, sign, bound = match.groups()
    _check_name(name)
    number = float(size_of(bound)) if name == "bytes" else _number(bound)
    if not math.isfinite(number):
        raise StudyError(f"the bound of constraint {text!r:.120} must be a finite number, got {bound!r:.80}")
    return Constraint(name, sign == "<=", number)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_constraints(texts: Sequence[str]) -> tuple[Constraint, ...]:
    """The constraints that texts state; StudyError, naming the text, for what is none or is stated twice."""
    if isinstance(texts, str) or not isinstance(texts, (tuple, list)):
        raise StudyError(f"constraints is a list of texts such as 'bytes <= 24GB', got {texts!r:.120}")
    constraints = tuple(parsed(text) for text in texts)
    for constraint in constraints:
        if constraints.count(constraint) > 1:
            raise StudyError(f"constraint {str(constraint)!r} is stated twice")
    return constraints
