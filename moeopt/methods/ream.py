"""REAM, arXiv 2604.04356: experts merged into the most salient ones, neurons aligned, layer by layer.

With p_i the score that the router gives expert i of all n (softmax, or sigmoid where that is the family's, before the
scores of those picked are made to sum to 1), f_i its output without a gate, X_i the tokens routed to it:

1. saliency s_i = mean over X_i of p_i ||f_i||: REAP's, but that `reap` takes the weights that the router gives to those
   it picks; an expert that nothing was routed to gets the least of the others', at most 0.5. The r of highest saliency
   lead.
2. likeness of i and j = half of (cos(m_i, m_j) + 1) / 2, m_i being the mean of p_i f_i over all tokens, and half of 1 -
   D_ij / max D, D_ij being the distance of the router's logits of i and j over all tokens, each divided by their norm.
3. the leading experts, most salient first, take those most like them that none has taken yet, until they are `GROUP`
   with them; so the first groups are large and the last ones single (`GROUP` grows where r groups of it are too few).
4. neurons are put on the leading expert's by the assignment of least cost, the distance of their activations on the
   same tokens plus that of their [row of W3 | row of W1 | column of W2] and biases, each divided by its norm.
5. the new expert is the sum of a group weighed by saliency; the router keeps the leading experts' rows, as they are.
   Then the next layer, on what the layers so far give.

Where SamsungSAILMontreal/ream does otherwise than the paper, this follows the paper: its saliency has p_i twice, its
activations are of other tokens for each expert (a permutation drawn for each), weights are reduced to 64 principal
components first, means over batches count alike whatever their number of tokens.

A baseline: where experts differ it is behind `naee` wherever it was tried, refitted or not (`benchmarks/refit.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.methods.base import Budget, CalibrationSize, Method, statistic
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.matching import neuron_weights, orders, tensors_of
from moeopt.methods.neuron_activations import NeuronActivations
from moeopt.methods.statistics import Array, Routing, Statistic, routed
from moeopt.models import MoELayer
from moeopt.models.mixing import ExpertForm
from moeopt.plan import LayerPlan, Matrix, Orders, one_hot

GROUP = 16
"""C, the most experts that one group takes; the paper's."""
SAMPLE = 1024
"""Tokens, evenly drawn from all, whose activations align neurons."""


class Likeness(Statistic):
    """What REAM asks of the experts of one layer.

    Attributes:
        gated: sum over all tokens of p_i f_i, (n, hidden).
        salient: sum over X_i of p_i ||f_i||, (n,).
        layer: the layer.
        hidden: what entered it, batch by batch, (tokens, hidden).
    """

    outputs = "all"
    by_layer = True

    def __init__(self, n: int) -> None:
        self.salient = np.zeros(n)
        self.gated: Array | None = None
        self.layer: MoELayer | None = None
        self.hidden: list[Tensor] = []

    def add(self, acts: LayerActivations) -> None:
        p = acts.probabilities
        gated = torch.stack([p[:, j] @ acts.output(j, slice(None)).float() for j in range(acts.layer.n)])
        sums = gated.double().cpu().numpy()
        self.gated = sums if self.gated is None else self.gated + sums
        for j, tokens, _ in routed(acts):
            norms = acts.output(j, tokens).float().norm(dim=-1)
            self.salient[j] += float((norms * p[tokens, j]).double().sum())
        self.layer = acts.layer
        self.hidden.append(acts.hidden)

    def bytes_held(self, size: CalibrationSize) -> int:
        return size.tokens * size.hidden * size.itemsize

    def saliency(self, visits: Array) -> Array:
        """s, (n,), visits being |X_i|."""
        s = np.divide(self.salient, visits, out=np.zeros_like(self.salient), where=visits > 0)
        least = s[s > 0].min(initial=0.5)
        return np.where(s > 0, s, least)

    def sample(self) -> Tensor:
        """Hidden states of at most `SAMPLE` tokens, (tokens, hidden)."""
        hidden = torch.cat(self.hidden)
        return hidden[torch.linspace(0, len(hidden) - 1, min(SAMPLE, len(hidden))).long().to(hidden.device)]


class Ream(Method):
    """Experts merged into the most salient ones, neurons aligned, layer by layer; see the top of the file."""

    summary = "groups led by experts of large gated outputs merged, neurons aligned, layer by layer"
    progressive = alone = True
    kinds = (Routing, Likeness)

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        routing, likeness = statistic(statistics, Routing), statistic(statistics, Likeness)
        assert likeness.gated is not None
        saliency = likeness.saliency(routing.visits)
        leads, labels = grouped(saliency, alike(likeness.gated, routing.logits), budget)
        members = labels[None, :] == np.arange(budget.keep)[:, None]
        weights = members * saliency
        w_em = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        # a group's lead is its expert of largest weight, as it is the most salient of those not taken
        neurons = aligned(likeness, w_em) if budget.keep < budget.experts else None
        w_rm = one_hot(leads, budget.experts)
        return LayerPlan(budget.experts, budget.active, w_em=w_em, w_rm=w_rm, router="rows", neurons=neurons)


def alike(gated: Array, logits: Array) -> Array:
    """How alike experts are, from 0 to 1, (n, n).

    Args:
        gated: sums of gated outputs, (n, hidden).
        logits: inner products of the router's logits over tokens, (n, n).
    """
    tiny = np.finfo(float).tiny
    directions = gated / np.maximum(np.linalg.norm(gated, axis=1, keepdims=True), tiny)
    outputs = (directions @ directions.T + 1) / 2
    norms = np.sqrt(np.maximum(logits.diagonal(), tiny))
    distances = np.sqrt(np.maximum(2 - 2 * logits / norms / norms[:, None], 0))
    result: Array = (outputs + 1 - distances / max(distances.max(), tiny)) / 2
    return result


def grouped(saliency: Array, likeness: Array, budget: Budget) -> tuple[list[int], NDArray[np.int64]]:
    """The experts that lead, by number, and which of their groups, 0 to r - 1, each expert is in, (n,).

    Where routers choose among groups of experts first, leads take those of their own.
    """
    n, r = len(saliency), budget.keep
    most = max(GROUP, math.ceil(n / r))
    leads = budget.best(saliency)
    labels = np.full(n, -1, dtype=np.int64)
    labels[leads] = np.arange(r)
    for lead in sorted(leads, key=lambda lead: -saliency[lead]):
        part = next(part for part in budget.parts if lead in part)
        free = [j for j in np.argsort(-likeness[lead], kind="stable") if labels[j] < 0 and j in part]
        labels[free[: most - 1]] = labels[lead]
    return leads, labels


def aligned(likeness: Likeness, w_em: Matrix) -> Orders:
    """Orders of neurons, (n, inner), by their activations and weights."""
    layer = likeness.layer
    assert layer is not None
    tensors, form, hidden = tensors_of(layer), ExpertForm.from_module(layer.experts), likeness.sample()
    activations, ones = NeuronActivations(layer, tensors), torch.ones(len(hidden), device=hidden.device)

    def features(expert: int) -> tuple[Tensor, Tensor]:
        return _normed(activations.weighted(expert, hidden, ones).T), _normed(neuron_weights(tensors, form, expert))

    def cost(lead: int, other: int) -> Tensor:
        (acts, weights), (other_acts, other_weights) = features(lead), features(other)
        return torch.cdist(acts, other_acts) + torch.cdist(weights, other_weights)

    return orders(w_em, form.inner, cost)


def _normed(rows: Tensor) -> Tensor:
    norms: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
