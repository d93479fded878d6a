"""Loss-aware pruning: the kept experts that change the task's loss least, by its derivative.

Our own; a Taylor importance as in Molchanov et al. (arXiv 1906.10771), of sets of experts and what stands in for them.
NAEE keeps the set that changes a layer's *output* least. What matters is the change of the loss L. With g_t = dL/dy_t
at the output of a layer's experts for token t, f_e(x_t) the output of expert e, and w_e(S; x_t) its weight when only
the experts of S may be routed to, token t contributes, to first order,

    d_t(S) = sum_e (w_e(S; x_t) - w_e(now; x_t)) <g_t, f_e(x_t)>.

Layers are judged apart, all from one pass forth and back (`moeopt.methods.gradients`), in which every expert runs once
for its product with g_t: a scalar, where NAEE needs a row of a Gram matrix. Up to 20,000 kept sets S of a layer are all
judged; beyond, the search begins with an elimination and goes on by swaps, those first that the loss without each
expert, and with each of the others, speaks for. Over tokens the d_t are added up in one of these ways:

- signed: sum d_t, the first-order change itself. Right where experts are near copies; misleading where they differ,
  since at a trained optimum first-order terms cancel over tokens, and what is left is curvature;
- absolute: sum |d_t|; squared: sum d_t^2, the curvature, with the losses' own derivatives as its (Fisher) estimate;
- gauss_newton c: sum d_t + c/2 d_t^2, for c = 1, 3 and 10: c accounts for tokens and layers that change together;
- output: sum |g_t| |dy_t|^2, NAEE's error with the tokens weighed by what the loss makes of them. Where much is pruned,
  the directions g_t of the full model are no longer those of the pruned one, but what matters to it is. Squares are
  estimated without bias by `SKETCHES` products a token with random directions (Achlioptas 2003).

Which one is told by the true loss on the last quarter of the calibration examples, under the plan that each makes of
the others: output, unless another's loss is lower with its paired 80 % interval below 0; then the lowest of those. (The
least loss alone would be luck; at 95 % the quarter of a small calibration seldom tells near copies apart, where signed
sums gain most.) The plan returned is that way's, of all examples. Distances from the full model (kl, acceptance), which
are least there, are seen from the curvature alone, with tokens drawn from the model itself as the answers.

`loss_aware_rounds` goes on from there: derivatives are taken again under the plan so far, as long as the last quarter's
loss gets lower. Of all methods here, these two alone look at derivatives: of activations, of no weight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.errors import MethodError, ModelError
from moeopt.evaluation import Evaluation, Evaluator, paired_bootstrap
from moeopt.methods.base import Budget, CalibrationSize, Groups, MethodPlan, Planner
from moeopt.methods.gradients import MEMORY, LossGradients
from moeopt.methods.kept_sets import MOST_SETS, KeptSet
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.set_changes import CURVATURE, DEFAULT, RULES, SKETCHES, Changes, products_of
from moeopt.plan import Plan

if TYPE_CHECKING:
    from moeopt.methods.calibration import Calibration
    from moeopt.tasks import Request

JUDGED = 0.25
"""The share of the calibration examples that ways of adding up are judged on."""
LEVEL = 0.8
"""Of the interval that a way of adding up must be better than the default with."""
ROUNDS = 3
HELD = 1 << 29
"""Bytes of products that are held where kept sets are too many to add up; beyond, of every so many tokens."""


def cost_of(gradients: LossGradients) -> int:
    """Layer-tokens of one pass with all products: forth, forth again layer by layer, and back, and n / k times the
    layers whose n experts run."""
    experts = sum(layer.n / layer.k for layer in gradients.layers)
    return round(gradients.tokens * (3 * len(gradients.parts.layers) + experts))


class LossAware(Planner):
    """See the top of this file.

    Args:
        summary: what it does.
        rounds: how often derivatives are taken.

    Attributes:
        held: whether products are held however few kept sets there are.
    """

    held = False

    def __init__(self, summary: str, rounds: int) -> None:
        self.summary, self.rounds = summary, rounds

    def bytes_held(self, budget: Budget, size: CalibrationSize) -> int:
        """Hidden states at every layer, which gradients go back through, and products, where sets are too many."""
        states = min(MEMORY, size.tokens * size.layers * size.hidden * size.itemsize)
        products = size.tokens * size.layers * budget.experts * 4 * (1 + SKETCHES)
        return states + (min(HELD, products) if self.held or comb(budget.experts, budget.keep) > MOST_SETS else 0)

    def planned(self, calibration: Calibration, budget: Budget, ranges: Groups) -> MethodPlan:
        try:
            return Search(calibration, budget, ranges).run(self.rounds)
        except ModelError as error:
            raise MethodError(f"derivatives need a model that runs layer by layer: {error}") from error


def ranked(calibration: Calibration) -> NDArray[np.int64]:
    """The experts of every layer, best first, int64 (layers, n), by the default way of adding up (`Changes.order`).

    Raises:
        MethodError: when the model cannot be run layer by layer.
    """
    shape = calibration.shape
    budget = Budget(shape.experts, shape.k, shape.experts, shape.k, router_groups=shape.router_groups)
    try:
        gradients = LossGradients(_evaluator(calibration, calibration.requests))
    except ModelError as error:
        raise MethodError(f"derivatives need a model that runs layer by layer: {error}") from error
    every, draws = _every([gradients], budget), torch.Generator().manual_seed(0)
    now = tuple(range(shape.experts))
    changes = [Changes(now, shape.k, budget, every, held=True) for _ in range(shape.layers)]

    def observe(acts: LayerActivations, gradient: Tensor) -> None:
        changes[acts.layer.index].add(acts, products_of(acts, gradient, draws))

    gradients.run(observe)
    return np.array([layer.order(RULES[DEFAULT]) for layer in changes])


def _evaluator(calibration: Calibration, requests: list[Request]) -> Evaluator:
    """Of the loss of some of the calibration's requests."""
    return Evaluator(
        calibration.model, calibration.tokenizer, calibration.task, requests=requests, split=calibration.split,
        batch_tokens=calibration.batch_tokens, score=calibration.loss, prefix_memory=0,
    )  # fmt: skip


