"""A front: what every plan gives, against how small it is, beside one-shot methods and the full model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import check_intervals, finite

KEYS = ("name", "series", "x", "y")


class _Row(NamedTuple):
    """`low` and `high` are NaN where there is no interval."""

    name: str
    series: str
    x: float
    y: float
    low: float
    high: float


def front(
    rows: Iterable[Mapping[str, Any]],
    *,
    search: str = "search",
    reference: float | None = None,
    x: str = "size",
    y: str = "loss",
    title: str = "What is left at which size",
    subtitle: str = "",
) -> style.Figure:
    """Plans as marks, against two of their numbers; those of the search joined along its front, less being better.

    Args:
        rows: with the keys name, series, x, y and, where there is an interval of y, low and high. A series has a
            colour; the full model is one of a single row.
        search: the series that is drawn first and with most weight, others being what it is held against.
        reference: y of the full model: a dashed line.
        x, y: labels of the axes.
        title, subtitle: above it.

    Raises:
        FigureError: when there is no row, a key is missing, a number is not finite, or an interval does not hold its y.
    """
    table = [_row(i, row) for i, row in enumerate(rows)]
    if not table:
        raise FigureError("rows must hold at least one row, got none")
    series = sorted(dict.fromkeys(row.series for row in table), key=lambda name: name != search)
    figure = style.empty(title, subtitle)
    at = np.array([row.x for row in table])
    if reference is not None:
        ends = [float(at.min()), float(at.max())]
        level = finite("reference", reference)
        style.reference_line(figure, 0, ends, [level, level], f"full model: {level:.4f}", name="full model")
    for i, name in enumerate(series):
        members = sorted((row for row in table if row.series == name), key=lambda row: (row.x, row.y))
        colour = style.CATEGORICAL[i % len(style.CATEGORICAL)]
        heights = np.array([row.y for row in members])
        line = {"color": colour, "width": 2.4 if name == search else 1.2}
        style.scatter(
            figure, 0, np.array([row.x for row in members]), heights, _hover(members), mode="lines+markers",
            marker={"symbol": list(style.SYMBOLS)[i % 5], "size": 9 if name == search else 7, "color": colour},
            line=line if name == search else {**line, "dash": "dot"}, name=style.label(name),
            error_y=style.error_bar(heights, np.array([row[4:] for row in members]), colour),
        )  # fmt: skip
    spread = [row.y for row in table] + ([] if reference is None else [reference])
    log = min(spread) > 0 and max(spread) > 5 * min(spread)
    of_y: dict[str, Any] = {"title": {"text": style.safe(f"{y}, log scale" if log else y)}}
    of_y |= {"type": "log", **_log_ticks(min(spread), max(spread))} if log else {}
    style.panel(figure, 0, 1, None, x={"title": {"text": style.safe(x)}}, y=of_y)
    return figure


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or of more than three decades at these alone."""
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low / 1.2 <= tick <= high * 1.2]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _row(i: int, row: Mapping[str, Any]) -> _Row:
    if missing := [key for key in KEYS if key not in row]:
        raise FigureError(f"row {i} has no {', '.join(missing)}; it has {sorted(row)}")
    where = f"row {i} ({row['name']})"
    x, y = (finite(f"{where}: {key}", row[key]) for key in ("x", "y"))
    low, high = (math.nan if row.get(key) is None else finite(f"{where}: {key}", row[key]) for key in ("low", "high"))
    check_intervals(where, np.array([y]), np.array([[low, high]]))
    return _Row(str(row["name"]), str(row["series"]), x, y, low, high)


def _hover(rows: Sequence[_Row]) -> list[str]:
    return [style.safe(f"{row.name}: {row.x:.6g}, {style.with_interval(row.y, row.low, row.high)}") for row in rows]
