"""Loss-aware pruning: the kept experts that change the task's loss least, by its derivative.

Our own; a Taylor importance as in Molchanov et al. (arXiv 1906.10771), of sets of experts and what stands in for them.
NAEE keeps the set that changes a layer's *output* least. What matters is the change of the loss L. With g_t = dL/dy_t
at the output of a layer's experts for token t, f_e(x_t) the output of expert e, and w_e(S; x_t) its weight when only
the experts of S may be routed to, token t contributes, to first order,

    d_t(S) = sum_e (w_e(S; x_t) - w_e(now; x_t)) <g_t, f_e(x_t)>.

Layers are judged apart, all from one pass forth and back (`moeopt.methods.gradients`), in which every expert runs once
for its product with g_t: scalars, where NAEE needs a Gram matrix. Up to 20,000 kept sets S of a layer are all judged;
beyond, the loss of dropping each expert alone ranks them. Over tokens the d_t are added up in one of these ways:

- signed: sum d_t, the first-order change itself. Right where experts are near copies; misleading where they differ,
  since at a trained optimum first-order terms cancel over tokens, and what is left is curvature;
- absolute: sum |d_t|; squared: sum d_t^2, the curvature, with the losses' own derivatives as its (Fisher) estimate;
- gauss_newton c: sum d_t + c/2 d_t^2, for c = 1, 3 and 10: c accounts for tokens and layers that change together.

Which one is told by the true loss on the last quarter of the calibration examples, under the plan that each makes of
the others; the plan returned is that way's, of all of them. Distances from the full model (kl, acceptance), which are
least there, are seen from the curvature alone, with tokens drawn from the model itself as the answers.

`loss_aware_rounds` goes on from there: derivatives are taken again under the plan (sets), or while experts are dropped
in three steps (rankings), and the result is kept if the last quarter's loss is lower. Of all methods here, these two
alone look at derivatives: of activations, of no weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import comb
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from moeopt.errors import MethodError, ModelError
from moeopt.evaluation import Evaluator
from moeopt.methods.base import Method, Wanted
from moeopt.methods.gradients import LossGradients
from moeopt.methods.naee import AT_ONCE, MOST_RANKED, MOST_SETS, by_rank, kept_sets, masks
from moeopt.methods.seen import Seen
from moeopt.methods.statistics import Array
from moeopt.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from moeopt.methods.calibration import Calibration
    from moeopt.methods.statistics import Statistic

JUDGED = 0.25
"""The share of the calibration examples that ways of adding up are judged on."""
ROUNDS = 3

Groups = Sequence[tuple[int, int]]
Kept = tuple[int, ...]


class Sums:
    """What plans of one layer, or several that share a choice, would change of the loss, each a set of kept experts.

    Args:
        sets: the sets, all of as many of the n experts.
        active: how many of a set run.
        now, k: experts that may be routed to in the plan at which derivatives are taken, and how many of them run.
        n: experts of a layer.

    Attributes:
        signed, absolute, squared: sums over tokens of d_t, |d_t| and d_t^2, float64 (sets,).
    """

    def __init__(self, sets: Sequence[Kept], active: int, now: Kept, k: int, n: int) -> None:
        self.sets, self.active, self.now, self.k, self.n = sets, active, now, k, n
        self.signed, self.absolute, self.squared = (np.zeros(len(sets)) for _ in range(3))
        self._masks, self._now = masks(sets, n), masks([now], n)

    def add(self, seen: Seen, products: Tensor) -> None:
        """A batch: what the layer saw, and `products_of` that."""
        before = _values(seen, products, self._now, self.k)
        step = max(1, AT_ONCE // products.numel())
        for first in range(0, len(self.sets), step):
            part = slice(first, first + step)
            change = (_values(seen, products, self._masks[part], self.active) - before).double()
            self.signed[part] += change.sum(0).cpu().numpy()
            self.absolute[part] += change.abs().sum(0).cpu().numpy()
            self.squared[part] += (change**2).sum(0).cpu().numpy()

    def __add__(self, other: Self) -> Self:
        total = copy(self)
        for name in ("signed", "absolute", "squared"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total


class Changes(Sums):
    """`Sums` of all kept sets of `keep` experts, or of `now` without one expert each, where those are too many.

    Args:
        now, k: as for `Sums`.
        wanted: what is asked.
        keep: experts to keep, now: `wanted.keep`, or more on the way there.
    """

    def __init__(self, now: Kept, k: int, wanted: Wanted, keep: int) -> None:
        n = wanted.experts
        self.by_set, self.keep = keep == wanted.keep and comb(n, keep) <= MOST_SETS, keep
        sets = kept_sets(n, keep) if self.by_set else [tuple(e for e in now if e != one) for one in now]
        # What a set of which fewer remain than run would do is that of all that remain.
        super().__init__(sets, min(wanted.active, len(sets[0])), now, k, n)

    def best(self, rule: Rule) -> Kept:
        """The kept set of least change; of a ranking, the experts whose loss alone would change most."""
        scores = rule(self)
        if self.by_set:
            return self.sets[int(scores.argmin())]
        return tuple(sorted(self.now[i] for i in np.argsort(-scores, kind="stable")[: self.keep]))


Rule = Callable[[Changes], Array]
CURVATURE: dict[str, Rule] = {"absolute": lambda c: c.absolute, "squared": lambda c: c.squared}
RULES: dict[str, Rule] = {
    "signed": lambda c: c.signed,
    **CURVATURE,
    **{f"gauss_newton {x}": lambda c, x=x: c.signed + x / 2 * c.squared for x in (1, 3, 10)},  # type: ignore[misc]
}
"""From sums to a score a set, of which the least is kept."""


def products_of(seen: Seen, gradient: Tensor) -> Tensor:
    """<g_t, f_e(x_t)> of every expert, from dL/dy (tokens, hidden): float32 (tokens, n)."""
    slopes = gradient.float()
    return torch.stack([(seen.output(e, slice(None)).float() * slopes).sum(-1) for e in range(seen.layer.n)], dim=1)


def cost_of(gradients: LossGradients) -> int:
    """Layer-tokens of one pass with all products: forth, forth again layer by layer, and back, and n / k times the
    layers whose n experts run."""
    experts = sum(layer.n / layer.k for layer in gradients.layers)
    return round(gradients.tokens * (3 * len(gradients.parts.layers) + experts))


def _values(seen: Seen, products: Tensor, kept: Tensor, k: int) -> Tensor:
    """sum_e w_e(S) <g, f_e> of sets, bool (sets, n): float32 (tokens, sets)."""

    def of_picks(index: Tensor, weights: Tensor) -> Tensor:
        picked = products.gather(1, index.flatten(1)).view(index.shape)
        return (weights * picked).sum(-1)

    kept = kept.to(products.device)
    if len(kept) > seen.layer.n and seen.layer.n <= MOST_RANKED and not seen.depends_on_set:
        return by_rank(seen.layer.n, k).of_sets(seen, kept, of_picks)
    return of_picks(*seen.chosen(kept, k))


class LossAware(Method):
    """See the top of this file; made by `planned`, not layer by layer.

    Args:
        summary: what it does.
        rounds: how often derivatives are taken.
    """

    def __init__(self, summary: str, rounds: int) -> None:
        self.summary, self.rounds = summary, rounds

    alone = True

    def layer(self, statistics: Mapping[str, Statistic], wanted: Wanted, rng: np.random.Generator) -> LayerPlan:
        raise MethodError("loss-aware pruning judges all layers from one pass: use moeopt.methods.plans")

    def planned(self, calibration: Calibration, wanted: Wanted, ranges: Groups) -> Outcome:
        """The plan, and how it came about.

        Args:
            calibration: model, examples and loss.
            wanted: what is asked.
            ranges: inclusive ranges of MoE layers that share a choice.

        Raises:
            MethodError: if the model cannot be run layer by layer.
        """
        try:
            return _Search(calibration, wanted, ranges).run(self.rounds)
        except ModelError as error:
            raise MethodError(f"derivatives need a model that runs layer by layer: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """A plan, the layer-tokens that it cost, wall seconds, and in words how it was chosen."""

    plan: Plan
    layer_tokens: int
    seconds: float
    how: str


class _Search:
    """The passes of one method call."""

    def __init__(self, calibration: Calibration, wanted: Wanted, ranges: Groups) -> None:
        self.started = time.perf_counter()
        self.wanted, self.ranges = wanted, ranges
        self.group_of = [group for group, (first, last) in enumerate(ranges) for _ in range(first, last + 1)]
        self.fit, self.judge = (
            Evaluator(
                calibration.model, calibration.tokenizer, calibration.task, requests=part, split=calibration.split,
                batch_tokens=calibration.batch_tokens, score=calibration.loss, prefix_memory=0,
            )
            for part in _divided(calibration)
        )  # fmt: skip
        self.rules = RULES if self.fit.teacher is None else CURVATURE
        self.gradients = [LossGradients(self.fit), LossGradients(self.judge)]
        self.layer_tokens = 0
        self.losses: dict[str, float] = {}

    def run(self, rounds: int) -> Outcome:
        wanted = self.wanted
        everything = [tuple(range(wanted.experts))] * len(self.ranges)
        fit, total = self.changes(everything, wanted.k, wanted.keep)
        made = {name: self.plan([part.best(rule) for part in fit]) for name, rule in self.rules.items()}
        name = min(made, key=lambda name: self.judged(made[name]))
        kept = [part.best(self.rules[name]) for part in total]
        how = name
        if rounds > 1:
            further = (self._again if total[0].by_set else self._in_steps)(name, kept, rounds)
            reached = self.judged(self.plan(further))
            if reached < self.judged(self.plan(kept)):
                kept, how = further, f"{name}, {rounds} rounds"
            else:
                how = f"{name}, the first round's plan"
        seconds = time.perf_counter() - self.started
        return Outcome(self.plan(kept), self.layer_tokens, seconds, how)

    def _again(self, name: str, kept: list[Kept], rounds: int) -> list[Kept]:
        """All sets again, from derivatives under the plan so far."""
        for _ in range(rounds - 1):
            _, total = self.changes(kept, self.wanted.active, self.wanted.keep)
            further = [part.best(self.rules[name]) for part in total]
            if self.judged(self.plan(further)) >= self.judged(self.plan(kept)):
                break
            kept = further
        return kept

    def _in_steps(self, name: str, kept: list[Kept], rounds: int) -> list[Kept]:
        """A few experts after another dropped, with derivatives under the plan so far."""
        n, r, k = self.wanted.experts, self.wanted.keep, self.wanted.k
        kept = [tuple(range(n))] * len(self.ranges)
        for keep in np.linspace(n, r, rounds + 1).round().astype(int)[1:].tolist():
            _, total = self.changes(kept, k, keep)
            kept = [part.best(self.rules[name]) for part in total]
            k = self.wanted.active if keep == r else min(k, keep)
        return kept

    def changes(self, now: list[Kept], k: int, keep: int) -> tuple[list[Changes], list[Changes]]:
        """By group, of the examples that ways are made from, and of all: one pass forth and back."""
        whole = all(len(kept) == self.wanted.experts for kept in now) and k == self.wanted.k
        plan = None if whole else self.plan(now, k)
        both = []
        for gradients in self.gradients:
            parts = [Changes(kept, k, self.wanted, keep) for kept in now]

            def see(seen: Seen, gradient: Tensor, parts: list[Changes] = parts) -> None:
                parts[self.group_of[seen.layer.index]].add(seen, products_of(seen, gradient))

            gradients.run(see, plan)
            both.append(parts)
            self.layer_tokens += cost_of(gradients)
        return both[0], [a + b for a, b in zip(*both)]

    def plan(self, kept: list[Kept], k: int | None = None) -> Plan:
        """Of every group's experts."""
        wanted = self.wanted if k is None else replace(self.wanted, active=k)
        return Plan(tuple(wanted.pruned(kept[group]) for group in self.group_of))

    def judged(self, plan: Plan) -> float:
        """The loss of the examples that ways are judged on; no plan's twice."""
        name = plan.fingerprint
        if name not in self.losses:
            evaluation = self.judge.evaluate(plan)
            self.layer_tokens += evaluation.layer_tokens
            self.losses[name] = evaluation.loss
        return self.losses[name]


def _divided(calibration: Calibration) -> tuple[list, list]:  # type: ignore[type-arg]
    """The requests of the first three quarters of the examples, and of the others."""
    examples = sorted({request.example for request in calibration.requests})
    if len(examples) < 2:
        raise MethodError(f"loss-aware pruning needs at least 2 calibration examples, got {len(examples)}")
    first_judged = examples[min(len(examples) - 1, max(1, round((1 - JUDGED) * len(examples))))]
    return (
        [request for request in calibration.requests if request.example < first_judged],
        [request for request in calibration.requests if request.example >= first_judged],
    )
