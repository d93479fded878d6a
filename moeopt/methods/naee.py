"""NAEE: the kept experts that change the layer's output least (arXiv 2402.14800, section 3.2).

For every kept set S of size r the layer routes with the experts outside S at minus infinity; its error is the sum over
calibration batches of the Frobenius norm, not squared, of the difference between its output and the full layer's. All
C(n, r) errors come from one pass over all experts: with G the Gram matrix of a token's expert outputs and d the
difference of weights, the squared error of the token is d' G d. Layers that share a choice add up their squares.

Beyond `MOST_SETS` sets, the r experts of largest gated output norm, and those that a greedy elimination leaves, are
improved by swaps until none of those that promise most helps (`token_grams`). That comes with no guarantee.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from moeopt.methods.base import Budget, Method
from moeopt.methods.kept_sets import MOST_SETS, KeptSet, kept_sets, masks
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.output_errors import AT_ONCE, BATCH, Problem, Sums
from moeopt.methods.statistics import Array, Statistic
from moeopt.methods.token_grams import TokenGrams
from moeopt.plan import LayerPlan

MOST_RANKED = 20
"""Up to so many experts, which ones a token would pick of a set is looked up (see `ByRank`)."""


class SetErrors(Statistic):
    """The error of every kept set, C(n, r) of them.

    Args:
        n: experts of the layer.
        r: experts kept.
        active: experts that run per token in the pruned layer.
        groups: in how many groups of consecutive experts tokens choose first, of which as many are kept.
        batch: sequences a calibration batch.

    Attributes:
        sets: the kept sets.
    """

    outputs = "all"

    def __init__(self, n: int, *, r: int, active: int, groups: int = 1, batch: int = BATCH) -> None:
        self.sets, self.active = kept_sets(n, r, groups), active
        self._masks = masks(self.sets, n)
        self._by_rank = by_rank(n, active) if n <= MOST_RANKED else None
        self._sums = Sums(batch)

    def add(self, acts: LayerActivations) -> None:
        problem, kept = Problem.to_match(acts), self._masks.to(acts.logits.device)
        if self._by_rank is not None and not acts.depends_on_set:
            self._sums.add(acts, self._by_rank.of_sets(acts, kept, problem.squared_errors))
            return
        step = max(1, AT_ONCE // problem.grams[:, 0].numel())
        parts = (kept[first : first + step] for first in range(0, len(kept), step))
        self._sums.add(acts, torch.cat([problem.squared_errors(*acts.chosen(p, self.active)) for p in parts], dim=1))

    @property
    def errors(self) -> Array:
        """Sum over calibration batches of the norm of the difference of outputs, (sets,)."""
        return self._sums.norms

    @property
    def best(self) -> KeptSet:
        """The set of least error."""
        return self.sets[int(self.errors.argmin())]


class Naee(Method):
    """Keeps the set of least error, layer by layer, each layer being given what it is given in the full model."""

    summary = "the kept set that changes the layer's output least (exact up to 20,000 sets)"

    def needs(self, budget: Budget) -> dict[str, Statistic]:
        n, r, groups = budget.experts, budget.keep, budget.router_groups
        if budget.sets > MOST_SETS:
            return {"TokenGrams": TokenGrams(n)}
        return {f"SetErrors {r} {budget.active}": SetErrors(n, r=r, active=budget.active, groups=groups)}

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        (errors,) = statistics.values()
        if isinstance(errors, SetErrors):
            return budget.pruned(errors.best)
        assert isinstance(errors, TokenGrams)
        return budget.pruned(errors.best_set(budget))


class NaeeProgressive(Naee):
    """The same, each layer being given what the pruned earlier ones leave it; targets are the full model's."""

    summary = "naee, each layer after the earlier ones are pruned; targets of the full model"
    progressive = alone = targets = True


@cache
def by_rank(n: int, k: int) -> ByRank:
    """The table for n experts, k of which run; made once."""
    return ByRank(n, k)


class ByRank:
    """Which experts a token would pick of a set, by table: where its k best among the set stand in its own ranking.

    With experts ranked by the token's scores, a set is a number whose bit i says whether the i-th best is in it. For
    all tokens and sets these numbers are one matrix product, and the errors of the C(n, k) possible picks of a token
    are computed once, not once a set.

    Args:
        n: experts, at most `MOST_RANKED`.
        k: how many run.
    """

    def __init__(self, n: int, k: int) -> None:
        self.picks = torch.tensor(list(itertools.combinations(range(n), k)))
        number = {pick: i for i, pick in enumerate(itertools.combinations(range(n), k))}
        self.table = torch.zeros(1 << n, dtype=torch.int64)
        for mask in range(1 << n):
            best = tuple(itertools.islice((i for i in range(n) if mask >> i & 1), k))
            self.table[mask] = number.get(best, 0)

    def of_sets(self, acts: LayerActivations, kept: Tensor, of_picks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `of_picks` gives for the experts that each token would pick of each set: (tokens, sets).

        Args:
            acts: a batch of a layer whose weights do not depend on the set (`LayerActivations.depends_on_set`).
            kept: sets, bool (sets, n).
            of_picks: numbers and weights of experts that run, (tokens, choices, k) -> (tokens, choices, ...).
        """
        device = acts.logits.device
        choice = acts.probabilities if acts.correction is None else acts.probabilities + acts.correction
        order = choice.argsort(dim=1, descending=True)
        index = order[:, self.picks.to(device)]
        scores = acts.probabilities.gather(1, index.flatten(1)).view(index.shape)
        values = of_picks(index, acts.gated(scores))
        # float64 is exact below 2^53, and a matrix product of integers would not run on a GPU
        bits = torch.zeros_like(acts.probabilities, dtype=torch.float64)
        bits.scatter_(1, order, (2.0 ** torch.arange(order.shape[1], device=device)).double().expand_as(order))
        numbers = self.table.to(device)[(bits @ kept.T.double()).long()]
        return values[torch.arange(len(values), device=device)[:, None], numbers]
