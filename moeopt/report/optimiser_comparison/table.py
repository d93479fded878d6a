"""The table of a comparison, as text for the terminal and the page."""

from __future__ import annotations

import math

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt import statistics
from moeopt.report.formatting import DASH, count, short
from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.report.optimiser_comparison.numbers import loss, quantity
from moeopt.results.optimiser_comparison import Comparison, Optimiser
from moeopt.showing import line


def head(c: Comparison) -> list[str]:
    """Names of the columns."""
    unit = "s" if c.cost == "time" else c.cost
    return [
        "optimiser", "seeds", "median loss", "band", "mean height", "mean rank", f"reached {loss(c.target)}",
        f"{unit} to it", "targets", *(["median test loss"] if _tested(c) else []),
    ]  # fmt: skip


def row(c: Comparison, optimiser: Optimiser) -> list[str]:
    """One optimiser, at the common budget."""
    seeds, all_reached = len(optimiser.runs), optimiser.reached == len(optimiser.runs)
    return [
        line(optimiser.name),
        str(seeds),
        loss(optimiser.median),
        f"[{loss(optimiser.low)}, {loss(optimiser.high)}]" if seeds > 1 else DASH,
        loss(float(np.median(optimiser.mean_height))),
        DASH if math.isnan(optimiser.rank) else f"{optimiser.rank:.2f}",
        f"{optimiser.reached} of {seeds}",
        ("" if all_reached else "≥ ") + short(statistics.restricted_mean(optimiser.times, c.budget)),
        f"{optimiser.solved:.0%}",
        *([loss(float(np.median(optimiser.held_out)))] if _tested(c) else []),
    ]


def about_bands(c: Comparison) -> str:
    """What the bands are worth."""
    several = [optimiser for optimiser in c.optimisers if len(optimiser.runs) > 1]
    if not several:
        return "There is one seed of each, so there is no band."
    fewest = min(several, key=lambda optimiser: optimiser.covered)
    share = f"{math.floor(1000 * fewest.covered) / 10:g}%"
    if fewest.covered >= 0.95:
        return f"A band covers the true median with {share} at least, at each point."
    return (
        f"A band that covers the true median with 95% takes 6 seeds; of {len(fewest.runs)} it is their range, which "
        f"does so with {share}, at each point."
    )


def notes(c: Comparison) -> list[str]:
    """What the numbers are."""
    charged = sum(run.charged for run in c.runs)
    return [
        "layer-tokens: tokens times the decoder layers that they went through, calibration of warm starts included. "
        "time: seconds in which at least one worker ran a trial, on the machine it ran on; neither pauses between "
        "runs nor calibration. trials: finished ones.",
        "Pruned and failed trials cost what they ran and are never the best; an attempt made again counts once."
        + (f" Failed trials that noted no cost ({charged}) are charged the dearest of their study." if charged else ""),
        "median loss, band: the least search loss within the budget, over seeds. " + about_bands(c),
        "mean height: the area under the best-so-far curve divided by its length, median over seeds. It goes from "
        f"{short(c.start)}, where the last study found its first loss, to the budget.",
        "mean rank: over the seeds that all optimisers have; 1 is the least loss, ties share.",
        f"reached: studies that found a loss of {loss(c.target)} within the budget; to it: restricted mean, the others "
        "counted at the budget (≥). targets: share of (target, seed) pairs reached, the end of the run time "
        "distribution.",
        "p: exact sign-flip test of the paired differences over common seeds, corrected by Holm over all pairs. The "
        "intervals are that test's own, not corrected, and infinite below 6 seeds.",
        *["test loss: of the plan that moeopt select chose from the whole study, beyond the budget too."] * _tested(c),
    ]


def view(c: Comparison) -> RenderableType:
    """The table and what may be concluded, for a terminal."""
    name = line(str(c.description["task"].get("name")))
    studies = "1 study" if len(c.runs) == 1 else f"{len(c.runs)} studies"
    title = f"{name}: {count(len(c.optimisers), 'optimiser')} in {studies}, at {quantity(c.budget, c.cost)}"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for i, column in enumerate(head(c)):
        shown = Text(column.replace(" ", "\n", 1) if i else column)
        table.add_column(shown, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for optimiser in c.optimisers:
        table.add_row(*map(Text, row(c, optimiser)))
    return Group(table, *(Text(f"• {text}") for text in conclusions(c)), Text("\n" + about_bands(c), style="dim"))


def _tested(c: Comparison) -> bool:
    return any(np.isfinite(optimiser.held_out).any() for optimiser in c.optimisers)
