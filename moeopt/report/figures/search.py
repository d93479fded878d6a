"""How a search went: its losses over what they cost, next to other searches, and what became of the gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import Floats, finite, numbers

DRAWN_TRIALS = 400
"""Points of trials that are drawn; of more, the best so far and evenly spaced others."""
DRAWN_OTHERS = 12
SPLITS = ("search", "dev", "test")


def search_progress(
    cost: ArrayLike,
    losses: ArrayLike,
    pruned: ArrayLike | None = None,
    *,
    others: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    gains: Mapping[str, float] | None = None,
    test_interval: tuple[float, float] | None = None,
    full_model: float | None = None,
    title: str = "Loss over layer-tokens",
    label: str = "loss",
) -> style.Figure:
    """Losses of trials over what the search had cost by then, the best so far as a line; what is held out beside it.

    The loss axis ends a little above the median trial, so that the best can be told apart; how many lie above is said.

    Args:
        cost: (trials,), layer-tokens spent when each trial had ended, not decreasing.
        losses: (trials,), NaN where a trial has none.
        pruned: (trials,), true where the loss is the estimate of a trial that was stopped; drawn open, and never best.
        others: of other searches, by name: cost and best loss so far at the trials that improved it. Of more than 12,
            the 12 that end lowest.
        gains: for "search", "dev" and "test" the full model's loss less that of the chosen plan: a second panel.
        test_interval: ends of the 95% interval of the gain on test.
        full_model: its loss on the same examples: a dashed line where the axis reaches it, and named in any case.

    Raises:
        FigureError: when shapes differ or a value is infinite.
    """
    spent = numbers("cost", cost, what="(trials,)", ndim=1)
    loss = numbers("losses", losses, what="(trials,)", ndim=1, shape=spent.shape)
    estimated = np.zeros(len(spent), dtype=bool) if pruned is None else np.asarray(pruned, dtype=bool)
    if estimated.shape != spent.shape:
        raise FigureError(f"pruned must have shape {spent.shape}, got {estimated.shape}")
    if (np.diff(spent) < 0).any() or np.isnan(spent).any():
        raise FigureError("cost must not decrease: it is what the search had spent by the end of each trial")
    there = ~np.isnan(loss)
    if not there.any():
        return style.nothing(title, "No trial has a loss yet.")
    complete = np.where(estimated | ~there, math.inf, loss)
    records = np.flatnonzero(complete < np.concatenate([[math.inf], np.minimum.accumulate(complete)[:-1]]))
    curves = _others(others or {})
    low, high = _range(loss[there], [bests for _, bests in curves.values()])
    above = int((loss[there] > high).sum())
    subtitle = f"{int(there.sum())} trials" + (f", {above} of them above the axis" if above else "")
    if full_model is not None:
        subtitle += f", full model {finite('full_model', full_model):.4g}"
    figure = style.empty(title, subtitle)
    end = max([spent[-1], *(ends[-1] for ends, _ in curves.values())])
    dashed: dict[str, Any] = {"mode": "lines", "line": {"color": style.FAINT, "width": 1.5, "dash": "dash"}}
    if full_model is not None and low <= full_model <= high:
        style.scatter(figure, 0, [0, end], [full_model] * 2, None, name="full model", **dashed)
    for i, (name, (ends, bests)) in enumerate(curves.items()):
        style.line_of_bests(
            figure, ends, bests, end, f"{style.label(name)}<br>%{{x:.4s}} layer-tokens: %{{y:.5g}}", style.BEHIND, 1,
            name="other studies of the task", legendgroup="others", legendrank=style.LAST, showlegend=i == 0,
        )  # fmt: skip
    drawn = np.flatnonzero(there & (loss <= high))
    if len(drawn) > DRAWN_TRIALS:
        evenly = drawn[np.linspace(0, len(drawn) - 1, DRAWN_TRIALS).astype(int)]
        drawn = np.union1d(evenly, np.intersect1d(records, drawn))
    for mask, name, marker in (
        (~estimated, "trials", {"symbol": "circle", "size": 5, "color": style.CATEGORICAL[5], "opacity": 0.7}),
        (estimated, "pruned, estimated", {"symbol": "circle-open", "size": 6, "color": style.CATEGORICAL[4]}),
    ):
        at = drawn[mask[drawn]]
        if len(at):
            hover = "trial %{text}<br>%{x:.4s} layer-tokens, loss %{y:.5g}"
            text = [str(i) for i in at]
            style.scatter(figure, 0, spent[at], loss[at], hover, text=text, mode="markers", marker=marker, name=name)
    if len(records):
        style.line_of_bests(
            figure, spent[records], loss[records], end, "best so far %{y:.5g}", style.CATEGORICAL[1], 2,
            name="best so far",
        )  # fmt: skip
    x_axis = {"title": {"text": "layer-tokens spent"}, "exponentformat": "SI", "rangemode": "tozero", "nticks": 6}
    style.panel(figure, 0, 1, None, x=x_axis, y={"title": {"text": style.safe(label)}, "range": [low, high]})
    if gains is not None:
        _draw_gains(figure, gains, test_interval, dashed)
    return figure.update_layout(legend=style.LEGEND_BELOW)


def _range(losses: Floats, others: list[Floats]) -> tuple[float, float]:
    """From below the best to a little above the median."""
    low = min([float(losses.min()), *(float(bests[-1]) for bests in others)])
    high = float(np.quantile(losses, 0.6)) + 0.5 * float(np.quantile(losses, 0.6) - low)
    high = min(high, float(losses.max()))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - margin, high + margin


def _others(given: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> dict[str, tuple[Floats, Floats]]:
    curves: dict[str, tuple[Floats, Floats]] = {}
    for name, (cost, bests) in given.items():
        spent = numbers(f"cost of {name}", cost, what="(trials,)", ndim=1)
        curves[name] = (spent, numbers(f"losses of {name}", bests, what="(trials,)", ndim=1, shape=spent.shape))
    lowest = sorted(curves, key=lambda name: float(curves[name][1][-1]))[:DRAWN_OTHERS]
    return {name: curves[name] for name in lowest}


def _draw_gains(
    figure: style.Figure, gains: Mapping[str, float], interval: tuple[float, float] | None, dashed: dict[str, Any]
) -> None:
    """The second panel: what the chosen plan gains over the full model on each split."""
    splits = [split for split in SPLITS if split in gains]
    values = np.array([finite(f"gain on {split}", gains[split]) for split in splits])
    limits = np.stack([values, values], axis=1)
    if interval is not None and "test" in splits:
        limits[splits.index("test")] = [finite("an end of test_interval", end) for end in interval]
    colour = style.CATEGORICAL[2]
    style.scatter(
        figure, 1, np.arange(len(splits)), values, "%{y:.4g}", mode="markers", showlegend=False,
        error_y=style.error_bar(values, limits, colour), marker={"symbol": "diamond", "size": 9, "color": colour},
    )  # fmt: skip
    ends = [-0.4, len(splits) - 0.6]
    style.scatter(figure, 1, ends, [0, 0], ["the full model"] * 2, showlegend=False, **dashed)
    ticks = {"tickvals": list(range(len(splits))), "ticktext": splits, "range": [-0.5, len(splits) - 0.5]}
    figure.update_layout(
        xaxis={"domain": [0, 0.62]},
        xaxis2={"domain": [0.78, 1], "anchor": "y2", "showgrid": False, **ticks},
        yaxis2={"anchor": "x2", "title": {"text": "gain over the full model"}},
    )
