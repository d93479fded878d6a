"""How alike tasks use the experts of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style


def task_similarity(names: Sequence[str], measures: Mapping[str, ArrayLike], *, title: str) -> style.Figure:
    """Heat maps beside each other, a measure each: pairs of tasks down, layers across.

    Args:
        names: of the pairs.
        measures: by what they are called, (pairs, layers), up to 1 where tasks are alike.
        title: of the figure.

    Raises:
        FigureError: when there are no pairs, or shapes do not fit.
    """
    if not names:
        raise FigureError("there are no two tasks to hold against each other")
    tables = {
        style.safe(name): style.numbers(name, value, what="(pairs, layers)", ndim=2) for name, value in measures.items()
    }
    shapes = {table.shape for table in tables.values()}
    if len(shapes) != 1 or len(next(iter(tables.values()))) != len(names):
        raise FigureError(f"every measure must be (pairs, layers) of {len(names)} pairs, got {sorted(shapes)}")
    drawn = style.empty(title)
    style.heat_maps(
        drawn, tables, hover="layer %{x}: %{z:.3f}", low=0.0, high=1.0, bar={"thickness": 14}, gap=1,
        y={"automargin": True, **style.named(names, 40)},
    )  # fmt: skip
    for p in range(len(tables)):
        drawn.update_layout({f"xaxis{style.on(p)['xaxis'][1:]}": {"title": {"text": "layer"}}})
    return drawn
