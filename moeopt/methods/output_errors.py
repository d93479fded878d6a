"""How far the output of a layer with other experts is from what it should be, by Gram matrices of experts' outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.statistics import Array, gram

BATCH = 8
"""Sequences a calibration batch, as in NAEE's code."""
AT_ONCE = 1 << 24
"""Numbers in memory at a time."""


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

    def part(self, tokens: slice) -> Problem:
        """Of some of the tokens."""
        acts, grams = self.acts.without_states(tokens), self.grams[tokens]
        return Problem(acts, grams.clone() if tokens.step else grams, self.cross[tokens], self.norms[tokens])

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
