"""What comes before an expert's down projection, a(x) in W2 a(x), of any family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeopt.models import MoELayer
from moeopt.models.merging import DOWN, merged_view
from moeopt.models.mixing import ExpertForm


class NeuronActivations:
    """Activations of the neurons of a layer's experts.

    They are the family's own: its experts run with rows of the identity in place of W2, as many at a time as W2 has. A
    product with them is exact in any dtype.

    Args:
        layer: the layer.
        tensors: its experts' tensors by name, expert first, or those that a plan makes of them.

    Attributes:
        form: of these tensors.
        runs: how often an expert runs for its activations.
    """

    def __init__(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
        self.layer, self.tensors = layer, tensors
        self.form = ExpertForm.from_module(layer.experts)
        self._identity = self._rows(tensors[DOWN])
        self.runs = len(self._identity)

    def _rows(self, like: Tensor) -> list[Tensor]:
        """(inner, inner) in pieces of the form of one expert's W2, the last one ending with rows of 0."""
        hidden, inner = self.form.hidden, self.form.inner
        whole = torch.zeros(-(-inner // hidden) * hidden, inner, dtype=like.dtype)
        whole.fill_diagonal_(1)
        pieces = whole.to(like.device).view(-1, hidden, inner).split(1)
        return [piece.mT.contiguous() if self.form.transposed else piece for piece in pieces]

    def weighted(self, expert: int, hidden: Tensor, weights: Tensor) -> Tensor:
        """g a(x), float32 (tokens, inner).

        Args:
            expert: its number among the tensors.
            hidden: what enters it, (tokens, hidden).
            weights: g, (tokens,).
        """
        first = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
        tensors = {name: tensor[expert : expert + 1] for name, tensor in self.tensors.items()}
        # a bias behind W2 is no activation
        tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.startswith(f"{DOWN}_")}
        parts = []
        for rows in self._identity:
            view = merged_view(self.layer.experts, tensors | {DOWN: rows}, self.layer.n)
            parts.append(type(self.layer.experts).forward(view, hidden, first, weights[:, None].to(hidden.dtype)))
        return torch.cat(parts, 1)[:, : self.form.inner].float()
