"""The figures of a comparison, as inline SVG."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import numpy as np

from moeopt.results.optimiser_comparison import statistics
from moeopt.results.optimiser_comparison.formatting import loss, quantity
from moeopt.results.optimiser_comparison.runs import Cost
from moeopt.results.optimiser_comparison.svg import MOST, Axis, Plot, drawn, escape, fill, stroke
from moeopt.showing import line

if TYPE_CHECKING:
    from moeopt.results.optimiser_comparison.comparison import Comparison, Optimiser
    from moeopt.results.optimiser_comparison.statistics import Floats

LABELS = {"layer-tokens": "layer-tokens", "time": "wall time (s)", "trials": "finished trials"}
LEFT, NAMES, TOP, BOTTOM = 62, 214, 30, 46
"""Pixels left of a plot, right of one that names its lines, above and below."""


def best_so_far(c: Comparison, cost: Cost, *, width: float = 1060, height: float = 400) -> str:
    """The median over seeds of the least loss found, against what was spent, to the budget common to all studies."""
    budget = c.common_budget(cost)
    grid = _grid(c, cost, budget)
    plot = Plot(
        Axis(0.0, budget, LEFT, width - NAMES),
        _loss_axis(c, cost, budget, height - BOTTOM, TOP),
    )
    plot.axes(x_label=LABELS[cost], y_label=_loss_label(plot.y, "median best search loss"))
    ends = []
    for i, optimiser in reversed(list(enumerate(c.optimisers))):
        middle = statistics.median_band(_sampled(optimiser, cost, grid))[0]
        if np.isfinite(middle).any():
            title = f"{optimiser.name}: median {loss(middle[-1])} at {quantity(budget, cost)}"
            plot.steps(grid, middle, f"line s{i}", stroke(i), title)
            ends.append((middle[-1], optimiser.name, i))
    plot.labels(ends)
    return drawn([plot], width, height, f"Median best search loss against {LABELS[cost]}")


def by_optimiser(c: Comparison, *, width: float = 1060, columns: int = 4) -> str:
    """For each optimiser its seeds, their median and its band; the medians of the others in grey."""
    grid = _grid(c, c.cost, c.budget)
    sampled = [_sampled(optimiser, c.cost, grid) for optimiser in c.optimisers]
    bands = [statistics.median_band(values) for values in sampled]
    columns = min(columns, len(c.optimisers))
    rows = math.ceil(len(c.optimisers) / columns)
    across, down, gap, above = (width - LEFT - 8) / columns, 188.0, 18.0, TOP + 14.0
    plots = []
    for i, (optimiser, values, (middle, low, high, _)) in enumerate(zip(c.optimisers, sampled, bands)):
        row, column = divmod(i, columns)
        left, top = LEFT + column * across, above + row * down
        plot = Plot(
            Axis(0.0, c.budget, left, left + across - gap, most=4),
            _loss_axis(c, c.cost, c.budget, top + down - 40, top + 8),
        )
        last = i + columns >= len(c.optimisers)
        plot.axes(x_ticks=last, y_ticks=column == 0, y_label="")
        if i == 0:
            plot.text(LEFT - 50, TOP - 14, _loss_label(plot.y, "best search loss"), "label")
        if last:
            plot.text((plot.x.first + plot.x.last) / 2, top + down - 6, LABELS[c.cost], "label middle")
        for j, (other, *_) in enumerate(bands):
            if j != i:
                plot.steps(grid, other, "other")
        plot.band(grid, low, high, fill(i))
        for run, curve in zip(optimiser.runs, values):
            plot.steps(grid, curve, "seed", stroke(i).partition(";")[0], f"{run.study}: {loss(curve[-1])}")
        plot.steps(grid, middle, "line", stroke(i).partition(";")[0], f"{optimiser.name}: median {loss(middle[-1])}")
        plot.text(plot.x.last, top + 4, line(optimiser.name, MOST), "name end", fill(i))
        plots.append(plot)
    return drawn(plots, width, above + rows * down + 4, "Best search loss of every optimiser and seed")


def run_time(c: Comparison, *, width: float = 1060, height: float = 340) -> str:
    """The share of targets and seeds that each optimiser had reached for so much."""
    everything = np.concatenate([one.times_to_targets.ravel() for one in c.optimisers])
    reached = everything[np.isfinite(everything)]
    low = max(float(reached.min(initial=c.budget)), 1e-6 * c.budget)
    grid = np.unique(np.concatenate([[low], np.clip(reached, low, None), [c.budget]]))
    log = low > 0 and c.budget > 4 * low
    plot = Plot(Axis(low if log else 0.0, c.budget, LEFT, width - NAMES, log), Axis(0.0, 1.0, height - BOTTOM, TOP))
    plot.axes(
        x_label=LABELS[c.cost] + (", log scale" if log else ""),
        y_label="share of (target, seed) pairs reached",
        y_text=lambda value: f"{value:.0%}",
    )
    ends = []
    for i, optimiser in reversed(list(enumerate(c.optimisers))):
        share = statistics.ecdf(optimiser.times_to_targets, grid)
        plot.steps(
            grid, share, f"line s{i}", stroke(i), f"{optimiser.name}: {share[-1]:.0%} by {quantity(c.budget, c.cost)}"
        )
        ends.append((share[-1], optimiser.name, i))
    plot.labels(ends)
    return drawn([plot], width, height, "Empirical distribution of run time")


def final_losses(c: Comparison, *, width: float = 1060) -> str:
    """The least loss of every study at the common budget, with median and band."""
    values = np.concatenate([one.losses for one in c.optimisers])
    values = values[np.isfinite(values)]
    height, left = 26.0 * len(c.optimisers) + TOP + BOTTOM, 226.0
    x = _axis(float(values.min()), float(values.max()), left, width - 24)
    y = Axis(0.0, float(len(c.optimisers)), TOP, height - BOTTOM)
    plot = Plot(x, y)
    bottom = height - BOTTOM
    for value in x.ticks():
        at = float(x(value))
        plot.parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{bottom:.1f}"/>')
        plot.text(at, bottom + 17, f"{value:g}", "tick middle")
    plot.text(
        (x.first + x.last) / 2,
        bottom + 37,
        _loss_label(x, f"best search loss at {quantity(c.budget, c.cost)}"),
        "label middle",
    )
    for i, one in enumerate(c.optimisers):
        row = float(y(i + 0.5))
        plot.text(left - 14, row + 4, line(one.name, MOST), "name end", fill(i))
        if math.isfinite(one.low) and math.isfinite(one.high):
            plot.parts.append(
                f'<path class="whisker" style="{stroke(i).partition(";")[0]}" '
                f'd="M{float(x(one.low)):.1f} {row:.1f}H{float(x(one.high)):.1f}"/>'
            )
        for run, value in zip(one.runs, one.losses):
            if math.isfinite(value):
                plot.parts.append(
                    f'<circle class="dot" style="{fill(i)}" cx="{float(x(value)):.1f}" cy="{row:.1f}" r="4.2">'
                    f"<title>{escape(run.study)}: {loss(value)}</title></circle>"
                )
        if math.isfinite(one.median):
            at = float(x(one.median))
            plot.parts.append(
                f'<path class="median" d="M{at:.1f} {row - 9:.1f}v18">'
                f"<title>{escape(one.name)}: median {loss(one.median)}</title></path>"
            )
    return drawn([plot], width, height, "Best search loss of every study at the common budget")


def _grid(c: Comparison, cost: Cost, budget: float) -> Floats:
    """Everywhere up to the budget that some curve steps, (n,), the budget last."""
    costs = np.concatenate([run.costs[cost] for run in c.runs])
    return np.unique(np.append(costs[costs <= budget], budget))


def _sampled(optimiser: Optimiser, cost: Cost, grid: Floats) -> Floats:
    """Curves of the runs, (runs, grid)."""
    return np.array([statistics.sample(run.costs[cost], run.curve, grid) for run in optimiser.runs])


def _loss_axis(c: Comparison, cost: Cost, budget: float, first: float, last: float) -> Axis:
    """From the least loss of any study within the budget to the largest first one."""
    found = [run.curve[(run.costs[cost] <= budget) & np.isfinite(run.curve)] for run in c.runs]
    values = np.concatenate(found)
    return _axis(float(values.min()), float(values.max()), first, last) if len(values) else Axis(0.0, 1.0, first, last)


def _axis(low: float, high: float, first: float, last: float) -> Axis:
    """With a little room at both ends; in equal ratios where losses are of different sizes."""
    if low > 0 and high > 5 * low:
        room = math.exp(0.03 * (math.log(high) - math.log(low)))
        return Axis(low / room, min(high * room, sys.float_info.max), first, last, log=True)
    room = 0.04 * high - 0.04 * low or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, first, last)


def _loss_label(axis: Axis, text: str) -> str:
    return f"{text}, log scale" if axis.log else text
