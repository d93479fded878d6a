"""Which layers matter."""

from __future__ import annotations

from collections.abc import Sequence

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
    title: str = "Which layers matter",
) -> style.Figure:
    """The share of the trials' ranking that each layer group's choice explains, and how far to trust it.

    Args:
        names: of the groups.
        shares, errors: (groups,), shares of the variance of ranks, and half the widths of their 95% intervals.
        explained: the share that all choices together predict for unseen trials; where it is below 0.1, grey.
        trials: how many these are.

    Raises:
        FigureError: when shapes do not fit or a value is infinite.
    """
    values = numbers("shares", shares, what="(groups,)", ndim=1, shape=(len(names),))
    half = numbers("errors", errors, what="(groups,)", ndim=1, shape=(len(names),))
    explained = finite("explained", explained)
    sure = explained >= SURE
    told = f"with 95% intervals; choices predict {max(0.0, explained):.0%} of the ranks of {trials} unseen trials"
    figure = style.empty(title, told + ("" if sure else ": too little to tell layers apart"))
    colour = style.CATEGORICAL[0] if sure else style.FAINT
    bars = style.error_bar(values, np.stack([values - half, values + half], axis=1), colour)
    style.scatter(
        figure, 0, np.arange(len(names)), values, "%{text}: %{y:.3g}", mode="markers", error_y=bars,
        marker={"symbol": "circle", "size": 8, "color": colour}, text=[*map(style.label, names)],
    )  # fmt: skip
    style.panel(
        figure, 0, 1, None,
        x={"title": {"text": "layers that share a choice"}, "showgrid": False, "range": [-0.6, len(names) - 0.4],
           **style.named(names, 16)},
        y={"title": {"text": "share of the ranking"}, "rangemode": "tozero", "nticks": 6},
    )  # fmt: skip
    return figure.update_layout(showlegend=False)