def _every(gradients: Sequence[LossGradients], budget: Budget) -> int:
    """Each how many-th token's products are held, so that they fit into `HELD`."""
    layers = len(gradients[0].layers)
    bytes_held = sum(part.tokens for part in gradients) * layers * budget.experts * 4 * (2 + SKETCHES)
    return max(1, -(-bytes_held // HELD))


class Search:
    """The passes of one method call."""

    def __init__(self, calibration: Calibration, budget: Budget, ranges: Groups, *, held: bool = False) -> None:
        self.started = time.perf_counter()
        self.budget, self.ranges, self.held = budget, ranges, held
        self.group_of = [group for group, (first, last) in enumerate(ranges) for _ in range(first, last + 1)]
        self.fit, self.judge = (_evaluator(calibration, part) for part in _divided(calibration))
        self.rules = RULES if self.fit.teacher is None else CURVATURE
        self.gradients = [LossGradients(self.fit), LossGradients(self.judge)]
        self.every = _every(self.gradients, budget)
        self.layer_tokens = 0
        self.evaluations: dict[str, Evaluation] = {}

    def run(self, rounds: int) -> MethodPlan:
        budget = self.budget
        everything = [tuple(range(budget.experts))] * len(self.ranges)
        fit, total = self.changes(None, everything, budget.k)
        made = {name: self.plan([part.best(rule) for part in fit]) for name, rule in self.rules.items()}
        name = self.chosen({name: self.judged(plan) for name, plan in made.items()})
        kept = [part.best(self.rules[name]) for part in total]
        how = name
        if rounds > 1:
            against = (everything, budget.k) if name in CURVATURE else None
            kept, further = self._again(name, kept, rounds, against)
            how += f", {further + 1} rounds" if further else ", the first round's plan"
        if total[0].all_sets is None and self.every > 1:
            how += f", of every {self.every}th token"
        return self.result(self.plan(kept), how)

    def result(self, plan: Plan, how: str) -> MethodPlan:
        """A plan, and what it took so far."""
        return MethodPlan(plan, self.layer_tokens, time.perf_counter() - self.started, how)

    def _again(
        self, name: str, kept: list[KeptSet], rounds: int, against: tuple[list[KeptSet], int] | None
    ) -> tuple[list[KeptSet], int]:
        """The same from derivatives under the plan so far, and how many such rounds bettered it.

        What is seen from the curvature alone goes on being a distance from the full layers (`against`), which a plan's
        own experts would be nearest to; what has a sign is a change of the plan's loss.
        """
        for further in range(rounds - 1):
            plan = self.plan(kept)
            _, total = self.changes(plan, *(against or (kept, self.budget.active)))
            changed = [part.best(self.rules[name]) for part in total]
            if self.judged(self.plan(changed)).loss >= self.judged(plan).loss:
                return kept, further
            kept = changed
        return kept, rounds - 1

    def changes(self, plan: Plan | None, now: list[KeptSet], k: int) -> tuple[list[Changes], list[Changes]]:
        """By group, of the examples that ways are made from, and of all: one pass forth and back.

        Args:
            plan: in force when derivatives are taken; None: the full model.
            now, k: what changes are from, as for `Sums`.
        """
        draws = torch.Generator().manual_seed(0)
        both = []
        for gradients in self.gradients:
            parts = [Changes(kept, k, self.budget, self.every, held=self.held) for kept in now]

            def observe(acts: LayerActivations, gradient: Tensor, parts: list[Changes] = parts) -> None:
                part = parts[self.group_of[acts.layer.index]]
                part.add(acts, products_of(acts, gradient, draws))
                part.slopes += float(gradient.norm(dim=-1, dtype=torch.float32).sum())
                part.tokens += len(gradient)

            gradients.run(observe, plan)
            both.append(parts)
            self.layer_tokens += cost_of(gradients)
        return both[0], [a + b for a, b in zip(*both)]

    def plan(self, kept: list[KeptSet]) -> Plan:
        """Of every group's experts."""
        return Plan(tuple(self.budget.pruned(kept[group]) for group in self.group_of))

    def judged(self, plan: Plan) -> Evaluation:
        """What the examples that ways are judged on give; no plan twice."""
        name = plan.fingerprint
        if name not in self.evaluations:
            self.evaluations[name] = self.judge.evaluate(plan)
            self.layer_tokens += self.evaluations[name].layer_tokens
        return self.evaluations[name]

    def chosen(self, judged: Mapping[str, Evaluation]) -> str:
        """The way of adding up of least loss among those that are better than the default for more than luck."""

        def better(name: str) -> bool:
            return paired_bootstrap(judged[name], judged[DEFAULT], level=LEVEL).high < 0

        return min((name for name in judged if name == DEFAULT or better(name)), key=lambda name: judged[name].loss)


def _divided(calibration: Calibration) -> tuple[list[Request], list[Request]]:
    """The requests of the first three quarters of the examples, and of the others."""
    examples = sorted({request.example for request in calibration.requests})
    if len(examples) < 2:
        raise MethodError(f"loss-aware pruning needs at least 2 calibration examples, got {len(examples)}")
    first_judged = examples[min(len(examples) - 1, max(1, round((1 - JUDGED) * len(examples))))]
    return (
        [request for request in calibration.requests if request.example < first_judged],
        [request for request in calibration.requests if request.example >= first_judged],
    )
