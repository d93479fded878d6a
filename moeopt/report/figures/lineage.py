"""Where the best plan came from, and what each operator brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import numbers

MOST_OPERATORS = 10
DRAWN_ANCESTORS = 60


def lineage(
    numbers_: Sequence[int],
    losses: ArrayLike,
    operators: Sequence[str],
    gains: Mapping[str, ArrayLike],
    *,
    inherited: bool,
    title: str = "Where the best plan came from",
    label: str = "loss",
) -> style.Figure:
    """The line of ancestors of the best trial, and what each operator gained over the better parent: median, quartiles.

    Args:
        numbers_: of the ancestors, the best trial last.
        losses: (ancestors,), of these.
        operators: that made them; an empty one is unknown.
        gains: for each operator, of all its trials, the loss of the better parent (without parents, the best before)
            less the trial's own: above 0, the trial is better. Of more than 10 operators, the 10 of most trials.
        inherited: whether the sampler names parents; if not, the ancestors are the trials that were best in their time.

    Raises:
        FigureError: when lengths differ or a value is infinite.
    """
    if not len(numbers_):
        return style.nothing(title, "No trial has a loss yet.")
    found = numbers("losses", losses, what="(ancestors,)", ndim=1, shape=(len(numbers_),))
    if len(operators) != len(found):
        raise FigureError(f"operators must name one for each of {len(found)} ancestors, got {len(operators)}")
    how = "ancestors, by the better parent" if inherited else "each the best in its time"
    figure = style.empty(title, f"{len(found)} steps: {how}")
    kept = sorted(gains, key=lambda name: -len(np.atleast_1d(gains[name])))[:MOST_OPERATORS]
    known = list(dict.fromkeys([*kept, *operators]))
    colours = {name: style.CATEGORICAL[i % 6] for i, name in enumerate(known)}
    symbols = {name: list(style.SYMBOLS)[i % 8] for i, name in enumerate(known)}
    at = np.unique(np.linspace(0, len(found) - 1, min(len(found), DRAWN_ANCESTORS)).astype(int))
    made = [operators[i] for i in at]
    marker = {
        "symbol": [symbols[name] for name in made], "color": [colours[name] for name in made], "size": 8,
    }  # fmt: skip
    go = style.plotly()
    figure.add_trace(
        go.Scatter(
            x=[int(numbers_[i]) for i in at], y=style.short(found[at], 5), mode="lines+markers", marker=marker,
            line={"color": style.FAINT, "width": 1}, text=[style.label(name or "unknown") for name in made],
            hovertemplate="trial %{x}: %{y}<br>%{text}<extra></extra>",
        )
    )  # fmt: skip
    rows = [(name, numbers(f"gains of {name}", gains[name], what="(trials,)", ndim=1)) for name in kept]
    rows = [(name, values[~np.isnan(values)]) for name, values in rows]
    rows = [(name, values) for name, values in rows if len(values)]
    for i, (name, values) in enumerate(rows):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        bars = style.error_bar(np.array([middle]), np.array([[low, high]]), colours[name])
        bars |= {key: style.short(bars[key], 3) for key in ("array", "arrayminus")}
        said = f"{style.label(name or 'unknown')}: {len(values)} trials, {np.mean(values > 0):.0%} better"
        figure.add_trace(
            go.Scatter(
                x=style.short([middle], 4), y=[i], error_x=bars, mode="markers", hovertext=[said], hoverinfo="text",
                marker={"symbol": symbols[name], "size": 9, "color": colours[name]}, **style.on(1),
            )
        )  # fmt: skip
    ticks = {
        "tickvals": list(range(len(rows))),
        "ticktext": [
            f"{style.label(name or 'unknown')[:20]}<br>n = {len(values)}, {np.mean(values > 0):.0%} better"
            for name, values in rows
        ],
    }
    style.panel(
        figure, 0, 2, None, x={"title": {"text": "trial"}, "nticks": 5}, y={"title": {"text": style.safe(label)}}
    )
    style.panel(figure, 1, 2, "gain by operator", x={}, y={})
    figure.update_layout(
        showlegend=False,
        xaxis={"domain": [0, 0.42]},
        xaxis2={
            "domain": [0.68, 1],
            "title": {"text": "less loss than before" if not inherited else "less loss than the parent"},
            "nticks": 4,
        },
        yaxis2={"showticklabels": True, "matches": None, "range": [len(rows) - 0.5, -0.5], "showgrid": False, **ticks},
    )
    if rows:
        line = {"type": "line", "xref": "x2", "yref": "y2 domain", "x0": 0, "x1": 0, "y0": 0, "y1": 1}
        figure.add_shape(**line, line={"color": style.FAINT, "width": 1, "dash": "dash"})
    return figure
