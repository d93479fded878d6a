"""Sizes: those of the checkpoints that plans are exported to, and active parameters counted by hand."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeopt
from moeopt.models import Sizes, is_dense, moe_layers
from moeopt.plan import LayerPlan, Plan

LAYERS, N, K, HIDDEN, WIDE, VOCABULARY = 3, 8, 2, 32, 48, 300
BYTES = {"F32": 4, "BF16": 2}
EXPERT, ROW = 3 * HIDDEN * WIDE, HIDDEN
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * (HIDDEN // 2)  # q and o; k and v of half the heads
REST = 2 * VOCABULARY * HIDDEN + HIDDEN + LAYERS * (ATTENTION + 2 * HIDDEN)  # embedding and head, norms


def headers(folder: Path) -> tuple[int, int]:
    """Numbers and bytes of all floating tensors that a checkpoint's safetensors files declare."""
    count = size = 0
    for file in folder.glob("model*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, tensor in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__" and tensor["dtype"] in BYTES:
                count += math.prod(tensor["shape"])
                size += math.prod(tensor["shape"]) * BYTES[tensor["dtype"]]
    return count, size


def pruning(r: int, k: int = K) -> Plan:
    return Plan.one_hot([range(r)] * LAYERS, experts=N, k=k)


def merging(router: Any) -> Plan:
    w_em = [[0.25] * N, [0.5, 0.5] + [0.0] * (N - 2)]
    return Plan((LayerPlan(N, 2, w_em=w_em, w_rm=w_em, router=router),) * LAYERS)  # type: ignore[arg-type]


def aliasing() -> Plan:
    w_rm = [[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4]
    return Plan((LayerPlan(N, 3, kept=(0, 4), w_rm=w_rm, router="alias"),) * LAYERS)  # type: ignore[arg-type]


def with_novices() -> Plan:
    novices = np.ones((N - 2, HIDDEN), dtype=np.float32)
    return Plan((LayerPlan(N, 3, kept=(0, 4), router="whole", novices=novices),) * LAYERS)


PLANS = {
    "r = 4": pruning(4),
    "r = 2, k = 1": pruning(2, 1),
    "all, k = 1": pruning(N, 1),
    "merged, logits mapped": merging("logit"),
    "merged, probabilities mapped": merging("prob"),
    "aliased": aliasing(),
    "novices": with_novices(),
    "skipping": pruning(4).with_skip(0.5),
    "r differs": Plan.one_hot([range(r) for r in (3, 8, 5)], experts=N, k=2),
    "probabilities selected": Plan.one_hot([[5, 2, 1]] * LAYERS, experts=N, k=2, router="prob"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_has_the_size_of_its_exported_checkpoint(
    name: str, dtype: torch.dtype, make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_mixtral(dtype=dtype)
    model.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    sizes = Sizes(model)
    whole = sizes.under()
    assert (whole.parameters, whole.bytes) == headers(tmp_path / "full")
    size = sizes.under(PLANS[name])
    exported = moeopt.export(PLANS[name], tmp_path / "small", model=tmp_path / "full")
    assert (size.parameters, size.bytes) == headers(exported)


def test_active_parameters_of_a_mixtral_by_hand(make_mixtral: Any) -> None:
    sizes = Sizes(make_mixtral())
    whole = sizes.under()
    assert whole.parameters == REST + LAYERS * N * (EXPERT + ROW)
    assert whole.active == REST + LAYERS * (N * ROW + K * EXPERT)
    assert sizes.under(pruning(4)).active == REST + LAYERS * (4 * ROW + K * EXPERT)
    assert sizes.under(pruning(N, 1)).active == REST + LAYERS * (N * ROW + EXPERT)
    assert sizes.under(pruning(N).with_skip(0.5), [1.5, 2.0, 1.0]).active == REST + LAYERS * N * ROW + 4.5 * EXPERT


def test_dense_maps_of_probabilities_and_aliases_keep_the_whole_router(make_mixtral: Any) -> None:
    sizes = Sizes(make_mixtral())
    size = sizes.under(merging("prob"))
    assert size.parameters == REST + LAYERS * (2 * EXPERT + N * ROW + 2 * N)
    assert size.bytes == 4 * size.parameters
    size = sizes.under(aliasing())
    assert size.parameters == size.active == REST + LAYERS * (2 * EXPERT + N * ROW)
    size = sizes.under(with_novices(), [1.0] * LAYERS)
    assert size.parameters == REST + LAYERS * (2 * EXPERT + N * ROW + (N - 2) * HIDDEN)
    assert size.active == size.parameters - LAYERS * EXPERT


def test_shared_experts_are_always_active(build_family: Callable[..., Any]) -> None:
    model = build_family("qwen2_moe")
    layers = moe_layers(model)
    idle = sum((x.n - x.k) * sum(p.numel() for p in x.experts.parameters()) // x.n for x in layers)
    size = Sizes(model).under()
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.active == size.parameters - idle


def test_biases_that_correct_routers_count_too(build_family: Callable[..., Any]) -> None:
    model = build_family("deepseek_v3")
    corrections = sum(b.numel() for name, b in model.named_buffers() if "correction_bias" in name)
    assert corrections > 0
    size = Sizes(model)
    assert size.under().parameters == sum(p.numel() for p in model.parameters()) + corrections
    layers = moe_layers(model)
    rows = sum(layer.hidden + 1 for layer in layers)
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters()) // layers[0].n
    dropped = Plan.one_hot([range(layer.n - 1) for layer in layers], experts=layers[0].n, k=2)
    assert size.under().parameters - size.under(dropped).parameters == rows + experts


def test_a_dense_model_is_all_active(tiny_llama: Any, tiny_model: Any) -> None:
    size = Sizes(tiny_llama, ()).under()
    assert size.parameters == size.active == sum(p.numel() for p in tiny_llama.parameters())
    assert is_dense(tiny_llama)
    assert not is_dense(tiny_model)
