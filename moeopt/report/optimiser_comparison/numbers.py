"""How losses and costs are written, the same in the terminal, in sentences and on the page."""

from __future__ import annotations

import math

from moeopt.report.formatting import DASH, short
from moeopt.results.optimiser_comparison.runs import Cost


def loss(value: float, sign: bool = False) -> str:
    """Four decimals, or two digits of a very small or large one.

    >>> loss(0.02169), loss(-0.5, sign=True), loss(float("nan"))
    ('0.0217', '−0.5000', '–')
    """
    if not math.isfinite(value):
        return DASH if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:.4f}" if value == 0 or 0.00095 <= abs(value) < 1e6 else f"{value:.2g}"
    return text.replace("-", "−") if value < 0 or not sign else f"+{text}"


def quantity(value: float, cost: Cost) -> str:
    """So much of a cost, in three digits.

    >>> quantity(2_310_000, "layer-tokens"), quantity(12.34, "time"), quantity(7, "trials")
    ('2.31M layer-tokens', '12.3 s', '7 trials')
    """
    return f"{short(value)} {'s' if cost == 'time' else cost}"
