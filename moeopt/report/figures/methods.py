"""What each method reaches: losses with intervals, for every number of experts kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import check_intervals, finite


class _Row(NamedTuple):
    """`low` and `high` are NaN where there is no interval."""

    name: str
    split: str
    keep: int
    loss: float
    low: float
    high: float


def methods_bar(
    rows: Iterable[Mapping[str, Any]],
    *,
    reference: float | Mapping[str, float] | None = None,
    title: str = "Loss of each method",
    label: str = "loss",
) -> style.Figure:
    """Loss of each method as a dot with its interval as a bar, one panel for each number of experts kept.

    The bars are the intervals: losses that differ in their third digit are told apart by position on an axis that does
    not start at 0, which the length of a bar would misstate. Each panel has a loss axis of its own. Methods stand in
    one order everywhere, the least loss (against the others of its panel and split, on average) on top.

    Args:
        rows: with the keys name, loss, low, high (both None: no interval), split ("test") and keep, an integer.
        reference: loss of the full model, one number or one for each split: dashed lines.
        label: of the loss axes.

    Raises:
        FigureError: when there is no row, a key is missing, a value is not finite, an interval does not hold its loss,
            or two rows have the same name, split and keep.
    """
    table = _table(rows)
    keeps = sorted({row.keep for row in table}, reverse=True)
    splits = list(dict.fromkeys(row.split for row in table))
    colours = {split: style.CATEGORICAL[i % len(style.CATEGORICAL)] for i, split in enumerate(splits)}
    levels: list[tuple[str, str, Any]] = [("full model", style.BETWEEN, reference)] if reference is not None else []
    if isinstance(reference, Mapping):
        if unknown := [split for split in reference if split not in splits]:
            raise FigureError(f"reference names splits that no row has: {unknown}; the rows have {splits}")
        levels = [(f"full model, {style.label(split)}", colours[split], x) for split, x in reference.items()]
    levels = [(name, colour, finite("reference", level)) for name, colour, level in levels]
    names = _by_loss(table)
    ends = [len(names) - 0.5, -0.5]
    x = {"title": {"text": style.safe(label)}, "nticks": max(3, 10 // len(keeps))}
    y = {"range": ends, "automargin": True, **style.named(names, len(names))}
    figure = style.empty(title)
    shown: set[str] = set()
    for p, keep in enumerate(keeps):
        for name, colour, level in levels:
            style.reference_line(figure, p, [level, level], ends, f"{name}: {level:.4f}", name=name, colour=colour)
        for i, (split, lane) in enumerate(zip(splits, style.lanes(len(splits), 0.28))):
            mine = [row for row in table if row.keep == keep and row.split == split]
            if not mine:
                continue
            losses, limits = np.array([row.loss for row in mine]), np.array([[row.low, row.high] for row in mine])
            texts = [f"{row.name}, keep {keep}, {split}: {style.with_interval(*row[3:])}" for row in mine]
            style.scatter(
                figure, p, losses, np.array([names.index(row.name) + lane for row in mine]),
                [style.safe(text) for text in texts], mode="markers",
                marker={"symbol": list(style.SYMBOLS)[i % 5], "size": 8, "color": colours[split]},
                error_x=style.error_bar(losses, limits, colours[split]),
                name=style.label(split), legendgroup=split, showlegend=split not in shown,
            )  # fmt: skip
            shown.add(split)
        heading = f"{keep} experts kept" if keep > 1 else "1 expert kept"
        style.panel(figure, p, len(keeps), heading, x=x, y=y)
    return figure


def _table(rows: Iterable[Mapping[str, Any]]) -> list[_Row]:
    table: list[_Row] = []
    for i, row in enumerate(rows):
        if missing := [key for key in ("name", "loss", "low", "high", "split", "keep") if key not in row]:
            raise FigureError(f"row {i} has no {', '.join(missing)}; it has {sorted(row)}")
        where = f"row {i} ({row['name']})"
        keep = row["keep"]
        if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)) or keep < 1:
            raise FigureError(f"{where}: keep must be an integer of at least 1, got {keep!r}")
        if (row["low"] is None) != (row["high"] is None):
            raise FigureError(f"{where}: low and high must both be numbers or both None")
        loss = finite(f"{where}: loss", row["loss"])
        low, high = (math.nan if row[key] is None else finite(f"{where}: {key}", row[key]) for key in ("low", "high"))
        check_intervals(where, np.array([loss]), np.array([[low, high]]))
        table.append(_Row(str(row["name"]), str(row["split"]), int(keep), loss, low, high))
    if not table:
        raise FigureError("rows must hold at least one row, got none")
    keys = [row[:3] for row in table]
    if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise FigureError(f"two rows have the name, split and keep {twice[0]}")
    return table


def _by_loss(table: list[_Row]) -> list[str]:
    """Names of the methods, the least loss against the mean of its panel and split first."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in table:
        groups.setdefault(row[1:3], []).append(row.loss)
    excess: dict[str, list[float]] = {}
    for row in table:
        excess.setdefault(row.name, []).append(row.loss - float(np.mean(groups[row[1:3]])))
    return sorted(excess, key=lambda name: float(np.mean(excess[name])))
