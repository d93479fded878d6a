"""NAEE: the kept experts that change the layer's output least (arXiv 2402.14800, section 3.2).

For every kept set S of size r the layer routes with the experts outside S at minus infinity; its error is the sum over
calibration batches of the Frobenius norm, not squared, of the difference between its output and the full layer's. All
C(n, r) errors come from one pass over all experts: with G the Gram matrix of a token's expert outputs and d the
difference of weights, the squared error of the token is d' G d. Layers that share a choice add up their squares.

Beyond `MOST_SETS` sets, the r experts of largest gated output norm, and those that a greedy elimination leaves, are
improved by the best swap until none helps. That comes with no guarantee.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.methods.base import Budget, Method
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.statistics import Array, Statistic, gram
from moeopt.plan import LayerPlan

MOST_SETS = 20_000
BATCH = 8
"""Sequences a calibration batch, as in NAEE's code."""
MOST_RANKED = 20
"""Up to so many experts, which ones a token would pick of a set is looked up (see `ByRank`)."""
AT_ONCE = 1 << 24
"""Numbers in memory at a time."""

KeptSet = tuple[int, ...]


def kept_sets(n: int, r: int) -> list[KeptSet]:
    """All sets of r out of n experts, in lexicographic order."""
    return list(itertools.combinations(range(n), r))


class SetErrors(Statistic):
    """The error of every kept set, C(n, r) of them.

    Args:
        n: experts of the layer.
        r: experts kept.
        active: experts that run per token in the pruned layer.
        batch: sequences a calibration batch.

    Attributes:
        sets: the kept sets.
    """

    outputs = "all"

    def __init__(self, n: int, *, r: int, active: int, batch: int = BATCH) -> None:
        self.sets, self.active = kept_sets(n, r), active
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


