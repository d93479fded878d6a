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
    limits = np.stack([values - half, values + half], axis=1)
    bars = style.error_bar(values, limits, colour)
    bars |= {key: style.short(bars[key], 3) for key in ("array", "arrayminus")} | {"thickness": 1.2, "width": 2}
    places, go = list(range(len(names))), style.plotly()
    labels = [style.label(name) for name in names]
    figure.add_trace(
        go.Scatter(
            x=places, y=style.short(values, 3), error_y=bars, mode="markers", name="from plans, with 95% interval",
            marker={"symbol": "circle", "size": 8, "color": colour}, text=labels,
            hovertemplate="%{text}: %{y}<extra></extra>",
        )
    )  # fmt: skip
    if optuna:
        figure.add_trace(
            go.Scatter(
                x=places, y=style.short([optuna.get(name, 0.0) for name in names], 3), mode="markers", text=labels,
                marker={"symbol": "diamond-open", "size": 8, "color": style.CATEGORICAL[1]},
                name="Optuna's PED-ANOVA", hovertemplate="%{text}: %{y}<extra></extra>",
            )
        )  # fmt: skip
    step = -(-len(names) // 16)
    ticks = {"tickvals": places[::step], "ticktext": labels[::step], "range": [-0.6, len(names) - 0.4]}
    style.panel(
        figure, 0, 1, None,
        x={"title": {"text": "layers that share a choice"}, "showgrid": False, **ticks},
        y={"title": {"text": "share of the ranking"}, "rangemode": "tozero", "nticks": 6},
    )  # fmt: skip
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "xanchor": "left"})
    return figure
