"""Every token's Gram matrix of its experts' outputs, for choices of experts too many to add up one by one (`naee`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moeopt.methods.base import Budget, CalibrationSize
from moeopt.methods.kept_sets import Array, KeptSet, descended, eliminated, masks
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.output_errors import AT_ONCE, BATCH, Problem, Sums
from moeopt.methods.statistics import Statistic
from moeopt.methods.toggling import Toggling

MOST_BYTES = 1 << 30
"""Bytes of Gram matrices that are held of a layer; beyond, those of every so many tokens."""

Choose = Callable[[LayerActivations], tuple[Tensor, Tensor]]


class TokenGrams(Statistic):
    """Every token's Gram matrix and routing: 4 n (n + 1) bytes a token, up to `MOST_BYTES`.

    Args:
        n: experts of the layer.
        batch: sequences a calibration batch.

    Attributes:
        norms: sum over tokens of g_j ||f_j||, (n,).
        every: the first of every so many tokens of a batch is held.
    """

    outputs = "all"
    by_layer = True

    def __init__(self, n: int, *, batch: int = BATCH) -> None:
        self.n, self.batch = n, batch
        self.norms = np.zeros(n)
        self.every = 1
        self._problems: list[Problem] = []

    def add(self, acts: LayerActivations) -> None:
        problem = Problem.to_match(acts)
        norms = problem.grams.diagonal(dim1=1, dim2=2)[:, : self.n].clamp_min(0).sqrt()
        self.norms += (acts.full_weights * norms).sum(0).double().cpu().numpy()
        self._problems.append(problem.part(slice(None, None, self.every)))
        while len(self._problems) > 1 and sum(held.grams.nbytes for held in self._problems) > MOST_BYTES:
            self.every *= 2
            self._problems = [held.part(slice(None, None, 2)) for held in self._problems]
            warnings.warn(
                f"Gram matrices of {self.n} experts' outputs for all tokens would take more than {MOST_BYTES >> 20} "
                f"MiB a layer: those of one token in {self.every} are taken",
                stacklevel=2,
            )

    def bytes_held(self, size: CalibrationSize) -> int:
        return min(MOST_BYTES, 4 * self.n * (self.n + 1) * size.tokens)

    def errors(self, choose: Choose) -> Array:
        """Errors, as `SetErrors.errors`, of choices given as `LayerActivations.chosen` gives them: (choices,)."""
        sums = Sums(self.batch)
        for problem in self._problems:
            sums.add(problem.acts, problem.squared_errors(*choose(problem.acts)))
        return sums.norms

    def of_sets(self, sets: list[KeptSet], active: int) -> Array:
        """Errors of some kept sets, (sets,)."""
        step = max(1, AT_ONCE // (self.n * max(len(problem.grams) for problem in self._problems)))
        parts = [masks(sets[first : first + step], self.n) for first in range(0, len(sets), step)]

        def choose(part: Tensor, acts: LayerActivations) -> tuple[Tensor, Tensor]:
            return acts.chosen(part.to(acts.logits.device), active)

        return np.concatenate([self.errors(partial(choose, part)) for part in parts])

    def toggled(self, base: KeptSet, experts: KeptSet, active: int) -> Array:
        """Errors of a set without each of its experts, or with each of others, (experts,).

        No set is ranked anew: what a token picks differs by one expert from what it picks of `base`. Where an order of
        choice depends on the set (a softmax that is corrected), it is taken to be that of `base`.
        """
        if self._problems[0].acts.rule.groups > 1:  # by what is left of them, tokens choose groups anew
            return self.of_sets([tuple(sorted({*base} ^ {e})) for e in experts], active)
        sums = Sums(self.batch)
        for problem in self._problems:
            step = max(1, AT_ONCE // (len(experts) * (active + 1)))
            parts = [problem.part(slice(i, i + step)) for i in range(0, len(problem.grams), step)]
            sums.add(problem.acts, torch.cat([_toggled(part, base, experts, active) for part in parts]))
        return sums.norms

    def fits(self) -> Array:
        """A_j = sum over X_j of g_j^2 G, (n, n, n), g being the layer's own weights."""
        fits = np.zeros((self.n,) * 3)
        for problem in self._problems:
            squares = problem.acts.full_weights.double() ** 2
            grams = problem.grams[:, : self.n, : self.n].double()
            fits += torch.einsum("tj,tab->jab", squares, grams).cpu().numpy()
        return fits

    def best_set(self, budget: Budget) -> KeptSet:
        """The better of two descents by swaps: from the largest gated output norms, and from a greedy elimination."""

        def of_sets(sets: list[KeptSet]) -> Array:
            return self.of_sets(sets, budget.active)

        def toggled(base: KeptSet, experts: KeptSet) -> Array:
            return self.toggled(base, experts, budget.active)

        starts = tuple(budget.best(self.norms)), eliminated(tuple(range(self.n)), budget, toggled)
        return min((descended(start, budget, of_sets, toggled) for start in starts), key=lambda end: end[0])[1]


def _toggled(problem: Problem, base: KeptSet, experts: KeptSet, active: int) -> Tensor:
    """Squared errors of every token, float64 (tokens, experts), as `TokenGrams.toggled`."""
    grams, toggled = problem.grams, torch.tensor(experts, device=problem.grams.device)
    toggling = Toggling(problem.acts, base, toggled, active, torch.float64)
    picks, s, entering = toggling.picks, toggling.scores, toggling.toggled

    def inner(rows: Tensor, columns: Tensor) -> Tensor:
        """<f_row, f_column> of every token, (tokens, rows, columns); its arguments are (tokens, ...) or (...)."""
        pairs = rows[..., :, None] * grams.shape[1] + columns[..., None, :]
        return grams.flatten(1).gather(1, pairs.flatten(1)).view(pairs.shape).double()

    cross, norms = problem.cross, grams.diagonal(dim1=1, dim2=2).double()
    linear, among = s * cross.gather(1, picks), inner(picks, picks)
    along = (among @ s[..., None])[..., 0]
    quadratic = (s * along).sum(1, keepdim=True)
    beside = torch.zeros_like(entering)
    if not toggling.takes_out:  # else nothing comes to stand beside the picks that stay
        beside = (inner(toggled, toggling.stay) @ s[:, : toggling.stay.shape[1], None])[..., 0]
    # Over the picks, and over those but each one: sums of s, of s <f, y>, and the squared norm of the sum of s f.
    sums = [
        (s.sum(1, keepdim=True), s.sum(1, keepdim=True) - s, entering),
        (linear.sum(1, keepdim=True), linear.sum(1, keepdim=True) - linear, entering * cross[:, toggled]),
        (
            quadratic,
            quadratic - 2 * s * along + s**2 * among.diagonal(dim1=1, dim2=2),
            2 * entering * beside + entering**2 * norms[:, toggled],
        ),
    ]
    total, linear, quadratic = (toggling.summed(*parts) for parts in sums)
    weight = toggling.share * problem.acts.factor(total * toggling.share)
    return (problem.norms[:, None] - 2 * weight * linear + weight**2 * quadratic).clamp_min(0)
