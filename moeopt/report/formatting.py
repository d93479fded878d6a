"""Numbers as terminals, pages and sentences show them."""

from __future__ import annotations

import math

DASH = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where there is none.

    >>> number(0.02169), number(None), number(float("inf"))
    ('0.0217', '–', '∞')
    """
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞" if value > 0 else "-∞"


def loss(value: float, sign: bool = False) -> str:
    """Four decimals, or two digits of a very small or large one, with a minus sign proper.

    >>> loss(0.02169), loss(-0.5, sign=True), loss(float("nan"))
    ('0.0217', '−0.5000', '–')
    """
    if value == 0 or 0.00095 <= abs(value) < 1e6 or not math.isfinite(value):
        text = number(value)
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−") if value < 0 or not sign else f"+{text}"


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


def size(value: float) -> str:
    """Bytes, three digits of them.

    >>> size(24e9), size(19_500_000), size(12)
    ('24 GB', '19.5 MB', '12 B')
    """
    if not math.isfinite(value):
        return DASH
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit * 0.9995:
            return f"{_digits(value / unit)} {name}"
    return f"{_digits(value)} B"


def quantity(value: float, cost: str) -> str:
    """So much of a cost that optimisers are compared by, in three digits.

    >>> quantity(2_310_000, "layer-tokens"), quantity(12.34, "time"), quantity(7, "trials")
    ('2.31M layer-tokens', '12.3 s', '7 trials')
    """
    return f"{short(value)} {'s' if cost == 'time' else cost}"


def count(amount: int, thing: str) -> str:
    """
    >>> count(1, "seed"), count(5, "seed")
    ('1 seed', '5 seeds')
    """
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


def _digits(value: float) -> str:
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text else text
