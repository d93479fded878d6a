"""NAEE: the kept experts that change the layer's output least (arXiv 2402.14800, section 3.2).

For every kept set S of size r the layer routes with the experts outside S at minus infinity; its error is the sum over
calibration batches of the Frobenius norm, not squared, of the difference between its output and the full layer's. All
C(n, r) errors come from one pass over all experts: with G the Gram matrix of a token's expert outputs and d the
difference of weights, the squared error of the token is d' G d.

Beyond `MOST_SETS` sets, the r experts of largest gated output norm, and those that a greedy elimination leaves, are
improved by the best swap until none helps. That comes with no guarantee.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.methods.base import Method, Wanted
from moeopt.methods.calibration import Seen
from moeopt.methods.statistics import Array, Statistic, gram
from moeopt.plan import LayerPlan

MOST_SETS = 20_000
BATCH = 8
"""Sequences a calibration batch, as in NAEE's code."""
AT_ONCE = 1 << 24
"""Numbers in memory at a time."""

Kept = tuple[int, ...]


def kept_sets(n: int, r: int) -> list[Kept]:
    """All sets of r out of n experts, in lexicographic order."""
    return list(itertools.combinations(range(n), r))


class SetErrors(Statistic):
    """The error of every kept set, C(n, r) of them.

    Args:
        n, k: of the layer.
        r: experts kept.
        active: experts that run per token in the pruned layer.
        batch: sequences a calibration batch.

    Attributes:
        sets: the kept sets.
    """

    outputs = "all"

    def __init__(self, n: int, k: int, *, r: int, active: int, batch: int = BATCH) -> None:
        self.sets, self.active = kept_sets(n, r), active
        self._masks = masks(self.sets, n)
        self._sums = Sums(batch)

    def add(self, seen: Seen, target: Tensor | None = None) -> None:
        self._sums.add(seen, squared_errors(seen, self._masks.to(seen.logits.device), self.active, target))

    @property
    def errors(self) -> Array:
        """Sum over calibration batches of the norm of the difference of outputs, (sets,)."""
        return self._sums.norms

    @property
    def best(self) -> Kept:
        """The set of least error."""
        return self.sets[int(self.errors.argmin())]


