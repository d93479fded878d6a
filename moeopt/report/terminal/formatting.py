"""Numbers as tables show them."""

from __future__ import annotations


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share from 0 to 1 as percent for a table, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}%"
