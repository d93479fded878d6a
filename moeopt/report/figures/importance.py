"""Which layers matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeopt.report.figures import style
from moeopt.report.figures.style import finite, numbers

SURE = 0.1
"""Explained variance below which shares are drawn in grey."""


def layer_importance(
    names: Sequence[str],
    shares: ArrayLike,
    errors: ArrayLike,
    *,
    explained: float,
    trials: int,
    optuna: Mapping[str, float] | None = None,
    title: str = "Which layers matter",
) -> style.Figure:
    """The share of the trials' ranking that each layer group's choice explains, and how far to trust it.

    Args:
        names: of the groups.
        shares, errors: (groups,), shares of the variance of ranks, and half the widths of their 95% intervals.
        explained: the share that all choices together predict for unseen trials; where it is below 0.1, grey.
        trials: how many these are.
        optuna: by group, the importance that an evaluator of Optuna finds, from 0 to 1: open diamonds.

    Raises:
        FigureError: when shapes do not fit or a value is infinite.
    """
    values = numbers("shares", shares, what="(groups,)", ndim=1, shape=(len(names),))
    half = numbers("errors", errors, what="(groups,)", ndim=1, shape=(len(names),))
    explained = finite("explained", explained)
    sure = explained >= SURE
    told = f"choices predict {max(0.0, explained):.0%} of the ranks of {trials} unseen trials"
    figure = style.empty(title, told + ("" if sure else ": too little to tell layers apart"))
    colour = style.CATEGORICAL[0] if sure else style.FAINT
    bars = style.error_bar(values, np.stack([values - half, values + half], axis=1), colour)
    drawn = [("from plans, with 95% interval", values, "circle", colour, bars)]
    if optuna:
        theirs = np.array([optuna.get(name, 0.0) for name in names])
        drawn.append(("Optuna's PED-ANOVA", theirs, "diamond-open", style.CATEGORICAL[1], {}))
    for name, heights, symbol, ink, error in drawn:
        style.scatter(
            figure, 0, np.arange(len(names)), heights, "%{text}: %{y:.3g}", name=name, mode="markers",
            marker={"symbol": symbol, "size": 8, "color": ink}, error_y=error, text=[*map(style.label, names)],
        )  # fmt: skip
    style.panel(
        figure, 0, 1, None,
        x={"title": {"text": "layers that share a choice"}, "showgrid": False, "range": [-0.6, len(names) - 0.4],
           **style.named(names, 16)},
        y={"title": {"text": "share of the ranking"}, "rangemode": "tozero", "nticks": 6},
    )  # fmt: skip
    return figure.update_layout(legend=style.LEGEND_ABOVE)
