"""Numbers of a model, checked."""

from __future__ import annotations

from typing import Any

from moeopt.errors import PlanError

MOST_EXPERTS = 4096
"""Of a layer. With more than any model has, the matrices of a file that lies would fill the memory."""


def integer(name: str, value: Any, *, low: int, high: int | None = None, what: str | None = None) -> int:
    """An integer within limits; `what` says what it must be, where that is more than limits."""
    try:
        number = int(value)
        exact = number == value and not isinstance(value, (bool, str))
    except (TypeError, ValueError, OverflowError):
        exact = False
        number = low - 1
    if not exact or number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise PlanError(f"{what or f'{name} must be an integer {limits}'}, got {value!r}")
    return number
