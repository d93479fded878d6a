"""MoE blocks that skip, alias or replace experts: against a loop over tokens, and work that is really left out."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from models.conftest import greedy, logits

import moeopt
from moeopt.errors import ModelError, PlanError
from moeopt.models import moe_layers, patched
from moeopt.plan import DownProjections, LayerPlan, Plan

N, HIDDEN, INNER = 8, 32, 48
MEMBERS = (0, 1, 1, 0, 2, 3, 2, 3)
"""Who answers for each of eight experts."""
W_EM = np.array([[0.5 * (i == j) for j in MEMBERS] for i in range(4)], np.float32)
ALIASED = {"w_em": W_EM, "w_rm": (W_EM > 0).astype(np.float32), "router": "alias"}
EVERYTHING = tuple(range(N))


def with_novices(kept=(6, 1, 4), k=2, *, hidden=HIDDEN, seed=0, **options):
    novices = np.random.default_rng(seed).standard_normal((N - len(kept), hidden)).astype(np.float32)
    return LayerPlan(N, k, kept=kept, router="whole", novices=novices, **options)


def down_of(r, seed=1):
    return DownProjections(whole=0.2 * np.random.default_rng(seed).standard_normal((r, HIDDEN, INNER)))


PARTS = {
    "skip": LayerPlan(N, 2, kept=EVERYTHING, skip=0.6),
    "skip, k = 4": LayerPlan(N, 4, kept=EVERYTHING, skip=0.5),
    "skip, pruned": LayerPlan(N, 2, kept=(1, 2, 4, 6), skip=0.7),
    "alias, merged": LayerPlan(N, 2, **ALIASED),
    "alias, kept": LayerPlan(N, 2, kept=(1, 2, 4, 6), w_rm=ALIASED["w_rm"], router="alias"),
    "alias, skip": LayerPlan(N, 2, **ALIASED, skip=0.6),
    "novices": with_novices(),
    "novices, k = 1": with_novices(k=1),
    "novices, k = 5, of 3 experts": with_novices(k=5),
    "novices, k = n": with_novices(k=N),
    "novices, skip": with_novices(k=4, skip=0.4),
    "novices, refitted": with_novices(k=3, down=down_of(3)),
    "novices, refitted, skip": with_novices(k=4, down=down_of(3), skip=0.4),
}


def block_of(model, part, layer, hidden):
    """What the block gives, (tokens, hidden), and the mean number of experts that ran."""
    with patched(model, Plan((part,) * 3)) as state, torch.no_grad():
        output = layer.block(hidden[None])
    return (output[0] if isinstance(output, tuple) else output).reshape(hidden.shape), state.active[layer.index]


def outputs_of(layer, part, hidden):
    """(r, tokens, hidden): what each new expert gives, without its gate; merged experts are mixtures of weights."""
    w_em = torch.tensor(part.expert_matrix).double()
    gate_up, down = (
        torch.einsum("rn,nij->rij", w_em, w.detach().double())
        for w in (layer.experts.gate_up_proj, layer.experts.down_proj)
    )
    down = down if part.down is None else torch.tensor(part.down.whole).double()
    gate, up = (hidden.double() @ gate_up.mT).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.mT


def slow(layer, part, hidden):
    """The block's output, (tokens, hidden), and how many experts a token ran on average.

    Token by token, from NAEE's section 3.3 (skipping), HC-SMoE's 3.2 (aliases), and MoNE (novices).
    """
    outputs, ran, rows, numbers = outputs_of(layer, part, hidden), 0, [], list(range(part.experts))
    dropped = [j for j in range(part.experts) if part.kept is None or j not in part.kept]
    if part.router == "alias":
        numbers = part.w_rm.argmax(0).tolist()
    if part.router == "whole":
        numbers = [None if j in dropped else part.kept.index(j) for j in range(part.experts)]
    for t, h in enumerate(hidden):
        p = (h.double() @ layer.router.weight.detach().double().T).softmax(0)
        if part.router == "rows":
            p = p[list(part.kept)] / p[list(part.kept)].sum()
        picked = sorted(range(len(p)), key=lambda j: -float(p[j]))[: part.k]
        weight = {j: float(p[j]) for j in picked if float(p[j]) >= part.skip * float(p[picked[0]])}
        y = torch.zeros(len(h), dtype=torch.float64)
        for j, w in weight.items():
            given = torch.tensor(part.novices[dropped.index(j)]) if numbers[j] is None else outputs[numbers[j], t]
            ran += numbers[j] is not None
            y += w / sum(weight.values()) * given
        rows.append(y)
    return torch.stack(rows).float(), ran / len(hidden)


@pytest.fixture
def hidden():
    return torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", PARTS)
def test_a_block_is_the_loop(make_mixtral, name, backend, hidden):
    model, part = make_mixtral(), PARTS[name]
    model.set_experts_implementation(backend)
    layer = moe_layers(model)[1]
    got, active = block_of(model, part, layer, hidden)
    expected, ran = slow(layer, part, hidden)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert active == pytest.approx(ran)


def test_tokens_that_run_no_expert_at_all(make_mixtral):
    model = make_mixtral()
    layer, part = moe_layers(model)[1], with_novices(kept=(2,), k=1)
    with torch.no_grad():
        layer.router.weight[2] = -100 * layer.router.weight[0]
        hidden = layer.router.weight[:1].repeat(5, 1)
    got, active = block_of(model, part, layer, hidden)
    assert active == 0
    torch.testing.assert_close(got, slow(layer, part, hidden)[0], rtol=1e-5, atol=1e-6)


def test_in_bfloat16_constants_are_added_in_float32(make_mixtral, hidden):
    model, part = make_mixtral(dtype=torch.bfloat16), PARTS["novices"]
    layer, hidden = moe_layers(model)[1], hidden.bfloat16()
    with torch.no_grad():
        _, weights, index = layer.router(hidden)
        alone, _ = block_of(model, replace(part, novices=np.zeros_like(part.novices)), layer, hidden)
    got, _ = block_of(model, part, layer, hidden)
    constants = torch.zeros(N, HIDDEN)
    constants[[0, 2, 3, 5, 7]] = torch.tensor(part.novices)
    expected = alone.float() + (weights.float()[..., None] * constants[index]).sum(1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=1e-6)


def test_negative_weights_are_skipped_by_their_mapped_probability(make_mixtral, hidden):
    model = make_mixtral()
    layer = moe_layers(model)[0]
    w_rm = np.zeros((2, N), np.float32)
    w_rm[0, 0], w_rm[1] = 0.02, -0.5  # a sum below 0: the weights' signs are those of the mapped, turned
    part = LayerPlan(N, 2, kept=(0, 1), w_rm=w_rm, router="prob", negative="eep", skip=0.5)
    first_alone = outputs_of(layer, part, hidden)[0].float()  # with weight 1
    torch.testing.assert_close(block_of(model, part, layer, hidden)[0], first_alone, rtol=1e-4, atol=1e-6)


@pytest.fixture
def ran(make_mixtral, monkeypatch):
    """How many pairs of a token and an expert every call of experts computes."""
    counts, experts = [], type(moe_layers(make_mixtral())[0].experts)
    stock = experts.forward.__wrapped__

    def counting(self, hidden_states, top_k_index, top_k_weights):
        counts.append(top_k_index.numel())
        return stock(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(experts.forward, "__wrapped__", counting)
    return counts


def test_skipped_experts_are_not_run(make_mixtral, ids, ran):
    model = make_mixtral()
    model.set_experts_implementation("eager")
    pairs = ids.numel() * 2 * 3
    for beta, low, high in ((0.9, pairs // 2, int(0.8 * pairs)), (1.0, pairs // 2, pairs // 2)):
        with patched(model, Plan.identity(3, N, 2).with_skip(beta)) as state:
            ran.clear()
            logits(model, ids)
        assert low <= sum(ran) <= high
        assert sum(state.active) * ids.numel() == sum(ran)


def test_experts_that_novices_replace_are_not_run(make_mixtral, hidden, ran):
    model = make_mixtral()
    model.set_experts_implementation("eager")
    layer = moe_layers(model)[1]
    with torch.no_grad():
        layer.experts.down_proj[[0, 2, 3, 5, 7]] = torch.nan
    got, active = block_of(model, PARTS["novices"], layer, hidden)
    assert got.isfinite().all()
    assert ran[-1] == round(active * 40) < 80


def test_a_beta_that_nothing_falls_under_changes_no_bit(make_mixtral, ids):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_mixtral(dtype=dtype)
        expected = logits(model, ids)
        with patched(model, Plan.identity(3, N, 2).with_skip(1e-9)) as state:
            assert torch.equal(logits(model, ids), expected)
        assert state.active == (2.0, 2.0, 2.0)


def test_beta_one_is_one_active_expert(make_mixtral, ids):
    model = make_mixtral()
    with patched(model, Plan.identity(3, N, 2).with_k(1)):
        expected = logits(model, ids)
    with patched(model, Plan.identity(3, N, 2).with_skip(1.0)):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["skip", "novices, skip"])
def test_it_generates_and_leaves_nothing_behind(make_mixtral, ids, snapshot, name):
    model, plan = make_mixtral(), Plan((PARTS[name],) * 3)
    expected = logits(model, ids)
    before = snapshot(model)
    with patched(model, plan):
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        again = greedy(model, ids, 5)
    assert torch.equal(tokens, again)
    assert torch.equal(logits(model, ids), expected)
    assert snapshot(model)[1] == before[1]


def test_families_skip(family, build_family, ids):
    model = build_family(family)
    layers = moe_layers(model)
    everything = Plan.identity(len(layers), layers[0].n, layers[0].k)
    if not hasattr(type(layers[0].experts).forward, "__wrapped__"):
        with pytest.raises(ModelError, match="cannot be skipped"), patched(model, everything.with_skip(0.9)):
            pass
        return
    with patched(model, everything.with_skip(0.9)) as state:
        skipping = logits(model, ids)
    assert skipping.isfinite().all()
    assert not torch.equal(skipping, logits(model, ids))
    assert all(1 <= active < layer.k for active, layer in zip(state.active, layers))


def test_families_take_novices(family, build_family, ids):
    """Constants that are what the experts give to one token: for that token the layer is the full one."""
    model = build_family(family, corrected=True)
    layers = moe_layers(model)
    entering, parts, expected = [], [], []
    for layer in layers:
        entering.append(torch.randn(1, layer.hidden, generator=torch.Generator().manual_seed(layer.index)))
        with torch.no_grad():
            index, ones = (torch.arange(layer.n)[:, None], torch.ones(layer.n, 1))
            outputs = layer.experts(entering[-1].expand(layer.n, -1), index, ones)
            expected.append(layer.block(entering[-1][None]))
        kept = (layer.n - 1, 0)
        parts.append(LayerPlan(layer.n, layer.k, kept=kept, router="whole", novices=outputs[1:-1].numpy()))
    plan = Plan(tuple(parts))
    if not hasattr(type(layers[0].experts).forward, "__wrapped__"):
        with pytest.raises(ModelError, match="cannot be replaced by novices"), patched(model, plan):
            pass
        return
    with patched(model, plan) as state, torch.no_grad():
        for layer, h, output in zip(layers, entering, expected):
            got = layer.block(h[None])
            first = [x[0] if isinstance(x, tuple) else x for x in (got, output)]
            torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)
        assert logits(model, ids).isfinite().all()
    assert all(0 < active < layer.k for active, layer in zip(state.active, layers))


def test_evaluations_reuse_what_two_plans_with_novices_share(make_mixtral, tiny_tokenizer):
    model, (first, other) = make_mixtral(), (with_novices(seed=0), with_novices(seed=1))
    task = moeopt.tasks.TextTask("t", search=[f"{word} sat on the mat" for word in ("a cat", "the dog", "no one")])
    evaluator = moeopt.Evaluator(model, tiny_tokenizer, task)
    for plan in (Plan((first, first, first)), Plan((first, first, other)), Plan((first, other, first))):
        alone = moeopt.Evaluator(model, tiny_tokenizer, task, prefix_memory=0).evaluate(plan)
        evaluation = evaluator.evaluate(plan)
        assert evaluation.losses.tolist() == alone.losses.tolist()
        assert evaluation.active == pytest.approx(alone.active)
        assert 0 < alone.active < 2


def test_the_balancing_loss_is_that_of_all_that_the_router_picks_among(make_mixtral, ids):
    model = make_mixtral()
    with torch.no_grad(), patched(model, Plan((PARTS["novices"],) * 3)):
        output = model(ids, output_router_logits=True)
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    assert output.router_logits[0].shape[1] == N
    assert torch.equal(output.aux_loss, function(output.router_logits, N, 2, None))


def test_novices_of_another_width_are_refused(make_mixtral):
    plan = Plan((with_novices(), with_novices(hidden=31), with_novices()))
    model, message = make_mixtral(), r"layer 1 of the plan has novices of 31 numbers.*have 32"
    with pytest.raises(PlanError, match=message), patched(model, plan):
        pass


def test_shares_of_activation_are_those_of_experts(make_mixtral, tiny_tokenizer):
    model = make_mixtral()
    task = moeopt.tasks.TextTask("t", search=["a text of some words and more of them " * 2] * 2)
    calibration = moeopt.methods.Calibration(model, tiny_tokenizer, task)
    for name in ("novices", "novices, refitted"):
        with patched(model, Plan((PARTS[name],) * 3)) as state, torch.no_grad():
            for batch in calibration.batches:
                model(batch.ids, attention_mask=batch.mask)
        shares = moeopt.results.analysis.activation_shares(calibration, Plan((PARTS[name],) * 3))
        np.testing.assert_allclose(np.nansum(shares, axis=1), state.active, rtol=1e-6)
        assert np.isnan(shares[:, [0, 2, 3, 5, 7]]).all()
