"""Which experts good plans keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style


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
    shares = style.shares("share", share, what="(names, n)")
    marks = np.asarray(best, dtype=bool)
    if len(names) != len(shares) or marks.shape != shares.shape:
        raise FigureError(f"names, share and best must fit, got {len(names)} names, {shares.shape} and {marks.shape}")
    rows, n = shares.shape
    figure = style.empty(title, f"share of the best {trials} trials; ○ the best plan")
    style.heat_maps(
        figure, {"": shares}, hover="expert %{x}: %{z}", y=style.named(names, 20), low=0, high=1,
        bar={"thickness": 12, "tickformat": ".0%"}, gap=1 if rows <= 64 and n <= 64 else 0,
    )  # fmt: skip
    style.cell_marks(figure, 0, marks, "circle", float(np.clip(0.4 * min(300 / rows, 480 / n), 2, 9)))
    return figure
