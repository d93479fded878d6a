"""Plans on models whose weights accelerate keeps in CPU memory or on disk between forwards."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from models.conftest import logits
from models.test_blocks import PARTS

from moeopt.models import fingerprint, moe_layers, patched
from moeopt.plan import LayerPlan, Plan

KEPT = [[0, 3, 5, 6], [7, 1, 2, 4], [1, 2, 3, 4]]


@pytest.fixture
def model(make_mixtral):
    return make_mixtral()


@pytest.fixture(params=["cpu", "disk", "map"])
def offloaded(request, model, tmp_path):
    twin = copy.deepcopy(model)
    if request.param == "cpu":
        return accelerate.cpu_offload(twin, execution_device=torch.device("cpu"))
    if request.param == "disk":
        return accelerate.disk_offload(twin, str(tmp_path), execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return accelerate.dispatch_model(twin, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


def test_the_weights_are_really_away(offloaded):
    assert moe_layers(offloaded)[1].experts.down_proj.is_meta


def test_plans_give_the_same_bits(model, offloaded, ids, dense_plan):
    everything = LayerPlan(8, 2, kept=tuple(range(8)), router="logit")
    plans = [
        Plan.identity(3, 8, 2),
        Plan((everything,) * 3),
        Plan.one_hot(KEPT, experts=8, k=2),
        dense_plan(router="prob"),
        dense_plan(router="logit"),
        *(Plan((PARTS[name],) * 3) for name in ("novices", "novices, refitted, skip")),
    ]
    for plan in plans:
        with patched(model, plan):
            expected = logits(model, ids)
        for where in ("auto", "resident"):
            with patched(offloaded, plan, merged_weights=where):
                assert torch.equal(logits(offloaded, ids), expected)
    assert torch.equal(logits(offloaded, ids), logits(model, ids))


def test_an_offloaded_model_has_the_same_fingerprint(model, offloaded):
    assert fingerprint(offloaded) == fingerprint(model)
