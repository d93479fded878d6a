"""One layer of a refit: its down projections by ridge regression, as the top of `refitting` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeopt.errors import MethodError
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.neuron_activations import NeuronActivations
from moeopt.methods.ridge import Gram, Products, Rows
from moeopt.models import MoELayer
from moeopt.models.merging import DOWN, MergedCache
from moeopt.plan import DownProjections, LayerPlan

SWEEPS = 2
"""How often experts that are fitted a few at a time take their turn."""


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer.

    Args:
        ridge: lam in means of A'A's diagonal, of the last experts where they were fitted a few at a time; None: the
            layer keeps its weights.
        before, after: squared distance of the hidden states behind it from the full model's, on the sequences that the
            ridge was chosen on, as a share of the squares of what the full model's experts give there; the earlier
            layers are refitted in both, and have seen these sequences.
        factor: what the layer's output is multiplied with where it is added to the hidden states; None: it is not
            merely added, such as where a norm follows it, so that the layer was fitted to what the full model's own
            layer gives.
    """

    ridge: float | None
    before: float
    after: float
    factor: float | None = 1.0


class LayerFitting:
    """One layer of the small model, what enters it, and how far what leaves it is from the full model's.

    Attributes:
        runs: how often the experts ran for A.

    Args:
        layer, part: the layer, and what the plan makes of it.
        batches: what it saw under the plan.
        gaps: for each batch, what its experts should give beyond what they do, float32 (tokens, hidden).
        held: for each batch, which tokens are held out, bool (tokens,).
        given: the squares of what the full model's experts give for these.
    """

    def __init__(
        self,
        layer: MoELayer,
        part: LayerPlan,
        batches: list[LayerActivations],
        gaps: list[Tensor],
        held: list[Tensor],
        given: float,
    ) -> None:
        self.layer, self.part, self.batches, self.gaps, self.held, self.given = layer, part, batches, gaps, held, given
        self.weights = [self._weights(acts) for acts in batches]
        self.pairs = max(1, sum(int((weights != 0).sum()) for weights in self.weights))
        self.tensors = MergedCache().tensors(layer.experts, part)
        self.activations = NeuronActivations(layer, self.tensors)
        self.hidden, self.inner = self.activations.form.hidden, self.activations.form.inner
        self.runs = 0.0

    def _weights(self, acts: LayerActivations) -> Tensor:
        """What each of the r experts weighs for each token, float32 (tokens, r)."""
        r, n, index = self.part.kept_experts, self.part.experts, acts.index
        if not self.part.makes_experts:
            index = torch.tensor(self.part.places, device=index.device)[index]
        weights = torch.zeros(len(index), n, device=index.device).scatter_add_(1, index, acts.gates.float())
        return weights[:, :r].clone()  # what novices give is no expert's

    def run(self, ridges: Sequence[float], rank: int | None, columns: int) -> tuple[LayerPlan, LayerFit]:
        """The layer with fitted weights, or as it is."""
        r, at_once = self.part.kept_experts, max(1, columns // self.inner)
        groups = [range(first, min(first + at_once, r)) for first in range(0, r, at_once)]
        before = self._held_out()
        fits = [torch.zeros(len(group) * self.inner, self.hidden, device=self.gaps[0].device) for group in groups]
        chosen = [ridges[0]] * len(groups)
        single = len(groups) == 1
        for _ in range(1 if single else SWEEPS):
            for g, group in enumerate(groups):
                fitted, held = self._products(group, fits[g])
                chosen[g], best, left = self._chosen(fitted, held, ridges, rank, group)
                if not single:
                    self._take(group, best - fits[g])
                fits[g] = best
        after = left if single else self._held_out()
        if not after < before:
            share = before / self.given if self.given else 0.0
            return self.part, LayerFit(None, share, share)
        for g, group in enumerate(groups):  # once more, with the sequences that were held out
            if not single:
                fitted, held = self._products(group, fits[g])
            new = self._solved(fitted.joined(held), chosen[g], rank, group)
            if g + 1 < len(groups):  # what the next ones are fitted to
                self._take(group, new - fits[g])
            fits[g] = new
        change = torch.cat(fits).view(r, self.inner, self.hidden).transpose(1, 2)
        fit = LayerFit(chosen[-1], before / self.given, after / self.given)
        return replace(self.part, down=self._projections(change, rank)), fit

    def _chosen(
        self, fitted: Products, held: Products, ridges: Sequence[float], rank: int | None, group: range
    ) -> tuple[float, Tensor, float]:
        """The ridge that leaves least on what is held out, its solution, and what it leaves.

        What is left is taken to fall and then rise with the ridge: the way down from the middle one ends at the least.
        """
        ridges = sorted(ridges)

        def solved(i: int) -> tuple[float, int, Tensor]:
            d = self._solved(fitted, ridges[i], rank, group)
            return held.left(d), i, d

        best = solved(len(ridges) // 2)
        for step in (-1, 1):
            start = best[1]
            while 0 <= best[1] + step < len(ridges):
                other = solved(best[1] + step)
                if other[0] >= best[0]:
                    break
                best = other
            if best[1] != start:
                break
        return ridges[best[1]], best[2], best[0]

    def _held_out(self) -> float:
        return sum(float(gap[held].double().square().sum()) for gap, held in zip(self.gaps, self.held))

    def _products(self, group: range, fit: Tensor) -> tuple[Products, Products]:
        """Of the tokens that the fit sees and of those held out; these experts' own fit counts as to be found."""
        columns = len(group) * self.inner
        active = self._active(group)
        kind = Gram if sum(int(a.sum()) for a in active) >= columns else Rows
        fitted, held = kind(columns, self.hidden), kind(columns, self.hidden)
        for b, here in enumerate(active):
            a, out = self._columns(group, b, here), self.held[b][here]
            gap = self.gaps[b][here]
            target = gap + a @ fit if fit.any() else gap
            fitted.add(a[~out], target[~out])
            held.add(a[out], target[out])
            # what no expert of the group is weighed in cannot be explained by it
            held.outside += float(self.gaps[b][~here & self.held[b]].double().square().sum())
        self._count(group)
        return fitted, held

    def _active(self, group: range) -> list[Tensor]:
        """For each batch, the tokens that some expert of the group is weighed for, bool (tokens,)."""
        return [(weights[:, group.start : group.stop] != 0).any(1) for weights in self.weights]

    def _count(self, group: range) -> None:
        pairs = sum(int((weights[:, group.start : group.stop] != 0).sum()) for weights in self.weights)
        self.runs += self.activations.runs * pairs / self.pairs

    def _take(self, group: range, change: Tensor) -> None:
        """Subtract from the gaps what a change of these experts gives."""
        for b, here in enumerate(self._active(group)):
            self.gaps[b][here] -= self._columns(group, b, here) @ change
        self._count(group)

    def _columns(self, group: range, b: int, tokens: Tensor) -> Tensor:
        """A of some experts and tokens (bool) of a batch, float32 (tokens, experts x inner)."""
        hidden, weights = self.batches[b].hidden[tokens], self.weights[b][tokens]
        a = torch.zeros(len(hidden), len(group), self.inner, device=weights.device)
        for place, i in enumerate(group):
            there = weights[:, i].nonzero()[:, 0]
            if len(there):
                a[there, place] = self.activations.weighted(i, hidden[there], weights[there, i])
        return a.flatten(1)

    def _solved(self, products: Products, ridge: float, rank: int | None, group: range) -> Tensor:
        """D, (experts x inner, hidden), of the rank that is asked for."""
        try:
            d = products.solution(ridge * max(products.scale, torch.finfo(torch.float32).tiny))
        except ArithmeticError as error:
            raise MethodError(f"{self.layer.name}: {error}; give larger ridges") from None
        if rank is None:
            return d
        for place in range(len(group)):
            # of the nearest D of that rank in what the expert gives, A D: the leading right singular vectors of A D are
            # eigenvectors of (A D)'(A D), in float64 as squaring doubles the range of the singular values
            rows = slice(place * self.inner, (place + 1) * self.inner)
            vectors = torch.linalg.eigh(products.given(d[rows], rows).double()).eigenvectors[:, -rank:].float()
            d[rows] = d[rows] @ vectors @ vectors.T
        return d

    def _projections(self, change: Tensor, rank: int | None) -> DownProjections:
        """Those of a change, (r, hidden, inner): itself, of low rank, or all numbers, exact in the model's dtype."""
        if rank is not None and self.part.down is None:
            probe = torch.randn(self.inner, min(rank, *change.shape[1:]), generator=torch.Generator().manual_seed(0))
            left = torch.linalg.qr(change @ probe.to(change.device)).Q  # spans the columns of a matrix of that rank
            return DownProjections(left=left.cpu().numpy(), right=(left.mT @ change).cpu().numpy())
        now = self.tensors[DOWN]
        whole = (now.mT if self.activations.form.transposed else now).float() + change
        return DownProjections(whole=whole.to(now.dtype).float().cpu().numpy())
