"""Novices: constants in place of experts that a whole router still picks, against a loop over tokens."""

from __future__ import annotations

import sys
from dataclasses import replace

import accelerate
import numpy as np
import pytest
import torch
from models.conftest import greedy, logits

import moeopt
from moeopt.errors import ModelError, PlanError
from moeopt.models import moe_layers, patched
from moeopt.plan import DownProjections, LayerPlan, Plan

N, HIDDEN, INNER = 8, 32, 48


def layer_plan(kept=(6, 1, 4), k=2, *, n=N, hidden=HIDDEN, seed=0, **options):
    novices = np.random.default_rng(seed).standard_normal((n - len(kept), hidden)).astype(np.float32)
    return LayerPlan(n, k, kept=kept, router="whole", novices=novices, **options)


def down_of(r, seed=1):
    return DownProjections(whole=0.2 * np.random.default_rng(seed).standard_normal((r, HIDDEN, INNER)))


PARTS = {
    "k = 2": layer_plan(),
    "k = 1": layer_plan(k=1),
    "k = 5, of 3 experts": layer_plan(k=5),
    "k = n": layer_plan(k=N),
    "skipping": layer_plan(k=4, skip=0.4),
    "refitted": layer_plan(k=3, down=down_of(3)),
    "refitted, skipping": layer_plan(k=4, down=down_of(3), skip=0.4),
}


def block_of(model, part, layer, hidden):
    with patched(model, Plan((part,) * 3)) as state, torch.no_grad():
        output = layer.block(hidden[None])
    return (output[0] if isinstance(output, tuple) else output).reshape(hidden.shape), state.active[layer.index]


def outputs_of(layer, part, hidden):
    """(r, tokens, hidden): what each expert kept gives, without its gate, with a plan's down projections if any."""
    found = []
    for i, j in enumerate(part.kept):
        gate, up = layer.experts.gate_up_proj[j].detach().double().chunk(2)
        down = layer.experts.down_proj[j].detach() if part.down is None else torch.tensor(part.down.whole[i])
        x = hidden.double()
        found.append((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.double().T)
    return torch.stack(found)


def slow(layer, part, hidden):
    """The block's output, (tokens, hidden), and how many experts a token ran on average."""
    outputs, ran, found = outputs_of(layer, part, hidden), 0, []
    dropped = [j for j in range(part.experts) if j not in part.kept]
    for t, h in enumerate(hidden):
        p = (h.double() @ layer.router.weight.detach().double().T).softmax(0)
        picked = sorted(range(part.experts), key=lambda j: -float(p[j]))[: part.k]
        weight = {j: float(p[j]) for j in picked if float(p[j]) >= part.skip * float(p[picked[0]])}
        y = torch.zeros(len(h), dtype=torch.float64)
        for j, w in weight.items():
            constant = j in dropped
            given = torch.tensor(part.novices[dropped.index(j)]) if constant else outputs[part.kept.index(j), t]
            y += w / sum(weight.values()) * given
            ran += not constant
        found.append(y)
    return torch.stack(found).float(), ran / len(hidden)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", PARTS)
def test_a_block_is_the_loop(make_mixtral, name, backend):
    model, part = make_mixtral(), PARTS[name]
    model.set_experts_implementation(backend)
    layer = moe_layers(model)[1]
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(3))
    got, active = block_of(model, part, layer, hidden)
    expected, ran = slow(layer, part, hidden)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert active == pytest.approx(ran)


def test_experts_that_are_not_kept_do_not_run(make_mixtral, monkeypatch):
    model, part = make_mixtral(), PARTS["k = 2"]
    model.set_experts_implementation("eager")
    layer = moe_layers(model)[1]
    with torch.no_grad():
        layer.experts.down_proj[[0, 2, 3, 5, 7]] = torch.nan
    ran = []
    own = type(layer.experts).forward.__wrapped__

    def counting(self, hidden_states, top_k_index, top_k_weights):
        ran.append(top_k_index.numel())
        return own(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(type(layer.experts).forward, "__wrapped__", counting)
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(3))
    got, active = block_of(model, part, layer, hidden)
    assert got.isfinite().all()
    assert ran[-1] == round(active * 40) < 80


def test_tokens_that_run_no_expert_at_all(make_mixtral):
    model = make_mixtral()
    layer, part = moe_layers(model)[1], layer_plan(kept=(2,), k=1)
    with torch.no_grad():
        layer.router.weight[2] = -100 * layer.router.weight[0]
        hidden = layer.router.weight[:1].repeat(5, 1)
    got, active = block_of(model, part, layer, hidden)
    assert active == 0
    torch.testing.assert_close(got, slow(layer, part, hidden)[0], rtol=1e-5, atol=1e-6)


