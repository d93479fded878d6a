"""Numbers as terminals, pages and sentences show them."""

from __future__ import annotations

import math

from moeopt.results.differences import signed

DASH = "–"
interval = signed


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where there is none.

    >>> number(0.02169), number(None), number(float("inf"))
    ('0.0217', '–', '∞')
    """
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞" if value > 0 else "-∞"


def percent(value: float | None) -> str:
    """A share from 0 to 1 as percent, or a dash."""
    return DASH if value is None else f"{100 * value:.1f}%"


def short(value: float) -> str:
    """Three digits, and a letter for thousands and above; a dash for what is not finite.

    >>> short(46_702_792_704), short(0.25), short(100), short(float("inf"))
    ('46.7B', '0.25', '100', '–')
    """
    if not math.isfinite(value):
        return DASH
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_digits(value / size)}{letter}"
    return _digits(value)


def count(amount: int, thing: str) -> str:
    """
    >>> count(1, "seed"), count(5, "seed")
    ('1 seed', '5 seeds')
    """
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


def _digits(value: float) -> str:
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text else text
