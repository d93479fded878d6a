"""The one table of a comparison, as text: for the terminal and for the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moeopt.results.optimiser_comparison import statistics
from moeopt.results.optimiser_comparison.formatting import DASH, count, interval, loss, short
from moeopt.showing import line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeopt.results.optimiser_comparison.comparison import Comparison, Optimiser


def head(c: Comparison) -> list[str]:
    """Names of the columns."""
    unit = "s" if c.cost == "time" else c.cost
    return [
        "optimiser", "seeds", "median loss", "band", "mean height", "mean rank", f"reached {loss(c.target)}",
        f"{unit} to it", "targets", *(["median test loss"] if _tested(c) else []),
    ]  # fmt: skip


def row(c: Comparison, one: Optimiser) -> list[str]:
    """One optimiser, at the common budget."""
    to_it = statistics.restricted_mean(one.times, c.budget)
    return [
        line(one.name),
        str(len(one.runs)),
        loss(one.median),
        interval(one.low, one.high) if len(one.runs) > 1 else DASH,
        loss(float(np.median(one.mean_height))),
        DASH if math.isnan(one.rank) else f"{one.rank:.2f}",
        f"{one.reached} of {len(one.runs)}",
        ("" if one.reached == len(one.runs) else "≥ ") + short(to_it),
        f"{one.solved:.0%}",
        *([loss(float(np.median(one.held_out)))] if _tested(c) else []),
    ]


def about_bands(c: Comparison) -> str:
    """What the bands are worth."""
    several = [one for one in c.optimisers if len(one.runs) > 1]
    if not several:
        return "There is one seed of each, so there is no band."
    fewest = min(several, key=lambda one: one.covered)
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
        *(
            ["test loss: of the plan that moeopt select chose from the whole study, beyond the budget too."]
            if _tested(c)
            else []
        ),
    ]


def view(c: Comparison) -> RenderableType:
    """The table and what may be concluded, for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    name = line(str(c.description["task"].get("name")))
    studies = "1 study" if len(c.runs) == 1 else f"{len(c.runs)} studies"
    title = f"{name}: {count(len(c.optimisers), 'optimiser')} in {studies}, at {short(c.budget)} " + (
        "seconds" if c.cost == "time" else c.cost
    )
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for i, column in enumerate(head(c)):
        shown = Text(column.replace(" ", "\n", 1) if i else column)
        table.add_column(shown, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for one in c.optimisers:
        table.add_row(*map(Text, row(c, one)))
    return Group(table, *(Text(f"• {text}") for text in c.conclusions), Text("\n" + about_bands(c), style="dim"))


def _tested(c: Comparison) -> bool:
    return any(np.isfinite(one.held_out).any() for one in c.optimisers)