def test_in_bfloat16_constants_are_added_in_float32(make_mixtral):
    model, part = make_mixtral(dtype=torch.bfloat16), PARTS["k = 2"]
    layer = moe_layers(model)[1]
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        _, weights, index = layer.router(hidden)
        alone, _ = block_of(model, replace(part, novices=np.zeros_like(part.novices)), layer, hidden)
    got, _ = block_of(model, part, layer, hidden)
    constants = torch.zeros(N, HIDDEN)
    constants[[0, 2, 3, 5, 7]] = torch.tensor(part.novices)
    expected = alone.float() + (weights.float()[..., None] * constants[index]).sum(1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=1e-6)


def test_families(family, build_family, ids):
    """Constants that are what the experts give to one token: for that token the layer is the full one."""
    model = build_family(family, corrected=True)
    layers = moe_layers(model)
    hidden, parts, expected = [], [], []
    for layer in layers:
        hidden.append(torch.randn(1, layer.hidden, generator=torch.Generator().manual_seed(layer.index)))
        with torch.no_grad():
            index, one = (torch.arange(layer.n)[:, None], torch.ones(layer.n, 1))
            outputs = layer.experts(hidden[-1].expand(layer.n, -1), index, one)
            expected.append(layer.block(hidden[-1][None]))
        kept = (layer.n - 1, 0)
        parts.append(LayerPlan(layer.n, layer.k, kept=kept, router="whole", novices=outputs[1:-1].numpy()))
    plan = Plan(tuple(parts))
    if not hasattr(type(layers[0].experts).forward, "__wrapped__"):
        with pytest.raises(ModelError, match="cannot be replaced by novices"), patched(model, plan):
            pass
        return
    with patched(model, plan) as state, torch.no_grad():
        for layer, h, output in zip(layers, hidden, expected):
            got = layer.block(h[None])
            first = [x[0] if isinstance(x, tuple) else x for x in (got, output)]
            torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)
        assert logits(model, ids).isfinite().all()
    assert all(0 < active < layer.k for active, layer in zip(state.active, layers))


def test_offloaded_models_give_the_same_bits(make_mixtral, ids):
    for name in ("k = 2", "refitted, skipping"):
        plan = Plan((PARTS[name],) * 3)
        model = make_mixtral()
        with patched(model, plan):
            expected = logits(model, ids)
        away = accelerate.cpu_offload(make_mixtral(), execution_device=torch.device("cpu"))
        with patched(away, plan):
            assert torch.equal(logits(away, ids), expected)


def test_it_generates_and_leaves_nothing_behind(make_mixtral, ids, snapshot):
    model, plan = make_mixtral(), Plan((PARTS["skipping"],) * 3)
    expected = logits(model, ids)
    before = snapshot(model)
    with patched(model, plan):
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        again = greedy(model, ids, 5)
    assert torch.equal(tokens, again)
    assert torch.equal(logits(model, ids), expected)
    assert snapshot(model)[1] == before[1]


def test_evaluations_reuse_what_two_plans_share(make_mixtral, tiny_tokenizer):
    model, (first, other) = make_mixtral(), (layer_plan(seed=0), layer_plan(seed=1))
    task = moeopt.tasks.TextTask("t", search=[f"{word} sat on the mat" for word in ("a cat", "the dog", "no one")])
    evaluator = moeopt.Evaluator(model, tiny_tokenizer, task)
    for plan in (Plan((first, first, first)), Plan((first, first, other)), Plan((first, other, first))):
        alone = moeopt.Evaluator(model, tiny_tokenizer, task, prefix_memory=0).evaluate(plan)
        found = evaluator.evaluate(plan)
        assert found.losses.tolist() == alone.losses.tolist()
        assert found.active == pytest.approx(alone.active)
        assert 0 < alone.active < 2


def test_the_balancing_loss_is_that_of_all_that_the_router_picks_among(make_mixtral, ids):
    model = make_mixtral()
    with torch.no_grad(), patched(model, Plan((PARTS["k = 2"],) * 3)):
        output = model(ids, output_router_logits=True)
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    assert output.router_logits[0].shape[1] == N
    assert torch.equal(output.aux_loss, function(output.router_logits, N, 2, None))


def test_novices_of_another_width_are_refused(make_mixtral):
    plan = Plan((layer_plan(), layer_plan(hidden=31), layer_plan()))
    model, message = make_mixtral(), r"layer 1 of the plan has novices of 31 numbers.*have 32"
    with pytest.raises(PlanError, match=message), patched(model, plan):
        pass


def test_shares_of_activation_are_those_of_experts(make_mixtral, tiny_tokenizer):
    model = make_mixtral()
    task = moeopt.tasks.TextTask("t", search=["a text of some words and more of them " * 2] * 2)
    calibration = moeopt.methods.Calibration(model, tiny_tokenizer, task)
    for name in ("k = 2", "refitted"):
        with patched(model, Plan((PARTS[name],) * 3)) as state, torch.no_grad():
            for batch in calibration.batches:
                model(batch.ids, attention_mask=batch.mask)
        shares = moeopt.results.analysis.activation_shares(calibration, Plan((PARTS[name],) * 3))
        np.testing.assert_allclose(np.nansum(shares, axis=1), state.active, rtol=1e-6)
        assert np.isnan(shares[:, [0, 2, 3, 5, 7]]).all()
