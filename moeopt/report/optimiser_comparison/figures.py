"""The figures of a comparison."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from moeopt import statistics
from moeopt.report.figures import style
from moeopt.report.formatting import loss
from moeopt.results.optimiser_comparison import Optimiser, OptimiserComparison
from moeopt.results.optimiser_comparison.runs import Cost
from moeopt.showing import line
from moeopt.statistics import Floats

LABELS = {"layer-tokens": "layer-tokens", "time": "wall time (s)", "trials": "finished trials"}
MOST = 24
"""Characters of a name."""
DASHES = ("solid", "dash", "dot")


def colour(series: int) -> str:
    """Of a line, its marks and its key."""
    return style.CATEGORICAL[series % len(style.CATEGORICAL)]


def best_so_far(c: OptimiserComparison, cost: Cost, *, height: int = 420) -> style.Figure:
    """The median over seeds of the least found, against what was spent, to the budget common to all studies."""
    budget = c.common_budget(cost)
    grid = _grid(c, cost, budget)
    figure = _empty(height)
    for i, optimiser in enumerate(c.optimisers):
        _steps(figure, grid, statistics.median_band(_sampled(optimiser, cost, grid))[0], i, optimiser.name)
    losses = [run.curve[(run.costs[cost] <= budget)] for run in c.runs]
    y = _loss_axis(np.concatenate(losses), f"median best {c.measure}")
    figure.update_layout(xaxis=_cost_axis(cost, budget), yaxis=y)
    return figure


def by_optimiser(c: OptimiserComparison, *, columns: int = 4) -> style.Figure:
    """For each optimiser its seeds, their median and its band; the medians of the others in grey."""
    from plotly.subplots import make_subplots

    grid = _grid(c, c.cost, c.budget)
    sampled = [_sampled(optimiser, c.cost, grid) for optimiser in c.optimisers]
    bands = [statistics.median_band(values) for values in sampled]
    columns = min(columns, len(c.optimisers))
    rows = math.ceil(len(c.optimisers) / columns)
    height = 90 + 190 * rows
    figure = make_subplots(
        rows, columns, shared_yaxes="all", shared_xaxes="all", horizontal_spacing=0.02, vertical_spacing=34 / height,
        subplot_titles=[style.safe(line(optimiser.name, MOST)) for optimiser in c.optimisers],
    )  # fmt: skip
    medians = [np.append(middle, np.nan) for middle, *_ in bands]
    for i, (optimiser, values, (middle, low, high, _)) in enumerate(zip(c.optimisers, sampled, bands)):
        where = dict(zip(("row", "col"), (part + 1 for part in divmod(i, columns))))
        rest = [median for j, median in enumerate(medians) if j != i]
        if rest:
            x, y = np.tile(np.append(grid, grid[-1]), len(rest)), np.concatenate(rest)
            _steps(figure, x, y, 0, where=where, color=style.BETWEEN, width=0.7, opacity=0.6)
        banded = np.isfinite(low) & np.isfinite(high)
        if banded.any():
            for edge, fill in ((low, None), (high, "tonexty")):
                _steps(figure, grid[banded], edge[banded], i, where=where, width=0, fill=fill)
        for run, curve in zip(optimiser.runs, values):
            _steps(figure, grid, curve, i, f"{run.study}: {loss(curve[-1])}", where=where, width=1, opacity=0.55)
        _steps(figure, grid, middle, i, f"{optimiser.name}: median {loss(middle[-1])}", where=where, width=2.4)
    style.dressed(figure)
    losses = [run.curve[run.costs[c.cost] <= c.budget] for run in c.runs]
    figure.update_xaxes(
        _cost_axis(c.cost, c.budget) | {"title": {}, "nticks": 4, "ticklabeloverflow": "hide past domain"}
    )
    figure.update_yaxes(_loss_axis(np.concatenate(losses), "") | {"nticks": 5})
    for i in range(max(0, len(c.optimisers) - columns), len(c.optimisers)):
        row, column = divmod(i, columns)
        figure.update_xaxes({"showticklabels": True}, row=row + 1, col=column + 1)
    figure.update_annotations(font={"size": style.TEXT_SIZE})
    figure.update_layout(height=height, showlegend=False, margin={"l": 62, "r": 8, "t": 30, "b": 46})
    return figure


def run_time(c: OptimiserComparison) -> style.Figure:
    """The share of targets and seeds that each optimiser had reached for so much."""
    everything = np.concatenate([optimiser.times_to_targets.ravel() for optimiser in c.optimisers])
    reached = everything[np.isfinite(everything)]
    low = max(float(reached.min(initial=c.budget)), 1e-6 * c.budget)
    grid = np.unique(np.concatenate([[low], np.clip(reached, low, None), [c.budget]]))
    log = low > 0 and c.budget > 4 * low
    figure = _empty(360)
    for i, optimiser in enumerate(c.optimisers):
        _steps(figure, grid, statistics.ecdf(optimiser.times_to_targets, grid), i, optimiser.name)
    x = _cost_axis(c.cost, c.budget)
    if log:
        x |= {"type": "log", "range": np.log10([low, c.budget]), "title": {"text": f"{LABELS[c.cost]}, log scale"}}
    y = {"title": {"text": "share of (target, seed) pairs"}, "range": [0, 1.02], "tickformat": ".0%"}
    figure.update_layout(xaxis=x, yaxis=y)
    return figure


def final_losses(c: OptimiserComparison) -> style.Figure:
    """The least loss of every study at the common budget, with median and band."""
    figure = _empty(110 + 27 * len(c.optimisers))
    for i, optimiser in enumerate(c.optimisers):
        texts = [f"{line(run.study, 80)}: {loss(value)}" for run, value in zip(optimiser.runs, optimiser.losses)]
        about = f"{line(optimiser.name, 80)}: median {loss(optimiser.median)}"
        band = {"mode": "lines", "line": {"color": colour(i), "width": 2}, "opacity": 0.5}
        dots = {"mode": "markers", "marker": {"color": colour(i), "size": 8, "opacity": 0.8}}
        bar = {"symbol": "line-ns", "size": 18, "line": {"width": 2.5, "color": style.BETWEEN}}
        for at, hover, look in (
            ([optimiser.low, optimiser.high], None, band),
            (optimiser.losses, [*map(style.safe, texts)], dots),
            ([optimiser.median], [style.safe(about)], {"mode": "markers", "marker": bar}),
        ):
            style.scatter(figure, 0, np.asarray(at), np.full(len(at), i), hover, **look)
    values = np.concatenate([optimiser.losses for optimiser in c.optimisers])
    names = [style.safe(line(optimiser.name, MOST)) for optimiser in c.optimisers]
    y = {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5], "showgrid": False}
    x = _loss_axis(values, f"best {c.measure}")
    figure.update_layout(xaxis=x, yaxis=y | {"automargin": True}, showlegend=False, margin={"t": 10})
    return figure


def _empty(height: int) -> style.Figure:
    margin = {"l": 66, "r": 28, "t": 20, "b": 50}
    return style.dressed(
        style.plotly().Figure(layout={"height": height, "legend": style.LEGEND_ABOVE, "margin": margin})
    )


def _steps(
    figure: style.Figure, at: Floats, heights: Floats, series: int, name: str = "", *,
    where: dict[str, int] | None = None, fill: str | None = None, opacity: float = 1.0, **of_line: Any,
) -> None:  # fmt: skip
    """A step function that has each height, (n,), from its place on, (n,), as far as the last; NaN is left out."""
    # Where it changes, and where it ends: NaN differs from NaN, so that gaps stay.
    drawn = np.append(True, heights[1:] != heights[:-1]) | np.append(np.isnan(heights[1:]), True)
    at, heights = at[drawn], heights[drawn]
    dash = DASHES[series // len(style.CATEGORICAL) % len(DASHES)]
    hover = f"{style.safe(line(name, 80))}<br>%{{x:.4s}}: %{{y:.4f}}<extra></extra>" if name else None
    trace = style.plotly().Scatter(
        x=at, y=heights, mode="lines", name=style.safe(line(name, MOST)), fill=fill, opacity=opacity,
        line={"shape": "hv", "color": colour(series), "width": 2.2, "dash": dash} | of_line,
        hoverinfo=None if name else "skip", hovertemplate=hover,
        fillcolor=f"{colour(series)}29" if fill else None,
    )  # fmt: skip
    figure.add_trace(trace, **(where or {}))


def _grid(c: OptimiserComparison, cost: Cost, budget: float) -> Floats:
    """Everywhere up to the budget that some curve steps, (n,), the budget last."""
    costs = np.concatenate([run.costs[cost] for run in c.runs])
    return np.unique(np.append(costs[costs <= budget], budget))


def _sampled(optimiser: Optimiser, cost: Cost, grid: Floats) -> Floats:
    """Curves of the runs, (runs, grid)."""
    return np.array([statistics.sample(run.costs[cost], run.curve, grid) for run in optimiser.runs])


def _cost_axis(cost: Cost, budget: float) -> dict[str, Any]:
    return {"title": {"text": LABELS[cost]}, "range": [0, budget or 1], "exponentformat": "B", "showgrid": False}


def _loss_axis(losses: Floats, label: str) -> dict[str, Any]:
    """Around all losses, with a little room at both ends; in equal ratios where they are of different sizes."""
    finite = losses[np.isfinite(losses)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low > 0 and high > 5 * low:
        ends = np.log10([low, high])
        room = 0.03 * (ends[1] - ends[0])
        title = f"{label}, log scale" if label else ""
        return {"type": "log", "range": [ends[0] - room, ends[1] + room], "title": {"text": title}}
    room = 0.04 * high - 0.04 * low or 0.05 * abs(high) or 1.0
    return {
        "range": [max(low - room, -sys.float_info.max), min(high + room, sys.float_info.max)],
        "title": {"text": label},
    }
