"""Routing rules: every supported family is reproduced and pruned exactly; the others are refused."""

from __future__ import annotations

import pytest
import torch
from models.conftest import logits

from moeopt.errors import ModelError
from moeopt.models import moe_layers, patched, routing_rules
from moeopt.models.routing import MappedRouter
from moeopt.plan import LayerPlan, Plan

ROWS = ((5, 0, 3, 2), (1, 2, 6, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_changes_no_bit_in_any_family(build_family, family, ids, dtype):
    model = build_family(family, dtype=dtype)
    expected = logits(model, ids)
    identity = LayerPlan(7, 2, kept=tuple(range(7)))
    hooks = [MappedRouter(layer, rule, identity) for layer, rule in zip(moe_layers(model), routing_rules(model))]
    for layer, hook in zip(moe_layers(model), hooks):
        layer.router.register_forward_hook(hook, with_kwargs=True)
    assert torch.equal(logits(model, ids), expected)
    assert [hook.calls for hook in hooks] == [1, 1]


@pytest.mark.parametrize("kind", ["pruned", "pruned, corrected", "merged"])
def test_a_plan_equals_the_stock_small_model_in_any_family(build_family, family, ids, shrunk, dense_plan, kind):
    model = build_family(family, corrected=kind == "pruned, corrected")
    merged = kind == "merged"
    plan = dense_plan(layers=2, n=7, router="logit") if merged else Plan.one_hot(ROWS, experts=7, k=2)
    small, near = shrunk(model, build_family(family, 4), plan), 1e-5 if merged else 0
    with patched(model, plan):
        torch.testing.assert_close(logits(model, ids), logits(small, ids), rtol=near, atol=near)


def test_mapped_probabilities_choose_the_kept_experts_in_any_family(build_family, family, ids):
    """One-hot W_RM on probabilities picks the experts that the rows pick, whatever the weights are."""
    model = build_family(family)
    rows, prob = (Plan.one_hot(ROWS, experts=7, k=2, router=router) for router in ("rows", "prob"))
    layer = moe_layers(model)[0]
    hidden = torch.randn(40, layer.hidden, generator=torch.Generator().manual_seed(0))
    outputs = []
    for plan in (rows, prob):
        with patched(model, plan), torch.no_grad():
            outputs.append(layer.router(hidden))
    assert torch.equal(outputs[0][2], outputs[1][2])
    assert set(outputs[0][2].flatten().tolist()) <= set(ROWS[0])
    if routing_rules(model)[0].normalised:
        torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-4, atol=1e-6)
    else:
        full = layer.router(hidden)[0].softmax(-1).gather(1, outputs[1][2])
        torch.testing.assert_close(outputs[1][1], full, rtol=1e-4, atol=1e-6)


def test_rules_say_what_the_families_do(build_family):
    expected = {
        "mixtral": ("softmax", True, 1.0),
        "olmoe": ("softmax", False, 1.0),
        "qwen3_moe": ("softmax", True, 1.0),
        "gpt_oss": ("selected", True, 1.0),
        "deepseek_v3": ("sigmoid", True, 2.5),
    }
    for family, (score, normalised, scale) in expected.items():
        rules = routing_rules(build_family(family))
        assert [(r.score, r.normalised, r.scale) for r in rules] == [(score, normalised, scale)] * 2


def test_a_choice_corrected_by_a_bias_cannot_be_mapped(build_family, dense_plan):
    model = build_family("deepseek_v3", corrected=True)
    assert routing_rules(model)[0].correction == "e_score_correction_bias"
    for router in ("prob", "logit"):
        with pytest.raises(ModelError, match="corrects its choice"):  # noqa: SIM117
            with patched(model, dense_plan(layers=2, n=7, router=router)):
                pass


def test_an_unknown_rule_is_refused(make_mixtral):
    model = make_mixtral()
    router = moe_layers(model)[1].router
    stock = router.forward
    router.forward = lambda hidden: (stock(hidden)[0], stock(hidden)[1].sqrt(), stock(hidden)[2])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp: moeopt does not know the routing rule of MixtralTopKRouter"):
        routing_rules(model)


def test_rules_are_learnt_from_the_router_itself_while_a_plan_is_in_force(make_mixtral, dense_plan):
    model, twin = make_mixtral(), make_mixtral()
    with patched(model, dense_plan(router="prob", k=1)):
        model.set_experts_implementation("eager")
        assert routing_rules(model) == routing_rules(twin)
        assert [x.k for x in moe_layers(model)] == [2, 2, 2]