class TokenGrams(Statistic):
    """Every token's Gram matrix and routing, for choices too many to add up. Grows with tokens: 4 n (n + 1) bytes each.

    Args:
        n, k: of the layer.
        batch: sequences a calibration batch.
    """

    outputs = "all"
    by_layer = True

    def __init__(self, n: int, k: int, *, batch: int = BATCH) -> None:
        self.n, self.batch = n, batch
        self.norms = np.zeros(n)
        self._seen: list[tuple[Seen, Tensor, Tensor]] = []

    def add(self, seen: Seen, target: Tensor | None = None) -> None:
        grams, full = _problem(seen, target)
        norms = grams.diagonal(dim1=1, dim2=2)[:, : self.n].clamp_min(0).sqrt()
        self.norms += (seen.full_weights * norms).sum(0).double().cpu().numpy()
        self._seen.append((seen.without_states(), grams, full))

    @property
    def corrected(self) -> bool:
        """Whether the router corrects its choice of experts."""
        return any(seen.correction is not None for seen, *_ in self._seen)

    def errors(self, weights: Callable[[Seen], Tensor]) -> Array:
        """Errors, as `SetErrors.errors`, of choices given by their weights (tokens, choices, n): (choices,)."""
        sums = Sums(self.batch)
        for seen, grams, full in self._seen:
            sums.add(seen, _squares(weights(seen), grams, full))
        return sums.norms

    def of_sets(self, sets: list[Kept], active: int) -> Array:
        """Errors of some kept sets, (sets,)."""
        step = max(1, AT_ONCE // (self.n * max(len(grams) for _, grams, _ in self._seen)))
        parts = [masks(sets[first : first + step], self.n) for first in range(0, len(sets), step)]

        def weights(part: Tensor) -> Callable[[Seen], Tensor]:
            return lambda seen: seen.weights(part.to(seen.logits.device), active)

        return np.concatenate([self.errors(weights(part)) for part in parts])

    def fits(self) -> Array:
        """A_j = sum over X_j of g_j^2 G, (n, n, n), g being the layer's own weights."""
        found = np.zeros((self.n,) * 3)
        for seen, grams, _ in self._seen:
            squares = seen.full_weights.double() ** 2
            found += torch.einsum("tj,tab->jab", squares, grams[:, : self.n, : self.n].double()).cpu().numpy()
        return found


def best_set(tokens: TokenGrams, r: int, active: int) -> Kept:
    """The better of two descents by swaps: from the largest gated output norms, and from a greedy elimination."""
    by_norm = tuple(sorted(np.argsort(-tokens.norms, kind="stable")[:r].tolist()))
    kept = tuple(range(tokens.n))
    while len(kept) > r:
        smaller = [kept[:i] + kept[i + 1 :] for i in range(len(kept))]
        kept = smaller[int(tokens.of_sets(smaller, min(active, len(kept) - 1)).argmin())]
    return min((_descended(tokens, start, active) for start in (by_norm, kept)), key=lambda end: end[0])[1]


def _descended(tokens: TokenGrams, kept: Kept, active: int) -> tuple[float, Kept]:
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

    def add(self, seen: Seen, squares: Tensor) -> None:
        """`squares` is (tokens, choices)."""
        of = torch.div(seen.sequence, self.batch, rounding_mode="floor").to(squares.device)
        for number in of.unique().tolist():
            added = squares[of == number].sum(0, dtype=torch.float64).cpu().numpy()
            self._squares[number] = self._squares.get(number, 0.0) + added

    @property
    def norms(self) -> Array:
        """The sum over calibration batches of the norm, (choices,)."""
        return np.asarray(sum(np.sqrt(self._squares[number]) for number in sorted(self._squares)))


class Naee(Method):
    """Keeps the set of least error, layer by layer, each layer being given what it is given in the full model."""

    summary = "the kept set that changes the layer's output least (exact up to 20,000 sets)"

    def needs(self, wanted: Wanted) -> dict[str, Statistic]:
        n, r = wanted.experts, wanted.keep
        if comb(n, r) > MOST_SETS:
            return {"TokenGrams": TokenGrams(n, wanted.k)}
        return {f"SetErrors {r} {wanted.active}": SetErrors(n, wanted.k, r=r, active=wanted.active)}

    def layer(self, statistics: Mapping[str, Statistic], wanted: Wanted, rng: np.random.Generator) -> LayerPlan:
        found = next(iter(statistics.values()))
        if isinstance(found, SetErrors):
            return wanted.pruned(found.best)
        assert isinstance(found, TokenGrams)
        return wanted.pruned(best_set(found, wanted.keep, wanted.active))


class NaeeProgressive(Naee):
    """The same, each layer being given what the pruned earlier ones leave it; targets are the full model's."""

    summary = "naee, each layer after the earlier ones are pruned; targets of the full model"
    progressive = True


def masks(sets: list[Kept], n: int) -> Tensor:
    """bool (sets, n)."""
    found: NDArray[np.bool_] = np.zeros((len(sets), n), dtype=bool)
    for row, kept in zip(found, sets):
        row[list(kept)] = True
    return torch.from_numpy(found)


def squared_errors(seen: Seen, kept: Tensor, active: int, target: Tensor | None = None) -> Tensor:
    """Squared norm of the difference between the layer's output with only some experts and its own (or `target`).

    Args:
        seen: a batch.
        kept: sets, bool (sets, n).
        active: experts that run per token.
        target: (tokens, hidden), where it is not the layer's own output.

    Returns:
        float32 (tokens, sets).
    """
    grams, full = _problem(seen, target)
    step = max(1, AT_ONCE // grams[:, 0].numel())
    parts = (kept[first : first + step] for first in range(0, len(kept), step))
    return torch.cat([_squares(seen.weights(part, active), grams, full) for part in parts], dim=1)


def _problem(seen: Seen, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gram matrices (tokens, m, m), weights (tokens, m) of what is to be matched; m is n, or n + 1 with a target."""
    if target is None:
        return gram(seen.outputs), seen.full_weights
    vectors = torch.cat([seen.outputs, target[None].to(seen.outputs)])
    full = torch.zeros(len(target), len(vectors), device=target.device)
    full[:, -1] = 1
    return gram(vectors), full


def _squares(weights: Tensor, grams: Tensor, full: Tensor) -> Tensor:
    """d' G d of weights (tokens, choices, n): (tokens, choices)."""
    d = torch.nn.functional.pad(weights, (0, grams.shape[1] - weights.shape[-1])) - full[:, None]
    return ((d @ grams) * d).sum(-1).clamp_min(0)
