"""Optimisers over repeated seeds: studies grouped, held against each other at a common budget, and what follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt import statistics
from moeopt.errors import StudyError, nearest
from moeopt.results.optimiser_comparison.grouping import check_comparable, grouped_by_optimiser, labelled, seeds_of
from moeopt.results.optimiser_comparison.runs import COSTS, Cost, Run, read
from moeopt.showing import Shown
from moeopt.statistics import Floats
from moeopt.trials.hypervolume import Bounds, curve

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Pair:
    """Two optimisers on the seeds that both have.

    Attributes:
        first, second: their names; differences are first minus second, below 0 the first is better.
        differences: (seeds,), of those where both have a loss.
        mean: of the differences; NaN for none.
        low, high: its 95% interval (`statistics.interval`), not corrected for being one of many.
        p: of `statistics.sign_flip`.
        corrected: the same, by `statistics.holm` over all pairs.
    """

    first: str
    second: str
    differences: Floats
    mean: float
    low: float
    high: float
    p: float
    corrected: float

    @property
    def better(self) -> str | None:
        """The optimiser that the corrected test says is better; None: it says nothing."""
        if self.corrected > statistics.ALPHA or self.mean == 0:
            return None
        return self.first if self.mean < 0 else self.second


@dataclass(frozen=True)
class Optimiser:
    """One optimiser, at the common budget.

    Attributes:
        name: readable, and its own.
        settings: of its sampler, without seed; pruner and warm starts.
        runs: by seed.
        losses: (runs,), the least search loss, or missing hypervolume, within the budget; NaN where there was none.
        median, low, high, covered: of the losses over runs, see `statistics.median_band`.
        mean_height: (runs,), see `statistics.mean_height`, from where every run has a loss to the budget.
        times: (runs,), what it took to reach the target; infinite where that was not within the budget.
        times_to_targets: (runs, targets), the same for each of the comparison's targets.
        rank: mean over the seeds that all optimisers have; NaN where there are none.
        held_out: (runs,), loss on test of what was selected; NaN where nothing was.
    """

    name: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    losses: Floats
    median: float
    low: float
    high: float
    covered: float
    mean_height: Floats
    times: Floats
    times_to_targets: Floats
    rank: float
    held_out: Floats

    @property
    def solved(self) -> float:
        """The share of targets and runs that were reached within the budget."""
        return float(np.isfinite(self.times_to_targets).mean())

    @property
    def reached(self) -> int:
        """Runs that reached the target within the budget."""
        return int(np.isfinite(self.times).sum())


@dataclass(frozen=True)
class OptimiserComparison(Shown):
    """Optimisers over seeds; `compare` makes it.

    Attributes:
        cost: what is spent: budget, areas, times and targets are in it.
        costs: what curves can be drawn against: what all studies know.
        budget: the least that any study spent in all, so that every one reached it.
        start: where the last study found its first loss; areas and targets begin there.
        target: the loss that times are given for.
        targets: (targets,), decreasing, of the distribution of run time.
        optimisers: by median loss, the least first.
        seeds: that all optimisers have.
        friedman: p-value of all being equal on those seeds; None for fewer than 3 optimisers or 2 seeds.
        pairs: all pairs on search loss.
        held_out_pairs: the same on test loss, empty where not every study has one.
        description: the model, task, space and evaluation of all.
        left_out: names of studies without a finished trial.
        foreign: names of studies that were left out as other samplers than their own made some of their trials.
        bounds: of the hypervolumes of several objectives, shared by all runs; None for one.
    """

    cost: Cost
    costs: tuple[Cost, ...]
    budget: float
    start: float
    target: float
    targets: Floats
    optimisers: tuple[Optimiser, ...]
    seeds: tuple[str, ...]
    friedman: float | None
    pairs: tuple[Pair, ...]
    held_out_pairs: tuple[Pair, ...]
    description: Mapping[str, Any]
    left_out: tuple[str, ...]
    foreign: tuple[str, ...]
    bounds: Bounds | None = None

    @property
    def measure(self) -> str:
        """What losses are: of several objectives the share of the box between `bounds` that a front leaves."""
        return "search loss" if self.bounds is None else "missing hypervolume"

    @property
    def objectives(self) -> tuple[str, ...]:
        """Their names."""
        return self.runs[0].objectives

    @property
    def runs(self) -> list[Run]:
        return [run for optimiser in self.optimisers for run in optimiser.runs]

    def common_budget(self, cost: Cost) -> float:
        """The least that any study spent in all, of any cost."""
        return min(run.spent(cost) for run in self.runs)


def compare(
    studies: Iterable[optuna.Study | Run], *, cost: Cost = "layer-tokens", target: float | None = None
) -> OptimiserComparison:
    """Compare optimisers over repeated seeds, each study being one optimiser and one seed.

    Studies whose samplers, pruners and warm starts differ in nothing but the seed are repeats of one optimiser. Those
    that hold trials of another sampler than their own are left out, and named.

    Studies of several objectives are compared by the hypervolume of their fronts so far, between bounds of the front of
    all of them together (`moeopt.trials.hypervolume.Bounds`). Where one objective has a least loss, they have what is
    missing to a hypervolume of 1, less being better, too.

    Args:
        studies: of moeopt, of the same model, task, space and evaluation; or what `read` makes of them.
        cost: ``"layer-tokens"`` (decoder layers that tokens went through, calibration of warm starts included),
            ``"time"`` (seconds in which at least one worker ran a trial), or ``"trials"``. All trials count, pruned and
            failed ones too; an attempt that was made again counts once.
        target: the loss, or missing hypervolume, that times are given for. Default: what half of the studies reached
            within the budget.

    Raises:
        StudyError: when there is nothing to compare, a study is not one that `read` understands, two are not
            comparable (the message names the differing fields) or are the same optimiser and seed, or a study does
            not know the cost.
    """
    if cost not in COSTS:
        hint = nearest(str(cost), [*COSTS])
        raise StudyError(f"cost must be layer-tokens, time or trials, got {cost!r}{hint}")
    if target is not None and not np.isfinite(target):
        raise StudyError(f"target must be a finite loss, got {target}")
    given = [study if isinstance(study, Run) else read(study) for study in studies]
    if not given:
        raise StudyError("no study to compare")
    everything = [run for run in given if not run.foreign]
    if not everything:
        raise StudyError(
            f"study {given[0].study!r}, as all that were given, has trials that another sampler than its own made, the "
            f"first is {given[0].foreign[0]}: it says nothing of an optimiser"
        )
    check_comparable(everything)
    runs = labelled([run for run in everything if len(run.curve)])
    if not runs:
        raise StudyError("none of these studies has a finished trial yet")
    without = [run.study for run in runs if cost not in run.costs]
    if without:
        others = [other for other in COSTS if all(other in run.costs for run in runs)]
        raise StudyError(f"study {without[0]!r} does not know its {cost} throughout; compare by {' or '.join(others)}")
    runs, bounds = _with_hypervolumes(runs)
    budget = min(run.spent(cost) for run in runs)
    first_losses = [at for run in runs if (at := _first_loss_at(run, cost)) <= budget]
    if not first_losses:
        raise StudyError(f"within the common budget, {budget:,.6g} {cost}, no completed trial has a finite loss")
    start = max(first_losses)
    grouped = grouped_by_optimiser(runs)
    losses = {name: _heights(group, cost, budget) for name, group in grouped.items()}
    finite = np.sort(np.concatenate(list(losses.values())))  # NaN last
    finite = finite[np.isfinite(finite)]
    if target is None:
        target = float(finite[(len(finite) - 1) // 2])
    targets = statistics.make_targets(float(np.nanmax(_heights(runs, cost, start))), float(finite[0]))
    seeds = [seed for seed in seeds_of(runs) if all(seed in seeds_of(group) for group in grouped.values())]
    common = [[losses[name][seeds_of(group).index(seed)] for name, group in grouped.items()] for seed in seeds]
    ranked = statistics.ranks(np.array(common).reshape(len(seeds), len(grouped)))
    optimisers = []
    for i, (name, group) in enumerate(grouped.items()):
        middle, low, high, covered = statistics.median_band(losses[name])
        times = np.array([statistics.time_to(run.costs[cost], run.curve, np.append(targets, target)) for run in group])
        times = np.where(times <= budget, times, np.inf)
        optimisers.append(
            Optimiser(
                name=name, settings=group[0].settings, runs=tuple(group), losses=losses[name],
                median=float(middle), low=float(low), high=float(high), covered=covered,
                mean_height=np.array([statistics.mean_height(r.costs[cost], r.curve, start, budget) for r in group]),
                times=times[:, -1], times_to_targets=times[:, :-1],
                rank=float(ranked[:, i].mean()) if seeds else np.nan,
                held_out=np.array([np.nan if run.held_out is None else run.held_out.loss for run in group]),
            )
        )  # fmt: skip
    optimisers.sort(key=lambda o: (np.isnan(o.median), o.median, o.name))
    scored_on = {None if run.held_out is None else run.held_out.scored_on for run in runs}
    tested = len(scored_on) == 1 and None not in scored_on
    return OptimiserComparison(
        cost=cost, costs=tuple(c for c in COSTS if all(c in run.costs for run in runs)),
        budget=budget, start=start, target=float(target), targets=targets,
        optimisers=tuple(optimisers), seeds=tuple(seeds),
        friedman=statistics.friedman(ranked) if len(optimisers) > 2 and len(seeds) > 1 else None,
        pairs=_pairs([(o, o.losses) for o in optimisers]),
        held_out_pairs=_pairs([(o, o.held_out) for o in optimisers]) if tested else (),
        description=everything[0].description,
        left_out=tuple(run.study for run in everything if not len(run.curve)),
        foreign=tuple(run.study for run in given if run.foreign),
        bounds=bounds,
    )  # fmt: skip


def _with_hypervolumes(runs: Sequence[Run]) -> tuple[list[Run], Bounds | None]:
    """Runs of several objectives with curves of what their fronts leave of a box that all share; others as they are."""
    joint = np.concatenate([run.points for run in runs])
    joint = joint[np.isfinite(joint).all(axis=1)]
    if joint.shape[1] == 1 or not len(joint):
        return [*runs], None
    bounds = Bounds.of(joint)
    return [replace(run, curve=1 - curve(run.points, bounds)) for run in runs], bounds


def _heights(runs: Sequence[Run], cost: Cost, at: float) -> Floats:
    """The least loss of each run within so much, (runs,); NaN where there is none."""
    return np.array([statistics.sample(run.costs[cost], run.curve, np.array(at)) for run in runs], dtype=np.float64)


def _first_loss_at(run: Run, cost: Cost) -> float:
    finite = np.isfinite(run.curve)
    return float(run.costs[cost][finite][0]) if finite.any() else np.inf


def _pairs(losses: Sequence[tuple[Optimiser, Floats]]) -> tuple[Pair, ...]:
    pairs = []
    for (a, losses_a), (b, losses_b) in combinations(losses, 2):
        by_seed = dict(zip(seeds_of(b.runs), losses_b))
        both = [loss - by_seed[seed] for seed, loss in zip(seeds_of(a.runs), losses_a) if seed in by_seed]
        d = np.array(both, dtype=np.float64)
        d = d[np.isfinite(d)]
        low, high = statistics.interval(d)
        mean = float(d.mean()) if len(d) else np.nan
        pairs.append(Pair(a.name, b.name, d, mean, low, high, statistics.sign_flip(d), corrected=1.0))
    return tuple(replace(pair, corrected=p) for pair, p in zip(pairs, statistics.holm([pair.p for pair in pairs])))
