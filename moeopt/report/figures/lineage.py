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
    ancestors = numbers("losses", losses, what="(ancestors,)", ndim=1, shape=(len(numbers_),))
    if len(operators) != len(ancestors):
        raise FigureError(f"operators must name one for each of {len(ancestors)} ancestors, got {len(operators)}")
    frequent = sorted(gains, key=lambda name: -len(np.atleast_1d(gains[name])))[:MOST_OPERATORS]
    marks = {
        name: {"symbol": list(style.SYMBOLS)[i % 8], "color": style.CATEGORICAL[i % 6]}
        for i, name in enumerate(dict.fromkeys([*frequent, *operators]))
    }
    how = "ancestors, by the better parent" if inherited else "each the best in its time"
    figure = style.empty(title, f"{len(ancestors)} steps: {how}")
    drawn = np.unique(np.linspace(0, len(ancestors) - 1, min(len(ancestors), DRAWN_ANCESTORS)).astype(int))
    made_by = [operators[i] for i in drawn]
    style.scatter(
        figure, 0, [int(numbers_[i]) for i in drawn], ancestors[drawn], "trial %{x}: %{y:.5g}<br>%{text}",
        mode="lines+markers", line={"color": style.FAINT, "width": 1}, text=[_label(name) for name in made_by],
        marker={part: [marks[name][part] for name in made_by] for part in ("symbol", "color")} | {"size": 8},
    )  # fmt: skip
    by_operator = {name: numbers(f"gains of {name}", gains[name], what="(trials,)", ndim=1) for name in frequent}
    by_operator = {name: rest for name, values in by_operator.items() if len(rest := values[~np.isnan(values)])}
    ticks = []
    for i, (name, values) in enumerate(by_operator.items()):
        low, middle, high = np.quantile(values, [[0.25], [0.5], [0.75]])
        better = f"{np.mean(values > 0):.0%} better"
        ticks.append(f"{_label(name)[:20]}<br>n = {len(values)}, {better}")
        style.scatter(
            figure, 1, middle, [i], [f"{_label(name)}: {len(values)} trials, {better}"], mode="markers",
            error_x=style.error_bar(middle, np.stack([low, high], axis=1), marks[name]["color"]),
            marker=marks[name] | {"size": 9},
        )  # fmt: skip
    gain = "less loss than the parent" if inherited else "less loss than before"
    style.panel(
        figure, 0, 2, None, x={"title": {"text": "trial"}, "nticks": 5, "domain": [0, 0.42]},
        y={"title": {"text": style.safe(label)}},
    )  # fmt: skip
    style.panel(figure, 1, 2, "gain by operator", x={"title": {"text": gain}, "nticks": 4, "domain": [0.68, 1]}, y={})
    figure.update_layout(
        showlegend=False,
        yaxis2={
            "showticklabels": True, "matches": None, "range": [len(ticks) - 0.5, -0.5], "showgrid": False,
            "tickvals": list(range(len(ticks))), "ticktext": ticks,
        },
    )  # fmt: skip
    if ticks:
        line = {"color": style.FAINT, "width": 1, "dash": "dash"}
        figure.add_shape(type="line", xref="x2", yref="y2 domain", x0=0, x1=0, y0=0, y1=1, line=line)
    return figure


def _label(operator: str) -> str:
    return style.label(operator or "unknown")
