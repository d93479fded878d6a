"""Dynamic skipping and aliased routing: the formulas of the papers, and work that is really left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.conftest import greedy, logits

from moeopt.models import moe_layers, patched
from moeopt.plan import LayerPlan, Plan

MEMBERS = (0, 1, 1, 0, 2, 3, 2, 3)
"""Who answers for each of eight experts."""


def outputs_of_block(layer, hidden, experts=None):
    """(n, tokens, hidden): every expert's output, without its gate; or of so many, where a plan makes them."""
    ones = torch.ones(len(hidden), 1)
    with torch.no_grad():
        numbers = range(layer.n if experts is None else experts)
        return torch.stack([layer.experts(hidden, torch.full((len(hidden), 1), j), ones) for j in numbers])


def slow_block(layer, hidden, plan, outputs):
    """The block's output for hidden states (tokens, hidden), token by token, from NAEE's section 3.3 and HC-SMoE's 3.2.

    `outputs` are the new experts', (r, tokens, hidden).
    """
    found = []
    for t, h in enumerate(hidden):
        p = (h.double() @ layer.router.weight.detach().double().T).softmax(0)
        if plan.router == "rows":
            p = p[list(plan.kept)] / p[list(plan.kept)].sum()
        ranked = sorted(range(len(p)), key=lambda j: -float(p[j]))[: plan.k]
        weight = {j: float(p[j]) for j in ranked}
        weight = {j: w for j, w in weight.items() if w >= plan.skip * weight[ranked[0]]}
        total = sum(weight.values())
        new = {j: int(np.argmax(plan.w_rm[:, j])) if plan.router == "alias" else j for j in weight}
        found.append(sum(w / total * outputs[new[j], t].double() for j, w in weight.items()))
    return torch.stack(found).float()


def plans(n=8):
    kept = (1, 2, 4, 6)
    w_em = np.zeros((4, n), np.float32)
    for j, i in enumerate(MEMBERS):
        w_em[i, j] = 0.5
    w_rm = (w_em > 0).astype(np.float32)
    return {
        "skip": LayerPlan(n, 2, kept=tuple(range(n)), skip=0.6),
        "skip, k = 4": LayerPlan(n, 4, kept=tuple(range(n)), skip=0.5),
        "skip, pruned": LayerPlan(n, 2, kept=kept, skip=0.7),
        "alias, merged": LayerPlan(n, 2, w_em=w_em, w_rm=w_rm, router="alias"),
        "alias, kept": LayerPlan(n, 2, kept=kept, w_rm=w_rm, router="alias"),
        "alias, skip": LayerPlan(n, 2, w_em=w_em, w_rm=w_rm, router="alias", skip=0.6),
    }


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", plans())
def test_a_block_computes_what_the_papers_say(make_mixtral, name, backend):
    model, part = make_mixtral(), plans()[name]
    model.set_experts_implementation(backend)
    layer = moe_layers(model)[1]
    hidden = torch.randn(40, layer.hidden, generator=torch.Generator().manual_seed(3))
    outputs = outputs_of_block(layer, hidden)
    if part.w_em is not None:  # merged experts are not mixtures of outputs: merge the weights
        whole = Plan((LayerPlan(8, 1, w_em=part.w_em, w_rm=part.w_em, router="prob"),) * 3)
        with patched(model, whole):
            outputs = outputs_of_block(layer, hidden, part.kept_experts)
    elif part.kept is not None:
        outputs = outputs[list(part.kept)]
    expected = slow_block(layer, hidden, part, outputs)
    with patched(model, Plan((part,) * 3)), torch.no_grad():
        got = layer.block(hidden[None])
    got = got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(got.reshape(40, -1), expected, rtol=1e-4, atol=1e-6)


def test_skipped_experts_are_not_run(make_mixtral, ids, monkeypatch):
    model = make_mixtral()
    model.set_experts_implementation("eager")
    seen = []
    own = type(moe_layers(model)[0].experts).forward.__wrapped__

    def counting(self, hidden_states, top_k_index, top_k_weights):
        seen.append(top_k_index.numel())
        return own(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(type(moe_layers(model)[0].experts).forward, "__wrapped__", counting)
    pairs = ids.numel() * 2 * 3
    for beta, low, high in ((0.9, pairs // 2, int(0.8 * pairs)), (1.0, pairs // 2, pairs // 2)):
        seen.clear()
        with patched(model, Plan.identity(3, 8, 2).with_skip(beta)) as state:
            logits(model, ids)
        assert low <= sum(seen) <= high
        assert sum(state.active) * ids.numel() == sum(seen)


def test_a_beta_that_nothing_falls_under_changes_no_bit(make_mixtral, ids):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_mixtral(dtype=dtype)
        expected = logits(model, ids)
        with patched(model, Plan.identity(3, 8, 2).with_skip(1e-9)) as state:
            assert torch.equal(logits(model, ids), expected)
        assert state.active == (2.0, 2.0, 2.0)


def test_beta_one_is_one_active_expert(make_mixtral, ids):
    model = make_mixtral()
    with patched(model, Plan.identity(3, 8, 2).with_k(1)):
        expected = logits(model, ids)
    with patched(model, Plan.identity(3, 8, 2).with_skip(1.0)):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_generation_skips(make_mixtral, ids):
    model = make_mixtral()
    plan = Plan.identity(3, 8, 2).with_skip(0.8)
    with patched(model, plan):
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        again = greedy(model, ids, 6)
    assert torch.equal(tokens, again)


def test_families_skip(family, build_family, ids):
    model = build_family(family)
    layer = moe_layers(model)[0]
    layers = len(moe_layers(model))
    with patched(model, Plan.identity(layers, layer.n, layer.k)):
        full = logits(model, ids)
    if not hasattr(type(layer.experts).forward, "__wrapped__"):
        return
    with patched(model, Plan.identity(layers, layer.n, layer.k).with_skip(0.9)) as state:
        skipping = logits(model, ids)
    assert skipping.isfinite().all()
    assert not torch.equal(skipping, full)
    assert all(1 <= active < layer.k for active in state.active)


def test_negative_weights_are_skipped_by_their_mapped_probability(make_mixtral):
    model = make_mixtral()
    layer = moe_layers(model)[0]
    w_rm = np.zeros((2, 8), np.float32)
    w_rm[0, 0], w_rm[1] = 0.02, -0.5  # a sum below 0: the weights' signs are those of the mapped, turned
    part = LayerPlan(8, 2, kept=(0, 1), w_rm=w_rm, router="prob", negative="eep", skip=0.5)
    hidden = torch.randn(10, layer.hidden, generator=torch.Generator().manual_seed(0))
    expected = outputs_of_block(layer, hidden)[0]  # the first alone, with weight 1
    with patched(model, Plan((part,) * 3)), torch.no_grad():
        got = layer.block(hidden[None])
    got = got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(got.reshape(10, -1), expected, rtol=1e-4, atol=1e-6)
