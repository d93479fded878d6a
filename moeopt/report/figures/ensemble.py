"""What an ensemble of experts adds: loss against the number of experts kept."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import Floats, check_intervals, finite, numbers

DISTINCT_LINES = 10
"""Lines that colour, dash and marker still tell apart."""
SINGLE = re.compile(r"layer \d+")
"""Names of curves that stand behind where there are too many."""


def ensemble_curve(
    curves: Mapping[str, ArrayLike | tuple[ArrayLike, ArrayLike]],
    reference: float | None = None,
    *,
    top: Collection[str] | None = None,
    title: str = "Loss against the number of experts kept",
    label: str = "loss",
) -> style.Figure:
    """Lines of loss over 1 to n experts kept (EEP, arXiv 2407.00945, figure 3).

    Up to ten curves have a colour and a marker of their own. Of more, only those named in `top` do, and the others are
    thin and grey behind them.

    Args:
        curves: for each name ("all layers", "layer 3") the losses (n,) with 1, 2, ..., n experts kept, NaN where one
            was not measured; or a tuple of these and their intervals (n, 2).
        reference: loss of the full model, a dashed line.
        top: of more than ten curves, the names to draw in colour, at most ten. By default those that are not called
            "layer" and a number (the first ten of them); where all are, the first, the middle and the last.
        label: of the loss axis.

    Raises:
        FigureError: when there is no curve, lengths differ, a value is infinite, or `top` names an unknown curve.
    """
    if not curves:
        raise FigureError("curves must hold at least one curve, got none")
    parsed = {name: _curve(name, value) for name, value in curves.items()}
    lengths = {name: len(losses) for name, (losses, _) in parsed.items()}
    n = max(lengths.values())
    if len(set(lengths.values())) > 1:
        raise FigureError(f"curves must all have one loss for each of 1 to n experts kept, got lengths {lengths}")
    bright = _bright(list(parsed), top)
    grey = [name for name in parsed if name not in bright]
    crowd = f"{len(grey)} {'single layers' if all(SINGLE.fullmatch(name) for name in grey) else 'others'}"
    barred = [name for name in bright if not np.isnan(parsed[name][1]).all()]
    aside = dict(zip(barred, style.lanes(len(barred), 0.05)))
    figure = style.empty(title)
    keeps = np.arange(1, n + 1)
    for name in grey + bright:
        losses, limits = parsed[name]
        texts = map(style.with_interval, losses, *limits.T)
        hover = [f"{style.safe(name)}, {keep} kept: {text}" for keep, text in zip(keeps, texts)]
        if name in grey:
            look: dict[str, Any] = {
                "mode": "lines", "line": {"color": style.BEHIND, "width": 1}, "name": crowd,
                "legendgroup": "others", "legendrank": style.LAST, "showlegend": name == grey[0],
            }  # fmt: skip
        else:
            i = bright.index(name)
            again, c = divmod(i, len(style.CATEGORICAL))
            colour = style.CATEGORICAL[c]
            look = {
                "mode": "lines+markers", "name": style.label(name),
                "line": {"color": colour, "width": 2, "dash": "dash" if again else "solid"},
                "marker": {"symbol": list(style.SYMBOLS)[i], "size": 8, "color": colour},
                "error_y": style.error_bar(losses, limits, colour) if name in barred else None,
            }  # fmt: skip
        style.scatter(figure, 0, keeps + aside.get(name, 0.0), losses, hover, **look)
    ends = [0.5, n + 0.5]
    if reference is not None:
        level = finite("reference", reference)
        style.reference_line(figure, 0, ends, [level, level], f"full model: {level:.4f}", name="full model")
    x = {"title": {"text": "experts kept in each layer pruned"}, "range": ends, "showgrid": False}
    y = {"title": {"text": style.safe(label)}}
    style.panel(figure, 0, 1, None, x=x | style.numbered(n, 24, first=1), y=y)
    return figure


def _curve(name: str, value: Any) -> tuple[Floats, Floats]:
    """Losses (n,) and their intervals (n, 2), NaN where there are none."""
    interval = None
    if isinstance(value, tuple) and len(value) == 2 and np.ndim(value[1]) == 2:
        value, interval = value
    losses = numbers(f"curve {name!r}", value, what="(n,)", ndim=1)
    if interval is None:
        return losses, np.full((len(losses), 2), np.nan)
    limits = numbers(f"intervals of {name!r}", interval, what="(n, 2)", ndim=2, shape=(len(losses), 2))
    check_intervals(f"curve {name!r}", losses, limits)
    return losses, limits


def _bright(names: list[str], top: Collection[str] | None) -> list[str]:
    """Names of the curves to draw in colour, in the order of `names`."""
    if isinstance(top, str):
        raise FigureError(f"top must be a collection of names, got the string {top!r}")
    if unknown := [name for name in top or () if name not in names]:
        raise FigureError(f"top names curves that are not there: {unknown}; there are {names}")
    if len(names) <= DISTINCT_LINES:
        return names
    if top is None:
        top = [name for name in names if not SINGLE.fullmatch(name)][:DISTINCT_LINES]
        top = top or [names[0], names[len(names) // 2], names[-1]]
    if len(set(top)) > DISTINCT_LINES:
        raise FigureError(f"top must name at most {DISTINCT_LINES} curves, got {len(set(top))}")
    return [name for name in names if name in top]
