"""What kept sets of a layer's experts would change of a task's loss, added up over tokens (see `loss_aware`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Self

import numpy as np
import torch
from torch import Tensor

from moeopt.methods.base import Budget
from moeopt.methods.kept_sets import MOST_SETS, KeptSet, descended, eliminated, kept_sets, masks
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.naee import MOST_RANKED, by_rank
from moeopt.methods.output_errors import AT_ONCE
from moeopt.methods.statistics import Array
from moeopt.methods.toggling import Toggling

ELIMINATED = 16
"""Experts are ranked by dropping, of so many that are left, one at a time."""
SKETCHES = 8
"""Random directions a token that squared norms are estimated by; errors cancel over tokens."""


class Sums:
    """What sets of experts kept in one layer, or several that share a choice, would change of the loss.

    Args:
        sets: the sets, of the n experts.
        active: how many of a set run.
        now, k: experts that may be routed to in the plan at which derivatives are taken, and how many of them run.
        n: experts of a layer.

    Attributes:
        signed, absolute, squared: sums over tokens of d_t, |d_t| and d_t^2, float64 (sets,).
        output: the sum over tokens of |g_t| times the squared change of the output, estimated by sketches, (sets,).
    """

    def __init__(self, sets: Sequence[KeptSet], active: int, now: KeptSet, k: int, n: int) -> None:
        self.sets, self.active, self.now, self.k, self.n = sets, active, now, k, n
        self.signed, self.absolute, self.squared, self.output = (np.zeros(len(sets)) for _ in range(4))
        self._masks, self._now = masks(sets, n), masks([now], n)

    def add(self, acts: LayerActivations, products: Tensor) -> None:
        """A batch: what the layer saw, and `products_of` that, with or without sketches."""
        before = _values(acts, products, self._now, self.k)
        step = max(1, AT_ONCE // products.numel())
        for first in range(0, len(self.sets), step):
            part = slice(first, first + step)
            change = (self.values(acts, products, part) - before).double()
            along = change[..., 0]
            self.signed[part] += along.sum(0).cpu().numpy()
            self.absolute[part] += along.abs().sum(0).cpu().numpy()
            self.squared[part] += (along**2).sum(0).cpu().numpy()
            self.output[part] += (change[..., 1:] ** 2).sum((0, 2)).cpu().numpy()

    def values(self, acts: LayerActivations, products: Tensor, part: slice) -> Tensor:
        """sum_e w_e(S) <., f_e> of some of the sets, by each product: float32 (tokens, sets, products)."""
        return _values(acts, products, self._masks[part], self.active)

    def __add__(self, other: Self) -> Self:
        total = copy(self)
        for name in ("signed", "absolute", "squared", "output"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total


class Toggles(Sums):
    """`Sums` of one set without each of its experts, or with each of the others.

    What a token picks of such a set differs from what it picks of the whole by one expert: no set is ranked anew.

    Args:
        base: the set.
        experts: those taken out, all of the set, or put in, none of it.
        active, now, k, n: as for `Sums`.
    """

    def __init__(self, base: KeptSet, experts: KeptSet, active: int, now: KeptSet, k: int, n: int) -> None:
        sets = [tuple(sorted({*base} ^ {e})) for e in experts]
        # What a set of which fewer remain than run would do is that of all that remain.
        super().__init__(sets, min(active, len(sets[0])), now, k, n)
        self.base, self.experts = base, torch.tensor(experts)

    def values(self, acts: LayerActivations, products: Tensor, part: slice) -> Tensor:
        # an order of choice that changes with the set, as probabilities are over it, or groups are chosen by it
        if (acts.rule.score != "sigmoid" and acts.correction is not None) or acts.rule.groups > 1:
            return super().values(acts, products, part)
        experts = self.experts[part].to(products.device)
        toggling = Toggling(acts, self.base, experts, self.active)
        picks, picked = toggling.picks, toggling.scores
        parts = picked[..., None] * products.gather(1, picks[..., None].expand(-1, -1, products.shape[2]))
        # Scores and products of the picks but each one: sums, as differences would cancel where one outweighs all.
        others = 1 - torch.eye(picks.shape[1], device=products.device)
        totals, sums = picked @ others, torch.einsum("tim,ij->tjm", parts, others)
        total = toggling.summed(picked.sum(1, keepdim=True), totals, toggling.toggled) * toggling.share
        added = toggling.toggled[..., None] * products[:, experts]
        summed = toggling.summed(parts.sum(1, keepdim=True), sums, added) * toggling.share[..., None]
        return summed * acts.factor(total)[..., None]


class Changes:
    """`Sums` of kept sets of one layer, or several that share a choice.

    Up to `MOST_SETS` sets of `budget.keep` experts are all added up, batch by batch; where there are more, the batches'
    products are held, and sets are judged as they are asked for.

    Args:
        now, k: as for `Sums`.
        wanted: what is asked.
        every: of the tokens that are held, each first of so many.
        held: whether products are held however few sets there are.

    Attributes:
        slopes, tokens: what their user adds up beside: the sum of |g_t|, and how many tokens there were.
    """

    def __init__(self, now: KeptSet, k: int, budget: Budget, every: int = 1, *, held: bool = False) -> None:
        self.now, self.k, self.budget, self.every = now, k, budget, every
        self.slopes, self.tokens = 0.0, 0
        self._held: list[tuple[LayerActivations, Tensor]] = []
        n, few = budget.experts, budget.sets <= MOST_SETS and not held
        sets = kept_sets(n, budget.keep, budget.router_groups) if few else []
        self.all_sets = Sums(sets, budget.active, now, k, n) if few else None

    def add(self, acts: LayerActivations, products: Tensor) -> None:
        """A batch: what the layer saw, and `products_of` that."""
        if self.all_sets is not None:
            self.all_sets.add(acts, products)
        else:
            self._held.append((acts.without_states(slice(None, None, self.every)), products[:: self.every].clone()))

    def __add__(self, other: Self) -> Self:
        total = copy(self)
        total._held = self._held + other._held
        total.slopes, total.tokens = self.slopes + other.slopes, self.tokens + other.tokens
        if self.all_sets is not None and other.all_sets is not None:
            total.all_sets = self.all_sets + other.all_sets
        return total

    @property
    def slope(self) -> float:
        """The mean of |g_t|."""
        return self.slopes / self.tokens

    def of_sets(self, sets: Sequence[KeptSet]) -> Sums:
        """Sums of any sets of experts, where products are held."""
        return self._summed(Sums(sets, self.budget.active, self.now, self.k, self.budget.experts))

    def toggled(self, base: KeptSet, experts: KeptSet) -> Sums:
        """Sums of a set without each of its experts, or with each of others, where products are held."""
        return self._summed(Toggles(base, experts, self.budget.active, self.now, self.k, self.budget.experts))

    def _summed(self, sums: Sums) -> Sums:
        for acts, products in self._held:
            sums.add(acts, products)
        return sums

    def order(self, rule: Rule) -> list[int]:
        """All experts, best first: what is dropped from the worst on changes least, where products are held.

        Of `ELIMINATED` experts that are left the one that changes least is dropped at a time, and what the others would
        change is taken anew.
        """
        kept, dropped = self.now, list[int]()
        while len(kept) > 1:
            scores = rule(self.toggled(kept, kept))
            dropped += [kept[i] for i in np.argsort(scores, kind="stable")[: max(1, len(kept) // ELIMINATED)]]
            kept = tuple(e for e in kept if e not in dropped)
        return [*kept, *reversed(dropped)]

    def best(self, rule: Rule) -> KeptSet:
        """The kept set of least change; of sets too many to add up, one that no swap tried betters."""
        if self.all_sets is not None:
            return self.all_sets.sets[int(rule(self.all_sets).argmin())]

        kept = eliminated(self.now, self.budget, lambda base, experts: rule(self.toggled(base, experts)))
        return self.swapped(kept, rule)

    def swapped(self, kept: KeptSet, rule: Rule) -> KeptSet:
        """A set that no swap tried betters, from this one on, where products are held."""

        def of_sets(sets: list[KeptSet]) -> Array:
            return rule(self.of_sets(sets))

        def toggled(base: KeptSet, experts: KeptSet) -> Array:
            return rule(self.toggled(base, experts))

        return descended(kept, self.budget, of_sets, toggled)[1]


Rule = Callable[[Sums], Array]
CURVATURE: dict[str, Rule] = {
    "absolute": lambda sums: sums.absolute,
    "squared": lambda sums: sums.squared,
    "output": lambda sums: sums.output,
}
RULES: dict[str, Rule] = {
    "signed": lambda sums: sums.signed,
    **CURVATURE,
    **{f"gauss_newton {c}": lambda sums, c=c: sums.signed + c / 2 * sums.squared for c in (1, 3, 10)},  # type: ignore[misc]
}
"""From sums to a score a set, of which the least is kept."""
DEFAULT = "output"


def products_of(acts: LayerActivations, gradient: Tensor, draws: torch.Generator | None = None) -> Tensor:
    """<g_t, f_e(x_t)> of every expert, from dL/dy (tokens, hidden): float32 (tokens, n, 1).

    With `draws`, of the CPU, (tokens, n, 1 + `SKETCHES`): then the products of sqrt |g_t| f_e(x_t) with so many random
    directions, the same for all experts of a token, such that sums of their squares are, in the mean, the squared norm.
    """
    slopes = gradient.float()
    if draws is None:
        return torch.stack([_output(acts, e) * slopes for e in range(acts.layer.n)], dim=1).sum(-1, keepdim=True)
    # Signs differ from token to token, so that errors of the estimate cancel over tokens, too.
    signs = (torch.randint(2, slopes.shape, generator=draws) * 2 - 1).to(slopes)
    directions = torch.randn(slopes.shape[1], SKETCHES, generator=draws).to(slopes) / SKETCHES**0.5
    signs *= slopes.norm(dim=-1, keepdim=True).sqrt()

    def products(output: Tensor) -> Tensor:
        return torch.cat([(output * slopes).sum(-1, keepdim=True), (output * signs) @ directions], dim=-1)

    return torch.stack([products(_output(acts, e)) for e in range(acts.layer.n)], dim=1)


def _output(acts: LayerActivations, expert: int) -> Tensor:
    return acts.output(expert, slice(None)).float()


def _values(acts: LayerActivations, products: Tensor, kept: Tensor, k: int) -> Tensor:
    """`Sums.values` of sets, bool (sets, n)."""

    def of_picks(index: Tensor, weights: Tensor) -> Tensor:
        picked = products.gather(1, index.flatten(1)[..., None].expand(-1, -1, products.shape[2]))
        return (weights[..., None] * picked.view(*index.shape, products.shape[2])).sum(-2)

    kept = kept.to(products.device)
    if len(kept) > acts.layer.n and acts.layer.n <= MOST_RANKED and not acts.depends_on_set:
        return by_rank(acts.layer.n, k).of_sets(acts, kept, of_picks)
    return of_picks(*acts.chosen(kept, k))
