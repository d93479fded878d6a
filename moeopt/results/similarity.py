"""How alike tasks use the experts, before anything is pruned: whether one may calibrate for another, and what a plan
takes from each.

Three numbers a pair of tasks, each a mean over layers:

- picks: 1 - the total variation between how often each task's tokens pick the experts, 1 where they pick alike;
- kept: the share of the experts that a method keeps for one task and for the other, of those it keeps for one;
- rank: Spearman's correlation of the method's scores.

They are told between halves of the tasks, and within: between two halves of one task. Two samples of one and the same
text differ, too, the more the smaller they are; only what is lost beyond that (the gap) says that tasks differ.
Sequences stand in blocks, so that neighbours stay together, and blocks are divided at random many times. The spread of
halves is that of the whole (half-sampling, McCarthy 1969), which gives the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import MethodError
from moeopt.methods import Budget, Calibration, LayerActivations, get
from moeopt.methods.rankings import Ranking
from moeopt.methods.sequences import packed
from moeopt.models import shape_of
from moeopt.plan import Plan
from moeopt.results.steps import Progress, Steps
from moeopt.showing import Shown
from moeopt.statistics import Floats, Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.plan import ModelShape
    from moeopt.tasks import Task

Measure = Literal["picks", "kept", "rank"]
BLOCKS, DRAWS = 16, 200
LEVEL = 0.95
ALIKE = 0.05
"""The share of kept experts that may differ beyond what halves of one task differ by, for one to stand for another."""


@dataclass(frozen=True)
class Likeness:
    """One measure of a pair of tasks.

    Args:
        between: of halves of the two tasks.
        within: of halves of one, the mean of both tasks.
        gap: within less between.
        layers: `between` and `within` of every layer, (2, layers).
    """

    between: Interval
    within: Interval
    gap: Interval
    layers: Floats


@dataclass(frozen=True)
class Pair:
    """Two tasks, and how alike they use the experts."""

    first: str
    second: str
    measures: Mapping[Measure, Likeness]

    @property
    def verdict(self) -> Literal["stands for", "unclear", "differs"]:
        """Whether the experts that one of the tasks would keep are those of the other, but for what chance makes."""
        gap = self.measures["kept"].gap
        return "differs" if gap.low > ALIKE else "stands for" if gap.high <= ALIKE else "unclear"


@dataclass(frozen=True)
class Dropped:
    """What a plan takes from a task.

    Args:
        picks: the share of picks that go to experts that it drops.
        scores: the share of the method's scores that these have.
        layers: both of every layer, (2, layers).
    """

    picks: Interval
    scores: Interval
    layers: Floats


@dataclass(frozen=True)
class Similarity(Shown):
    """How alike tasks use the experts of a model.

    Args:
        shape: of the model.
        method, keep: by which, and how many experts a layer are kept.
        sequences, tokens: of each task.
        pairs: of all tasks.
        picks, scores: of each task, (layers, n): shares of the picks, and the method's scores.
        dropped: what a plan takes from each task; empty where there is none.
        harms: of tasks by name, what the plan takes of their scores less what it takes of the least harmed task's.
    """

    shape: ModelShape
    method: str
    keep: int
    sequences: Mapping[str, int]
    tokens: Mapping[str, int]
    pairs: tuple[Pair, ...]
    picks: Mapping[str, Floats]
    scores: Mapping[str, Floats]
    dropped: Mapping[str, Dropped]
    harms: Mapping[str, Interval]


def similarity(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    *,
    keep: int | None = None,
    method: str = "reap",
    plan: Plan | None = None,
    split: str = "search",
    limit: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    batch_tokens: int = 1024,
    progress: Progress | None = None,
) -> Similarity:
    """One pass of the full model over each task.

    Args:
        model, tokenizer: as `moeopt.load` returns them.
        tasks: by the names they are told by; at least two, or one and a plan. Of questions the prompt with its answer
            is run.
        keep: experts a layer; None: half of them.
        method: of `moeopt.methods`, one that ranks experts by a sum over tokens.
        plan: of which is told what it takes from each task. An expert that is merged into another is not dropped.
        split, limit: which examples of a task, and how many; None: all.
        draws: how often tasks are halved.
        seed: of these draws.
        batch_tokens: padded tokens a forward pass.
        progress: as for `moeopt.results.method_comparison.compare`.

    Raises:
        MethodError: for another method, too few tasks or sequences, or a number that is out of range.
        PlanError: for a plan of another model.
        TaskError, ModelError: as for `moeopt.methods.Calibration`.
    """
    ranking = get(method)
    if not isinstance(ranking, Ranking) or ranking.progressive:
        raise MethodError(
            f"tasks are held against each other by scores that are sums over tokens, such as reap, got {method}"
        )
    if len(tasks) < (2 if plan is None else 1):
        raise MethodError(f"name two tasks or more, or one and a plan, got {', '.join(tasks) or 'none'}")
    if draws < 1:
        raise MethodError(f"draws must be at least 1, got {draws}")
    shape = shape_of(model)
    budget = Budget(shape.experts, shape.k, shape.experts // 2 if keep is None else keep, 1, 0, shape.router_groups)
    budget.check()
    gone = None if plan is None else dropped_experts(plan, shape)
    steps = Steps(progress, len(tasks))
    uses: dict[str, _Use] = {}
    for name, task in tasks.items():
        steps(f"the full model on {name}")
        calibration = Calibration(model, tokenizer, task, split=split, limit=limit, batch_tokens=batch_tokens)
        uses[name] = _Use(name, calibration, ranking, budget)
    steps.finish()
    halves = {name: use.halves(draws, np.random.default_rng([seed, i])) for i, (name, use) in enumerate(uses.items())}
    taken = {} if gone is None else {name: _taken(use, halves[name], gone) for name, use in uses.items()}
    least = min(taken, key=lambda name: taken[name][0].scores.mean, default="")
    return Similarity(
        shape=shape,
        method=method,
        keep=budget.keep,
        sequences={name: use.sequences for name, use in uses.items()},
        tokens={name: use.tokens for name, use in uses.items()},
        pairs=tuple(_pair(a, b, halves[a], halves[b], budget.keep) for a, b in combinations(uses, 2)),
        picks={name: use.at(use.all_blocks).picks for name, use in uses.items()},
        scores={name: use.at(use.all_blocks).scores for name, use in uses.items()},
        dropped={name: dropped for name, (dropped, _) in taken.items()},
        harms={
            name: _interval(dropped.scores.mean - taken[least][0].scores.mean, drawn - taken[least][1])
            for name, (dropped, drawn) in taken.items()
            if name != least
        },
    )


def dropped_experts(plan: Plan, shape: ModelShape) -> NDArray[np.bool_]:
    """Which experts are in none of a plan's, (layers, n).

    Raises:
        MethodError: for a plan of another shape.
    """
    if [layer.experts for layer in plan.layers] != [shape.experts] * shape.layers:
        raise MethodError(f"the plan is not of a model of {shape.layers} layers of {shape.experts} experts")
    return np.stack([(layer.expert_matrix == 0).all(axis=0) for layer in plan.layers])


@dataclass(frozen=True)
class _Seen:
    """Of some blocks of a task: shares of picks, scores, and what is kept, all (layers, n)."""

    picks: Floats
    scores: Floats
    kept: NDArray[np.bool_]


class _Use:
    """What each block of a task's sequences makes of the experts.

    Args:
        name: of the task.
        calibration: its examples.
        method: what scores.
        budget: what is kept.
    """

    def __init__(self, name: str, calibration: Calibration, method: Ranking, budget: Budget) -> None:
        self.method, self.budget = method, budget
        self.sequences, self.tokens = calibration.sequences, calibration.tokens
        blocks = min(BLOCKS, self.sequences)
        if blocks < 4:
            raise MethodError(f"{name} has {self.sequences} sequences, and halves that say anything need 4 at least")
        self.all_blocks = np.ones(blocks)
        layers, n = calibration.shape.layers, budget.experts
        by_number = {
            int(number): ids[mask.bool()].tolist()
            for batch in calibration.batches
            for number, ids, mask in zip(batch.numbers, batch.ids, batch.mask)
        }
        # What is observed of a batch is of one block, whose number stands for the sequences'.
        calibration.batches = [
            replace(batch, numbers=batch.numbers * 0 + block)
            for block, numbers in enumerate(np.array_split(np.arange(self.sequences), blocks))
            for batch in packed([by_number[int(number)] for number in numbers], calibration.batch_tokens)
        ]
        self._visits = np.zeros((blocks, layers, n))
        sums = [[method.needs(budget) for _ in range(layers)] for _ in range(blocks)]

        def observe(acts: LayerActivations) -> None:
            block, layer = int(acts.sequence[0]), acts.layer.index
            picks = acts.index[acts.gates != 0].cpu().numpy()
            self._visits[block, layer] += np.bincount(picks, minlength=n)
            for statistic in sums[block][layer].values():
                statistic.add(acts)

        calibration.run(observe)
        (kind,) = sums[0][0]
        self._statistics = [[block[layer][kind] for block in sums] for layer in range(layers)]
        self._sums = [
            {name: np.stack([getattr(part, name) for part in parts]) for name in vars(parts[0])}
            for parts in self._statistics
        ]

    def at(self, weights: Floats) -> _Seen:
        """Of the blocks together, each with a weight, (blocks,)."""
        visits = np.tensordot(weights, self._visits, 1)
        scores = np.stack([self._scores(layer, weights) for layer in range(len(self._sums))])
        kept = np.zeros(scores.shape, dtype=bool)
        for row, layer in zip(kept, scores):
            row[self.budget.best(layer)] = True
        return _Seen(visits / visits.sum(axis=1, keepdims=True), scores, kept)

    def _scores(self, layer: int, weights: Floats) -> Floats:
        total = copy(self._statistics[layer][0])
        for name, parts in self._sums[layer].items():
            setattr(total, name, np.tensordot(weights, parts, 1))
        return self.method.scores({type(total).__name__: total}, self.budget, np.random.default_rng(0))

    def halves(self, draws: int, rng: np.random.Generator) -> list[tuple[_Seen, _Seen]]:
        """Two halves of the blocks, drawn so often."""
        blocks = len(self.all_blocks)
        first = np.array([rng.permutation(blocks) < blocks // 2 for _ in range(draws)])
        return [(self.at(half.astype(float)), self.at((~half).astype(float))) for half in first]


Halves = list[tuple[_Seen, _Seen]]


def _measured(a: _Seen, b: _Seen, keep: int) -> dict[Measure, Floats]:
    """How alike two are, each (layers,)."""
    return {
        "picks": np.minimum(a.picks, b.picks).sum(axis=1),
        "kept": (a.kept & b.kept).sum(axis=1) / keep,
        "rank": spearman(a.scores, b.scores),
    }


def spearman(a: Floats, b: Floats) -> Floats:
    """Spearman's rank correlation of each row, (rows,); 0 where all of a row are equal."""
    from scipy.stats import rankdata

    first, second = (rankdata(each, axis=1) for each in (a, b))
    first, second = (each - each.mean(axis=1, keepdims=True) for each in (first, second))
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.asarray((first * second).sum(axis=1) / np.where(scale == 0, 1.0, scale), dtype=np.float64)


