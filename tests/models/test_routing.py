"""Routing rules: every supported family is reproduced and pruned exactly; the others are refused."""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest
import torch
from models.conftest import logits
from tiny_families import tiny_model

from moeopt.errors import ModelError, PlanError
from moeopt.models import moe_layers, patched, routing_rules
from moeopt.models.routing import MappedRouter
from moeopt.plan import LayerPlan, Plan

CORRECTED = ("glm4_moe", "deepseek_v3", "ernie4_5_moe", "dots1")
LIMITED = ("glm4_moe", "deepseek_v2", "deepseek_v3", "dots1")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "model_type", ["afmoe", "minimax_m2", "hy_v3", "lfm2_moe", "gemma4_text", "muse_spark", "llama4_text"]
)
def test_identity_changes_no_bit_where_a_block_gives_the_bias_or_a_router_multiplies(model_type, ids, dtype):
    model = tiny_model(model_type).to(dtype)
    expected = logits(model, ids)
    layers, rules = moe_layers(model), routing_rules(model)
    for layer, rule in zip(layers, rules):
        special = (rule.factor, rule.multiplier != 1, rule.jitter, layer.weighs_inputs)
        assert any(special) or rule.correction.startswith("../")
    identity = LayerPlan(8, 2, kept=tuple(range(8)))
    for layer, rule in zip(layers, rules):
        MappedRouter(layer, rule, identity).attach(layer.router)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("router", ["rows", "logit", "prob"])
def test_norm_scores_and_factors_of_gemma_4_are_mapped(router):
    """Against its router written down: norm, scale, logits, softmax, top-k over their sum, times a factor an expert."""
    model = tiny_model("gemma4_text")
    layer = moe_layers(model)[1]
    w_rm = torch.eye(8)[[6, 1, 4]]
    if router != "rows":
        w_rm = w_rm + 0.1 * torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    part = LayerPlan(8, 2, kept=(6, 1, 4), w_rm=None if router == "rows" else w_rm.numpy(), router=router)
    hidden = torch.randn(40, layer.hidden, generator=torch.Generator().manual_seed(0))
    with patched(model, Plan((part,) * 3)), torch.no_grad():
        returned, weights, index = layer.router(hidden)
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + layer.router.eps) ** -0.5
        ell = normed * layer.router.scale * layer.hidden**-0.5 @ layer.router.proj.weight.T
        torch.testing.assert_close(returned, ell.softmax(-1))
        scores = ell.softmax(-1) @ w_rm.T if router == "prob" else (ell @ w_rm.T).softmax(-1)
        top, place = scores.topk(2)
        factors = (w_rm @ layer.router.per_expert_scale)[place]
        torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True) * factors)
        assert torch.equal(index, torch.tensor([6, 1, 4])[place])


@pytest.mark.parametrize("router", ["rows", "logit", "prob"])
def test_llama_4_weighs_what_enters_its_experts(router):
    """Against its block written down: the sum over picks of what (merged) experts give for their weight times x."""
    model = tiny_model("llama4_text")
    layer = moe_layers(model)[1]
    noise = 0.1 * torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    w_em = torch.eye(8)[[6, 1, 4]] + noise
    w_rm = w_em if router != "rows" else torch.eye(8)[[6, 1, 4]]
    part = LayerPlan(8, 2, w_em=w_em.numpy(), w_rm=w_rm.numpy(), router=router)
    hidden = torch.randn(40, layer.hidden, generator=torch.Generator().manual_seed(0))
    with patched(model, Plan((part,) * 3)), torch.no_grad():
        given = layer.block(hidden[None])[0] - layer.block.shared_expert(hidden)
        ell = hidden @ layer.router.weight.T
        scores = ell.sigmoid() @ w_rm.T if router == "prob" else (ell @ w_rm.T).sigmoid()
        weights, index = scores.topk(2)
        wanted = torch.zeros_like(hidden)
        up, down = (
            torch.einsum("rn,n...->r...", w_em, w) for w in (layer.experts.gate_up_proj, layer.experts.down_proj)
        )
        for token, place in itertools.product(range(40), range(2)):
            i = index[token, place]
            gate, value = (weights[token, place] * hidden[token] @ up[i]).chunk(2)
            wanted[token] += value * torch.nn.functional.silu(gate) @ down[i]
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="cannot be skipped"), patched(model, Plan((part,) * 3).with_skip(0.5)):
        pass


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