class TokenGrams(Statistic):
    """Every token's Gram matrix and routing, for choices too many to add up. Grows with tokens: 4 n (n + 1) bytes each.

    Args:
        n: experts of the layer.
        batch: sequences a calibration batch.
    """

    outputs = "all"
    by_layer = True

    def __init__(self, n: int, *, batch: int = BATCH) -> None:
        self.n, self.batch = n, batch
        self.norms = np.zeros(n)
        self._problems: list[Problem] = []

    def add(self, acts: LayerActivations) -> None:
        problem = Problem.to_match(acts)
        norms = problem.grams.diagonal(dim1=1, dim2=2)[:, : self.n].clamp_min(0).sqrt()
        self.norms += (acts.full_weights * norms).sum(0).double().cpu().numpy()
        self._problems.append(problem)

    def errors(self, choose: Callable[[LayerActivations], tuple[Tensor, Tensor]]) -> Array:
        """Errors, as `SetErrors.errors`, of choices given as `LayerActivations.chosen` gives them: (choices,)."""
        sums = Sums(self.batch)
        for problem in self._problems:
            sums.add(problem.acts, problem.squared_errors(*choose(problem.acts)))
        return sums.norms

    def of_sets(self, sets: list[KeptSet], active: int) -> Array:
        """Errors of some kept sets, (sets,)."""
        step = max(1, AT_ONCE // (self.n * max(len(problem.grams) for problem in self._problems)))
        parts = [masks(sets[first : first + step], self.n) for first in range(0, len(sets), step)]

        def choose(part: Tensor) -> Callable[[LayerActivations], tuple[Tensor, Tensor]]:
            return lambda acts: acts.chosen(part.to(acts.logits.device), active)

        return np.concatenate([self.errors(choose(part)) for part in parts])

    def fits(self) -> Array:
        """A_j = sum over X_j of g_j^2 G, (n, n, n), g being the layer's own weights."""
        fits = np.zeros((self.n,) * 3)
        for problem in self._problems:
            squares = problem.acts.full_weights.double() ** 2
            grams = problem.grams[:, : self.n, : self.n].double()
            fits += torch.einsum("tj,tab->jab", squares, grams).cpu().numpy()
        return fits


def best_set(tokens: TokenGrams, r: int, active: int) -> KeptSet:
    """The better of two descents by swaps: from the largest gated output norms, and from a greedy elimination."""
    by_norm = tuple(sorted(np.argsort(-tokens.norms, kind="stable")[:r].tolist()))
    kept = tuple(range(tokens.n))
    while len(kept) > r:
        smaller = [kept[:i] + kept[i + 1 :] for i in range(len(kept))]
        kept = smaller[int(tokens.of_sets(smaller, active).argmin())]
    return min((_descended(tokens, start, active) for start in (by_norm, kept)), key=lambda end: end[0])[1]


def _descended(tokens: TokenGrams, kept: KeptSet, active: int) -> tuple[float, KeptSet]:
    best = float(tokens.of_sets([kept], active)[0])
    while True:
        others = [e for e in range(tokens.n) if e not in kept]
        swapped = [tuple(sorted({*kept} - {a} | {b})) for a in kept for b in others]
        errors = tokens.of_sets(swapped, active) if swapped else np.zeros(0)
        if not errors.size or float(errors.min()) >= best:
            return best, kept
        best, kept = float(errors.min()), swapped[int(errors.argmin())]


class Sums:
    """Adds up squared errors by calibration batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._squares: dict[int, Array] = {}

    def add(self, acts: LayerActivations, squares: Tensor) -> None:
        """`squares` is (tokens, choices)."""
        batches = torch.div(acts.sequence, self.batch, rounding_mode="floor").to(squares.device)
        for number in batches.unique().tolist():
            added = squares[batches == number].sum(0, dtype=torch.float64).cpu().numpy()
            self._squares[number] = self._squares.get(number, 0.0) + added

    @property
    def norms(self) -> Array:
        """The sum over calibration batches of the norm, (choices,)."""
        return np.asarray(sum(np.sqrt(self._squares[number]) for number in sorted(self._squares)))


class Naee(Method):
    """Keeps the set of least error, layer by layer, each layer being given what it is given in the full model."""

    summary = "the kept set that changes the layer's output least (exact up to 20,000 sets)"

    def needs(self, budget: Budget) -> dict[str, Statistic]:
        n, r = budget.experts, budget.keep
        if comb(n, r) > MOST_SETS:
            return {"TokenGrams": TokenGrams(n)}
        return {f"SetErrors {r} {budget.active}": SetErrors(n, r=r, active=budget.active)}

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        (errors,) = statistics.values()
        if isinstance(errors, SetErrors):
            return budget.pruned(errors.best)
        assert isinstance(errors, TokenGrams)
        return budget.pruned(best_set(errors, budget.keep, budget.active))


class NaeeProgressive(Naee):
    """The same, each layer being given what the pruned earlier ones leave it; targets are the full model's."""

    summary = "naee, each layer after the earlier ones are pruned; targets of the full model"
    progressive = alone = targets = True


def masks(sets: Sequence[KeptSet], n: int) -> Tensor:
    """bool (sets, n)."""
    rows: NDArray[np.bool_] = np.zeros((len(sets), n), dtype=bool)
    for row, kept in zip(rows, sets):
        row[list(kept)] = True
    return torch.from_numpy(rows)


@dataclass(frozen=True, eq=False)
class Problem:
    """What a layer's output is to be matched with, for every token of a batch.

    Args:
        acts: the batch, without its hidden states.
        grams: inner products of the experts' outputs, and of the target's where it is not the layer's own output,
            float32 (tokens, m, m), m being n, or n + 1.
        cross: inner products of each expert's output with what is to be matched, float64 (tokens, n).
        norms: squared norm of what is to be matched, float64 (tokens,).
    """

    acts: LayerActivations
    grams: Tensor
    cross: Tensor
    norms: Tensor

    @classmethod
    def to_match(cls, acts: LayerActivations) -> Problem:
        """The layer's own output, or `LayerActivations.target`, is to be matched."""
        if acts.target is None:
            grams, weights = gram(acts.outputs), acts.full_weights.double()
        else:
            grams = gram(torch.cat([acts.outputs, acts.target[None].to(acts.outputs)]))
            weights = torch.zeros(grams.shape[:2], dtype=torch.float64, device=grams.device)
            weights[:, -1] = 1
        cross = (grams.double() @ weights[..., None])[..., 0]
        return cls(acts.without_states(), grams, cross[:, : acts.layer.n], (cross * weights).sum(-1))

    def squared_errors(self, index: Tensor, weights: Tensor) -> Tensor:
        """Squared norms of the difference when experts `index` run with `weights`, both (tokens, choices, k).

        Returns:
            float64 (tokens, choices).
        """
        tokens, choices, k = index.shape
        weights, flat = weights.double(), index.reshape(tokens, -1)
        # |sum_e w_e f_e - y|^2 = |y|^2 - 2 sum_e w_e <f_e, y> + sum_ef w_e w_f <f_e, f_f>, in float64: the three terms
        # nearly cancel where the error is small
        linear = (weights * self.cross.gather(1, flat).view_as(weights)).sum(-1)
        pairs = index[..., :, None] * self.grams.shape[1] + index[..., None, :]
        inner = self.grams.flatten(1).gather(1, pairs.reshape(tokens, -1)).view(tokens, choices, k, k).double()
        quadratic = (weights[..., :, None] * inner * weights[..., None, :]).sum((-1, -2))
        return (self.norms[:, None] - 2 * linear + quadratic).clamp_min(0)


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
