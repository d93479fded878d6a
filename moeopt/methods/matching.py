"""Which neuron of one expert is which of another's, by the best assignment (Hungarian) of neurons to each other.

Experts are mixed tensor by tensor, so what is mixed should mean the same. `by_weights` is the weight matching of Git
Re-Basin (arXiv 2209.04836), as REAP's code has it: the least sum of squared distances between [row of W3 | row of W1 |
column of W2] of the neurons put on each other.

An assignment of m neurons takes m^2 numbers of 8 bytes and a time that grows with up to m^3: seconds for 1,536, minutes
for 14,336 (Mixtral 8x7B), for every expert that is merged into another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moeopt.models import MoELayer, materialised
from moeopt.models.layers import stacked
from moeopt.models.mixing import ExpertForm
from moeopt.plan import LayerPlan, Matrix, Orders

Cost = Callable[[int, int], Tensor]
"""Of an expert that leads and one that follows, what it costs to put neuron b of the latter on neuron a: (a, b)."""


def tensors_of(layer: MoELayer) -> dict[str, Tensor]:
    """The (n, ...) tensors of a layer's experts with their data, also under offload."""
    return {name: materialised(layer.experts, name) for name in stacked(layer.experts, layer.n)}


def neuron_weights(tensors: Mapping[str, Tensor], form: ExpertForm, expert: int) -> Tensor:
    """All weights of each neuron of an expert, float32 (inner, numbers)."""
    columns = []
    for name, tensor in tensors.items():
        for rows, is_neurons in form.projections(name, tensor[expert].detach()):
            if is_neurons:
                columns.append(rows.reshape(form.inner, -1).float())
    return torch.cat(columns, 1)


def by_weights(part: LayerPlan, layer: MoELayer) -> Orders:
    """Orders of the neurons of a merged layer's experts, (n, inner), by their weights."""
    tensors, form = tensors_of(layer), ExpertForm.from_module(layer.experts)

    def cost(lead: int, other: int) -> Tensor:
        # |u|^2 + |v|^2 - 2 u v, of which the squares are the same for every assignment
        return -neuron_weights(tensors, form, lead) @ neuron_weights(tensors, form, other).T

    return orders(part.expert_matrix, form.inner, cost)


def orders(w_em: Matrix, inner: int, cost: Cost) -> Orders:
    """For every expert the order of neurons that puts them on those of the expert that leads its row of W_EM.

    Args:
        w_em: (r, n); the largest weight of a row leads, and no expert stands in two rows.
        inner: neurons of an expert.
        cost: of two experts.

    Returns:
        (n, inner) int32, as `LayerPlan.neurons`.
    """
    result = np.tile(np.arange(inner, dtype=np.int32), (w_em.shape[1], 1))
    for row in w_em:
        lead = int(row.argmax())
        for other in np.flatnonzero(row):
            if other != lead:
                result[other] = linear_sum_assignment(cost(lead, int(other)).double().cpu().numpy())[1]
    return result
