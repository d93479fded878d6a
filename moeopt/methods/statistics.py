"""What one-shot methods need to know of a layer, added up over a calibration pass in float64.

Notation: p = the router's scores of all n experts, T = the k that run, g_j = the router's own weight of j
(p_j / sum over T of p where it renormalises, p_j where it does not, times its scale), X_j = the tokens
routed to j, v_j = |X_j|, f_j = expert j's output without its gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.methods.base import CalibrationSize
from moeopt.methods.layer_activations import LayerActivations

Array = NDArray[np.float64]


class Statistic(ABC):
    """Adds up, for one MoE layer, what is seen of it, batch by batch."""

    outputs: Literal["none", "routed", "all"] = "none"
    """Which expert outputs it takes beyond the forward pass: of the k experts routed to, of all n."""

    by_layer: bool = False
    """Whether it grows with tokens, so that one layer's has to be used up before the next one's is begun."""

    @abstractmethod
    def add(self, acts: LayerActivations) -> None:
        """Called with every batch."""

    def bytes_held(self, size: CalibrationSize) -> int:
        """Bytes that it takes of one layer, as far as they grow with tokens."""
        return 0


class Routing(Statistic):
    """What the router does; costs nothing beyond the forward pass.

    Attributes:
        tokens: how many there were.
        visits: v_j, (n,).
        gates: sum over X_j of g_j, (n,).
        probabilities: sum over all tokens of p_j, (n,).
        logits: sum over all tokens of l_i * l_j, the router's logits, (n, n).
    """

    def __init__(self, n: int) -> None:
        self.tokens = 0
        self.visits, self.gates, self.probabilities = np.zeros(n), np.zeros(n), np.zeros(n)
        self.logits = np.zeros((n, n))

    def add(self, acts: LayerActivations) -> None:
        weights, index = acts.picks
        self.tokens += len(index)
        self.visits += np.bincount(_numpy(index.flatten()).astype(np.int64), minlength=len(self.visits))
        np.add.at(self.gates, _numpy(index.flatten()).astype(np.int64), _numpy(weights.flatten()))
        self.probabilities += _numpy(acts.probabilities.double().sum(0))
        logits = acts.logits.double()
        self.logits += _numpy(logits.T @ logits)


class Norms(Statistic):
    """Norms of the outputs that each expert gave to the tokens routed to it.

    Attributes:
        visits: v_j, (n,).
        norms: sum over X_j of ||f_j||, (n,).
        gated: sum over X_j of g_j ||f_j||, (n,).
        squares: sum over X_j of ||f_j||^2, (n,).
    """

    outputs = "routed"

    def __init__(self, n: int) -> None:
        self.visits, self.norms, self.gated, self.squares = (np.zeros(n) for _ in range(4))

    def add(self, acts: LayerActivations) -> None:
        for j, tokens, gates in routed(acts):
            norms = acts.output(j, tokens).float().norm(dim=-1).double()
            self.visits[j] += len(norms)
            self.norms[j] += float(norms.sum())
            self.gated[j] += float((norms * gates.double()).sum())
            self.squares[j] += float(norms.square().sum())


class Moves(Statistic):
    """Norms of outputs, tokens weighed by how much the layer turns their hidden states.

    Attributes:
        moved: sum over X_j of g_j ||f_j|| max(0, 1 - cos(x, x + y)), x being the hidden states before the layer and y
            what its routed experts give, (n,).
    """

    outputs = "routed"

    def __init__(self, n: int) -> None:
        self.moved = np.zeros(n)

    def add(self, acts: LayerActivations) -> None:
        before = acts.residual.float()
        after = before + acts.routed.float()
        turned = (1 - torch.cosine_similarity(before, after, dim=-1)).clamp_min(0.0).double()
        for j, tokens, gates in routed(acts):
            norms = acts.output(j, tokens).float().norm(dim=-1).double()
            self.moved[j] += float((norms * gates.double() * turned[tokens]).sum())


class Spread(Statistic):
    """Means and variances of the outputs that each expert gave to the tokens routed to it, of each layer apart.

    Batches are joined by Chan's update, in float64, so that a mean that is large takes nothing from a small variance.

    Attributes:
        visits: for each layer, v_j, (n,).
        means: for each layer, the mean over X_j of f_j, 0 where X_j is empty, (n, hidden).
        squares: for each layer, the sum over X_j of ||f_j - mean||^2, (n,).
        gates: of all layers, the sum over X_j of g_j, (n,).
    """

    outputs = "routed"

    def __init__(self, n: int) -> None:
        self.gates = np.zeros(n)
        self.visits, self.means, self.squares = dict[int, Array](), dict[int, Array](), dict[int, Array]()

    def add(self, acts: LayerActivations) -> None:
        layer, n = acts.layer.index, len(self.gates)
        visits, squares = (sums.setdefault(layer, np.zeros(n)) for sums in (self.visits, self.squares))
        means = self.means.setdefault(layer, np.zeros((n, acts.hidden.shape[1])))
        for j, tokens, gates in routed(acts):
            outputs = acts.output(j, tokens).double()
            mean = outputs.mean(0)
            step, share = _numpy(mean) - means[j], len(outputs) / (visits[j] + len(outputs))
            squares[j] += float((outputs - mean).square().sum()) + float(step @ step) * visits[j] * share
            means[j] += step * share
            visits[j] += len(outputs)
            self.gates[j] += float(gates.double().sum())


class MeanOutputs(Statistic):
    """Every expert's mean output over all tokens, whether routed to it or not.

    Attributes:
        means: (n, hidden).
    """

    outputs = "all"

    def __init__(self, n: int) -> None:
        self.tokens = 0
        self.sums: Array | None = None

    def add(self, acts: LayerActivations) -> None:
        sums = _numpy(acts.outputs.sum(1, dtype=torch.float32))
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += len(acts.hidden)

    @property
    def means(self) -> Array:
        assert self.sums is not None
        return self.sums / self.tokens


def routed(acts: LayerActivations) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of every expert that has any: its number, the tokens routed to it, and their gates g_j."""
    weights, index = acts.picks
    for j in range(acts.layer.n):
        tokens, place = (index == j).nonzero(as_tuple=True)
        if len(tokens):
            yield j, tokens, weights[tokens, place]


def gram(vectors: Tensor) -> Tensor:
    """Inner products of m vectors for every token: (m, tokens, hidden) -> float32 (tokens, m, m)."""
    m, tokens, _ = vectors.shape
    vectors = vectors.float()
    grams = vectors.new_empty(tokens, m, m)
    for i in range(m):  # three times faster on a CPU than a product of many small matrices
        grams[:, i, i:] = torch.einsum("th,mth->tm", vectors[i], vectors[i:])
        grams[:, i:, i] = grams[:, i, i:]
    return grams


def _numpy(tensor: Tensor) -> Array:
    return tensor.cpu().numpy().astype(np.float64)
