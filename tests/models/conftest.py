"""What the tests of the model room share: stock models that a plan should equal, and tiny models of other families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moeopt.plan import LayerPlan, Plan


def shrink(model: nn.Module, small: nn.Module, plan: Plan) -> nn.Module:
    """`small`, stock and with fewer experts, given the weights that `plan` makes of those of `model`.

    Its state_dict names must be those of `model`; a tensor of an MoE block belongs to the plan when its first
    dimension is n in one model and r in the other.
    """
    old, new = model.state_dict(), small.state_dict()
    for name, tensor in old.items():
        if new[name].shape == tensor.shape:
            new[name] = tensor
            continue
        layer = plan.layers[int(name.split(".")[2])]
        matrix = layer.expert_matrix if ".experts." in name else layer.router_matrix
        flat = tensor.reshape(layer.experts, -1) if tensor.shape[0] == layer.experts else tensor.reshape(-1, 1)
        new[name] = (torch.from_numpy(matrix.copy()) @ flat.float()).to(tensor.dtype).reshape(new[name].shape)
    small.load_state_dict(new)
    return small


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def greedy(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """`ids` and so many most likely tokens more, each by a forward pass of all before it."""
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def shrunk() -> Callable[[nn.Module, nn.Module, Plan], nn.Module]:
    return shrink


@pytest.fixture
def dense_plan() -> Callable[..., Plan]:
    """Random dense matrices near a pruning, one seed a call."""

    def make(
        layers: int = 3, n: int = 8, r: int = 4, k: int = 2, *, seed: int = 0, scale: float = 0.1, **kind: Any
    ) -> Plan:
        rng = np.random.default_rng(seed)
        parts = []
        for _ in range(layers):
            rows = rng.choice(n, r, replace=False)
            w_em, w_rm = (np.eye(n)[rows] + scale * rng.normal(size=(r, n)) for _ in range(2))
            parts.append(LayerPlan(n, k, w_em=w_em.astype(np.float32), w_rm=w_rm.astype(np.float32), **kind))
        return Plan(tuple(parts))

    return make


@pytest.fixture
def ids() -> Tensor:
    """(2, 13) token numbers below 96."""
    return torch.randint(3, 96, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def snapshot() -> Callable[[nn.Module], Any]:
    """Everything about a model that patching must leave as it was; tensors by identity, version and pointer."""

    def take(model: nn.Module) -> Any:
        state = {name: (t.data_ptr(), t._version, t.shape) for name, t in model.state_dict(keep_vars=True).items()}
        owned = {
            name: (
                [(key, id(p)) for key, p in m._parameters.items()],
                [(key, id(b)) for key, b in m._buffers.items()],
                list(m._forward_hooks.values()),
                list(m._forward_hooks_with_kwargs.values()),
                list(m._forward_pre_hooks.values()),
                sorted(vars(m)),
            )
            for name, m in model.named_modules()
        }
        return state, owned, model.config._experts_implementation, model.config.to_dict()

    return take