def slowly_routed(rule, scores, correction, k):
    """Weights by expert, (tokens, m), of DeepSeek's two ways to choose groups first, token by token."""
    weights = torch.zeros_like(scores)
    for token, row in enumerate(scores.tolist()):
        choice = [s + c for s, c in zip(row, correction)]
        size = len(row) // rule.groups
        groups = [sorted(choice[g * size : (g + 1) * size])[::-1] for g in range(rule.groups)]
        best = [sum(group[: 1 if rule.group_score == "max" else 2]) for group in groups]
        chosen = sorted(range(rule.groups), key=best.__getitem__)[-rule.kept_groups :]
        inside = [e for e in range(len(row)) if e // size in chosen]
        picked = sorted(inside, key=choice.__getitem__)[-k:]
        total = sum(row[e] for e in picked) if rule.normalised else 1.0
        for e in picked:
            weights[token, e] = row[e] / total * rule.scale
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("router", ["prob", "logit", "rows"])
@pytest.mark.parametrize(("kind", "groups"), [*((kind, 1) for kind in CORRECTED), *((kind, 4) for kind in LIMITED)])
def test_mapped_choices_are_those_of_mapped_numbers_and_biases(build_family, kind, groups, router):
    """W_RM s and W_RM b, or sigmoid(W_RM l) and W_RM b; the groups are blocks of the new experts."""
    model = build_family(kind, 16, corrected=True, groups=groups)
    layer, rule = moe_layers(model)[0], routing_rules(model)[0]
    assert (rule.groups, rule.kept_groups, rule.correction is None) == (groups, -(-groups // 2), kind == "deepseek_v2")
    rng = np.random.default_rng(0)
    pruning, noise = np.eye(16)[[0, 2, 4, 5, 9, 10, 12, 13]], 0.2 * rng.random((8, 16))
    part = LayerPlan(16, 3, w_em=pruning + noise, w_rm=pruning if router == "rows" else pruning + noise, router=router)
    hidden = torch.randn(60, layer.hidden, generator=torch.Generator().manual_seed(0))
    w_rm = torch.from_numpy(part.router_matrix.copy())
    with torch.no_grad():
        logits, stock_weights, stock_index = layer.router(hidden)
        correction = (
            torch.zeros(16) if rule.correction is None else operator.attrgetter(rule.correction)(layer.router).flatten()
        )
        full = torch.zeros(60, 16).scatter_(1, stock_index, stock_weights)
        torch.testing.assert_close(full, slowly_routed(rule, rule.scores(logits), correction.tolist(), layer.k))
        scores = rule.scores(logits) @ w_rm.T if router == "prob" else rule.scores(logits @ w_rm.T)
        with patched(model, Plan((part, part))):
            _, weights, index = layer.router(hidden)
    mapped = torch.zeros(60, 8).scatter_(1, index, weights)
    expected = slowly_routed(rule, scores, (w_rm @ correction).tolist(), 3)
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (LayerPlan(16, 2, kept=tuple(range(6))), "must be a multiple of 4, such as 8, the plan has r=6"),
        (LayerPlan(16, 2, kept=tuple(range(8))), r"must keep 2 of each, this one keeps .*, 4 \+ 4 \+ 0 \+ 0 of them"),
        (LayerPlan(16, 2, kept=(4, 5, 0, 1, 8, 9, 12, 13)), "2 of each, in the groups' order"),
        (LayerPlan(16, 6, kept=tuple(range(12))), "must keep 3 of each"),
        (LayerPlan(16, 6, kept=tuple(range(8))), "such as 12, the plan has r=8"),
    ],
    ids=["r", "unequal", "order", "k that fits", "k"],
)
def test_plans_that_leave_groups_unequal_are_refused(build_family, part, message):
    model = build_family("deepseek_v3", 16, groups=4)
    with pytest.raises(PlanError, match=message), patched(model, Plan((part, part))):
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
