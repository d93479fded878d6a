"""Which experts good plans keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import numbers


def kept_experts(
    names: Sequence[str],
    share: ArrayLike,
    best: ArrayLike,
    *,
    trials: int,
    title: str = "Experts that the best trials keep",
) -> style.Figure:
    """A heat map, layers down and experts across, with a dot where the best plan keeps the expert.

    Args:
        names: of layers, or of groups of layers that share a choice.
        share: (names, n), from 0 to 1: in how many of the best trials the expert is kept; where plans merge, how much
            of it goes into kept ones, at most 1, on average.
        best: (names, n), true where the best plan keeps the expert, or lets it lead a merged one.
        trials: how many the best ones are.

    Raises:
        FigureError: when shapes do not fit or a share is not between 0 and 1.
    """
    shares = numbers("share", share, what="(names, n)", ndim=2)
    marks = np.asarray(best, dtype=bool)
    if len(names) != len(shares) or marks.shape != shares.shape:
        raise FigureError(f"names, share and best must fit, got {len(names)} names, {shares.shape} and {marks.shape}")
    if not ((shares >= 0) & (shares <= 1 + 1e-6)).all():
        raise FigureError("share must hold numbers between 0 and 1")
    rows, n = shares.shape
    figure = style.empty(title, f"share of the best {trials} trials; ○ the best plan")
    bar = {"thickness": 12, "outlinewidth": 0, "tickformat": ".0%"}
    figure.update_layout(
        showlegend=False, coloraxis={"cmin": 0, "cmax": 1, "colorscale": style.SEQUENTIAL, "colorbar": bar}
    )
    go, gap = style.plotly(), 1 if rows <= 64 and n <= 64 else 0
    figure.add_trace(
        go.Heatmap(
            z=style.short(shares, 3), x=list(range(n)), y=list(range(rows)), coloraxis="coloraxis", xgap=gap, ygap=gap,
            hovertemplate="expert %{x}: %{z}<extra></extra>",
        )
    )  # fmt: skip
    y, x = (at.tolist() for at in np.nonzero(marks))
    size = float(np.clip(0.4 * min(300 / rows, 480 / n), 2, 9))
    dot = {"symbol": "circle", "size": size, "color": "white", "line": {"color": style.INK, "width": 1}}
    figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=dot, hoverinfo="skip"))
    step = -(-rows // 20)
    ticks = {"tickvals": list(range(0, rows, step)), "ticktext": [style.label(name) for name in names[::step]]}
    style.panel(
        figure, 0, 1, None,
        x={"title": {"text": "expert"}, "range": [-0.5, n - 0.5], "showgrid": False, **style.numbered(n, 32)},
        y={"range": [rows - 0.5, -0.5], "showgrid": False, **ticks},
    )  # fmt: skip
    return figure
