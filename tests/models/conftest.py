"""What the tests of the model room share: stock models that a plan should equal, and tiny models of other families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moeopt.plan import LayerPlan, Plan

EXPERTS, KEPT = 7, 4
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("num_local_experts", {}),
    "olmoe": ("num_experts", {}),
    "qwen2_moe": ("num_experts", {"shared_expert_intermediate_size": 24, "norm_topk_prob": False}),
    "qwen3_moe": ("num_experts", {"norm_topk_prob": True}),
    "gpt_oss": ("num_local_experts", {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]}),
    "granitemoe": ("num_local_experts", {}),
    "minimax": ("num_local_experts", {"layer_types": ["full_attention", "full_attention"], "head_dim": 8}),
    "hunyuan_v1_moe": ("num_experts", {"moe_topk": 2, "head_dim": 8}),
    "deepseek_v3": ("n_routed_experts", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16}),
    "ernie4_5_moe": ("moe_num_experts", {"moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(family: str, experts: int = EXPERTS, *, dtype: torch.dtype = torch.float32, corrected: bool = False) -> Any:
    field, extra = FAMILIES[family]
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "initializer_range": 0.3,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            field: experts,
        }
        | extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("router.bias") or (corrected and "correction_bias" in name):
                nn.init.normal_(tensor, std=0.2)
    return model.to(dtype)


@pytest.fixture
def build_family() -> Callable[..., Any]:
    return build


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
