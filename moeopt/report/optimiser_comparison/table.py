"""The table of a comparison, as text for the terminal and the page."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from moeopt import statistics
from moeopt.report.formatting import DASH, count, loss, number, quantity, short
from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.report.tables import Columns, table
from moeopt.results.optimiser_comparison import Optimiser, OptimiserComparison
from moeopt.showing import line
from moeopt.trials.objectives import direction


def columns(c: OptimiserComparison) -> Columns:
    """What is told of an optimiser, at the common budget."""

    def band(o: Optimiser) -> str:
        return f"[{loss(o.low)}, {loss(o.high)}]" if len(o.runs) > 1 else DASH

    def to_target(o: Optimiser) -> str:
        censored = "" if o.reached == len(o.runs) else "≥ "
        return censored + short(statistics.restricted_mean(o.times, c.budget))

    return [
        ("optimiser", lambda o: line(o.name)),
        ("seeds", lambda o: str(len(o.runs))),
        (f"median {c.measure.removeprefix('search ')}", lambda o: loss(o.median)),
        ("band", band),
        ("mean height", lambda o: loss(float(np.median(o.mean_height)))),
        ("mean rank", lambda o: number(o.rank, 2)),
        (f"reached {loss(c.target)}", lambda o: f"{o.reached} of {len(o.runs)}"),
        (f"{'s' if c.cost == 'time' else c.cost} to it", to_target),
        ("targets", lambda o: f"{o.solved:.0%}"),
        *[("median test loss", lambda o: loss(float(np.median(o.held_out))))] * _tested(c),
    ]


def about_bands(c: OptimiserComparison) -> str:
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


def notes(c: OptimiserComparison) -> list[str]:
    """What the numbers are."""
    charged = sum(run.charged for run in c.runs)
    return [
        "layer-tokens: tokens times the decoder layers that they went through, calibration of warm starts included. "
        "time: seconds in which at least one worker ran a trial, on the machine it ran on; neither pauses between "
        "runs nor calibration. trials: finished ones.",
        "Pruned and failed trials cost what they ran and are never the best; an attempt made again counts once."
        + (f" Failed trials that noted no cost ({charged}) are charged the dearest of their study." if charged else ""),
        *_about_hypervolume(c),
        f"median, band: the least {c.measure} within the budget, over seeds. " + about_bands(c),
        "mean height: the area under the best-so-far curve divided by its length, median over seeds. It goes from "
        f"{short(c.start)}, where the last study found its first loss, to the budget.",
        "mean rank: over the seeds that all optimisers have; 1 is the least, ties share.",
        f"reached: studies that found {loss(c.target)} or less within the budget; to it: restricted mean, the others "
        "counted at the budget (≥). targets: share of (target, seed) pairs reached, the end of the run time "
        "distribution.",
        "p: exact sign-flip test of the paired differences over common seeds, corrected by Holm over all pairs. The "
        "intervals are that test's own, not corrected, and infinite below 6 seeds.",
        *["test loss: of the plan that moeopt select chose from the whole study, beyond the budget too."] * _tested(c),
    ]


def _about_hypervolume(c: OptimiserComparison) -> list[str]:
    if c.bounds is None:
        return []
    ends = ", ".join(
        f"{line(name, 40)} from {short(_sign(name) * best)} to {short(_sign(name) * worst)}"
        for name, best, worst in zip(c.objectives, c.bounds.ideal, c.bounds.reference)
    )
    return [
        f"missing hypervolume: the share of the box ({ends}) that a study's trials so far do not dominate. It "
        "reaches from the best values on the front of all studies together to a tenth of its range beyond the worst."
    ]


def _sign(name: str) -> float:
    return -1.0 if direction(name) == "maximize" else 1.0


def view(c: OptimiserComparison) -> RenderableType:
    """The table and what may be concluded, for a terminal."""
    name = line(str(c.description["task"].get("name")))
    studies = "1 study" if len(c.runs) == 1 else f"{len(c.runs)} studies"
    title = f"{name}: {count(len(c.optimisers), 'optimiser')} in {studies}, at {quantity(c.budget, c.cost)}"
    narrow = [(head.replace(" ", "\n", 1), cell) for head, cell in columns(c)]
    shown = table(title, narrow, c.optimisers, padding=(0, 0))
    return Group(shown, *(Text(f"• {text}") for text in conclusions(c)), Text("\n" + about_bands(c), style="dim"))


def _tested(c: OptimiserComparison) -> bool:
    return any(np.isfinite(optimiser.held_out).any() for optimiser in c.optimisers)