def _pair(first: str, second: str, a: Halves, b: Halves, keep: int) -> Pair:
    # One half of each: of both, what halves differ from the whole by would cancel.
    between = [_measured(x, y, keep) for (x, _), (y, _) in zip(a, b)]
    within = [(_measured(*x, keep), _measured(*y, keep)) for x, y in zip(a, b)]
    measures: dict[Measure, Likeness] = {}
    for name in between[0]:
        across = np.array([measured[name] for measured in between])  # (draws, layers), as the next two
        inside = np.array([(x[name] + y[name]) / 2 for x, y in within])
        gap = inside - across
        a_to_b, a_to_a, lost = (_interval(float(each.mean()), each.mean(axis=1)) for each in (across, inside, gap))
        measures[name] = Likeness(a_to_b, a_to_a, lost, np.stack([across.mean(axis=0), inside.mean(axis=0)]))
    return Pair(first, second, measures)


def _taken(use: _Use, halves: Halves, gone: NDArray[np.bool_]) -> tuple[Dropped, Floats]:
    """What a plan takes from a task, and of each draw what of its scores, (draws,)."""

    def shares(seen: _Seen) -> Floats:
        totals = seen.scores.sum(axis=1)
        of_scores = np.where(gone, seen.scores, 0.0).sum(axis=1) / np.where(totals == 0, 1.0, totals)
        return np.stack([np.where(gone, seen.picks, 0.0).sum(axis=1), of_scores])

    whole = shares(use.at(use.all_blocks))
    drawn = np.array([shares(half).mean(axis=1) for half, _ in halves])
    picks, scores = (_interval(float(whole[i].mean()), drawn[:, i]) for i in range(2))
    return Dropped(picks, scores, whole), drawn[:, 1]


def _interval(mean: float, draws: Floats) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))
