"""Patching: a plan computes what the paper and a stock small checkpoint compute, and leaves no trace."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from models.conftest import logits

from moeopt.errors import ModelError, PlanError
from moeopt.models import MergedCache, moe_layers, patched, plan_in_force, shape_of, without_plan
from moeopt.models.merging import merged_view
from moeopt.plan import LayerPlan, ModelShape, Plan

KEPT = [[0, 3, 5, 6], [7, 1, 2, 4], [1, 2, 3, 4]]
BACKENDS = ["grouped_mm", "eager"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def model(request, backend, make_mixtral):
    model = make_mixtral(dtype=request.param)
    model.set_experts_implementation(backend)
    return model


@pytest.fixture
def stock(model, backend, make_mixtral, shrunk):
    """A freshly built stock Mixtral of four experts with a plan's weights."""

    def make(plan):
        small = make_mixtral(experts=plan.layers[0].kept_experts, k=plan.layers[0].k, seed=5, dtype=model.dtype)
        small.set_experts_implementation(backend)
        return shrunk(model, small, plan)

    return make


def test_identity_changes_no_bit(model, ids):
    expected = logits(model, ids)
    dense = LayerPlan(8, 2, w_em=np.eye(8), w_rm=np.eye(8), router="prob")
    for plan in (Plan.identity(3, 8, 2), Plan((dense,) * 3)):
        with patched(model, plan):
            assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("router", ["rows", "prob", "logit"])
def test_reordering_experts_and_mapping_one_hot_change_at_most_the_rounding(make_mixtral, ids, router):
    model, backwards = make_mixtral(), np.eye(8)[::-1]
    everything = LayerPlan(8, 2, w_em=backwards, w_rm=backwards, router=router)
    pruning = Plan.one_hot(KEPT, experts=8, k=2)
    for plan, same in ((Plan((everything,) * 3), None), (Plan.one_hot(KEPT, experts=8, k=2, router=router), pruning)):
        with patched(model, same or Plan.identity(3, 8, 2)):
            expected = logits(model, ids)
        with patched(model, plan):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


STOCK = {
    "pruned": lambda dense: Plan.one_hot(KEPT, experts=8, k=2),
    "fewer active": lambda dense: Plan.identity(3, 8, 2).with_k(1),
    **{f"merged, logits mapped, k = {k}": lambda dense, k=k: dense(router="logit", k=k) for k in (1, 2, 4)},
    "merged, rows of the router": lambda dense: Plan(
        tuple(LayerPlan(8, 2, w_em=p.w_em, w_rm=np.eye(8)[rows]) for p, rows in zip(dense(router="prob").layers, KEPT))
    ),
}


@pytest.mark.parametrize("kind", STOCK)
def test_a_plan_equals_the_stock_small_model_of_its_weights(model, ids, stock, dense_plan, kind):
    plan = STOCK[kind](dense_plan)
    with patched(model, plan):
        assert torch.equal(logits(model, ids), logits(stock(plan), ids))


def by_the_paper(block, part, hidden):
    """EEP, section 3.2, one token at a time: y = sum over top-k of p'_i / sum p' times the merged expert's output."""
    act, experts = block.experts.act_fn, block.experts
    w_em, w_rm = (torch.tensor(matrix) for matrix in (part.expert_matrix, part.router_matrix))
    gate_up = torch.einsum("rn,nij->rij", w_em, experts.gate_up_proj)
    down = torch.einsum("rn,nij->rij", w_em, experts.down_proj)
    rows, zero = [], 0
    for x in hidden:
        p = w_rm @ torch.softmax(block.gate.weight @ x, dim=0)
        if part.negative == "clamp":
            p = p.clamp(min=0)
        chosen = p.argsort(descending=True)[: part.k]
        y = torch.zeros_like(x)
        if p[chosen].sum() == 0:
            zero += 1
        else:
            for i in chosen:
                gate, up = (gate_up[i] @ x).chunk(2)
                y += p[i] / p[chosen].sum() * (down[i] @ (act(gate) * up))
        rows.append(y)
    return torch.stack(rows), zero


@pytest.mark.parametrize("negative", ["clamp", "eep"])
@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_mapped_probabilities_follow_the_paper(make_mixtral, dense_plan, negative, k):
    model = make_mixtral(layers=1)
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    block = moe_layers(model)[0].block
    plan = dense_plan(layers=1, k=k, scale=0.05, router="prob", negative=negative)
    expected, _ = by_the_paper(block, plan.layers[0], hidden)
    with patched(model, plan):
        torch.testing.assert_close(block(hidden[None])[0], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_tokens_left_without_experts_are_zero_and_counted(make_mixtral):
    model = make_mixtral(layers=2)
    w_rm = np.zeros((4, 8), np.float32)
    w_rm[:, :2] = 1
    w_rm[:, 2:] = -1
    w_rm *= np.array([[4], [3], [2], [1]])
    part = LayerPlan(8, 2, w_em=np.eye(8)[:4] + 0.1, w_rm=w_rm, router="prob")
    plan = Plan((LayerPlan(8, 2, kept=tuple(range(8))), part))
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    block = moe_layers(model)[1].block
    expected, zero = by_the_paper(block, part, hidden)
    assert 0 < zero < 50
    with patched(model, plan) as patch:
        output = block(hidden[None])[0]
        assert patch.zero_tokens == (0, zero)
        block(hidden[None])
        assert patch.zero_tokens == (0, 2 * zero)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    assert int((output == 0).all(-1).sum()) == zero


@pytest.mark.parametrize("kind", ["prob", "logit"])
def test_nothing_of_the_model_changes(make_mixtral, ids, dense_plan, snapshot, kind):
    model = make_mixtral()
    logits(model, ids, output_router_logits=True)  # transformers leaves hooks of its own at the first such call
    before, expected = snapshot(model), logits(model, ids)
    with patched(model, dense_plan(router=kind)):
        inside = snapshot(model)
        assert not torch.equal(logits(model, ids), expected)
        assert inside[0] == before[0]
        assert shape_of(model) == ModelShape(3, 8, 2)
    assert snapshot(model) == before
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(KeyError), patched(model, dense_plan(router=kind)):
        raise KeyError
    assert snapshot(model) == before


def test_the_inner_plan_replaces_the_outer_one_which_is_back_after(make_mixtral, ids, dense_plan, snapshot):
    model = make_mixtral()
    before = snapshot(model)
    outer, inner = dense_plan(router="prob"), Plan.one_hot(KEPT, experts=8, k=2)
    with patched(model, inner):
        alone = logits(model, ids)
    with patched(model, outer):
        expected = logits(model, ids)
        with patched(model, inner):
            assert torch.equal(logits(model, ids), alone)
        assert torch.equal(logits(model, ids), expected)
        with pytest.raises(PlanError), patched(model, Plan.identity(2, 8, 2)):
            pass
        assert torch.equal(logits(model, ids), expected)
    assert snapshot(model) == before


def test_two_models_are_patched_independently(make_mixtral, ids, dense_plan):
    first, second = make_mixtral(seed=1), make_mixtral(seed=2)
    plan, expected = dense_plan(router="prob"), logits(second, ids)
    with patched(first, plan):
        alone = logits(first, ids)
        assert torch.equal(logits(second, ids), expected)
        with patched(second, Plan.one_hot(KEPT, experts=8, k=2)):
            assert torch.equal(logits(first, ids), alone)


def test_where_weights_lie_and_cache_agree_and_unchanged_layers_are_not_merged_again(make_mixtral, ids, dense_plan):
    model, cache = make_mixtral(), MergedCache()
    plan = dense_plan(router="prob")
    changed = Plan((plan.layers[0], dense_plan(router="prob", seed=1).layers[1], plan.layers[2]))
    wider = dense_plan(router="prob", r=6, seed=2)
    for each, merges in ((plan, 3), (plan, 3), (changed, 4), (plan, 5), (wider, 8), (plan, 11)):
        outputs = []
        for options in ({"cache": cache}, {"merged_weights": "scratch"}, {"merged_weights": "resident"}):
            with patched(model, each, **options):
                outputs.append(logits(model, ids))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
        assert cache.merges == merges
    assert cache.nbytes == sum(t.nbytes for x in moe_layers(model) for t in x.experts.parameters()) // 2
    with torch.no_grad():
        moe_layers(model)[0].experts.down_proj.mul_(2)
    with patched(model, plan, cache=cache):
        again = logits(model, ids)
    with patched(model, plan):
        assert torch.equal(logits(model, ids), again)


def test_buffers_born_in_inference_mode_can_be_written_outside(make_mixtral, ids, dense_plan):
    model, cache = make_mixtral(), MergedCache()
    for seed in (0, 1):
        with torch.inference_mode(), patched(model, dense_plan(router="prob", seed=seed), cache=cache):
            model(ids)
    with patched(model, dense_plan(router="prob"), cache=cache):
        got = logits(model, ids)
    with patched(model, dense_plan(router="prob")):
        assert torch.equal(logits(model, ids), got)


@pytest.mark.parametrize("attention", [None, "left"])
def test_generation_equals_that_of_the_stock_small_model(make_mixtral, ids, shrunk, dense_plan, attention):
    model = make_mixtral()
    mask = torch.ones_like(ids)
    if attention == "left":
        mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for plan in (Plan.one_hot(KEPT, experts=8, k=2), dense_plan(router="logit")):
        small = shrunk(model, make_mixtral(experts=4, seed=5), plan)
        expected = small.generate(ids, **options)
        assert expected.shape == (2, 21)
        with patched(model, plan):
            assert torch.equal(model.generate(ids, **options), expected)


def test_router_logits_keep_the_full_width(make_mixtral, ids, dense_plan):
    model = make_mixtral()
    first = model(ids, output_router_logits=True).router_logits[0]
    with patched(model, dense_plan(router="prob")):
        output = model(ids, output_router_logits=True).router_logits
    assert [tuple(x.shape) for x in output] == [(26, 8)] * 3
    assert torch.equal(output[0], first)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["rows", "logit"])
def test_the_auxiliary_loss_is_that_of_the_small_model(make_mixtral, shrunk, ids, dense_plan, kind, labelled):
    model = make_mixtral()
    plan = Plan.one_hot(KEPT, experts=8, k=1) if kind == "rows" else dense_plan(router="logit")
    k = plan.layers[0].k
    small = shrunk(model, make_mixtral(experts=4, seed=5, k=k), plan)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    options = {"attention_mask": mask, "output_router_logits": True, "labels": ids if labelled else None}
    with torch.no_grad():
        expected, before = small(ids, **options), model(ids, **options)
        with patched(model, plan):
            output = model(ids, **options)
        after = model(ids, **options)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    assert abs(float(before.aux_loss - expected.aux_loss)) > 1e-3
    assert torch.equal(after.aux_loss, before.aux_loss)
    if labelled:
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)


def test_the_auxiliary_loss_of_mapped_probabilities_and_uneven_layers(make_mixtral, ids):
    model = make_mixtral()

    def loss(plan):
        with torch.no_grad(), patched(model, plan):
            return model(ids, output_router_logits=True).aux_loss

    whole = [[0, 3, 5, 6, 7, 1, 2, 4]] * 3
    torch.testing.assert_close(
        loss(Plan.one_hot(whole, experts=8, k=2, router="prob")), loss(Plan.one_hot(whole, experts=8, k=2))
    )
    uneven = Plan(tuple(LayerPlan(8, min(2, r), kept=tuple(range(r))) for r in (1, 4, 8)))
    with torch.no_grad(), patched(model, uneven):
        logits = model(ids, output_router_logits=True).router_logits
    each = []
    for r, layer in zip((1, 4, 8), logits):
        p = layer[:, :r].softmax(-1)
        picks = torch.zeros_like(p).scatter(1, p.topk(min(2, r)).indices, 1.0)
        each.append(r * (picks.mean(0) * p.mean(0)).sum())
    torch.testing.assert_close(loss(uneven), torch.stack(each).mean())


def test_a_plan_for_another_model_is_refused(make_mixtral):
    model = make_mixtral()
    with pytest.raises(PlanError, match="for 2 MoE layers, the model has 3"), patched(model, Plan.identity(2, 8, 2)):
        pass
    with pytest.raises(PlanError, match=r"layer 0 .* for 4 experts, model\.layers\.0\.mlp has 8"):  # noqa: SIM117
        with patched(model, Plan.identity(3, 4, 2)):
            pass


def in_float8(experts):
    """Of a class that keeps its weights in float8 and runs as floats."""
    base = type(experts)

    def forward(self, *args):
        return base.forward(merged_view(self, {name: t.float() for name, t in self.named_parameters()}, 8), *args)

    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False))
    experts.__class__ = type("InFloat8", (base,), {"forward": forward})


def test_quantised_experts_are_not_merged_but_may_be_pruned(make_mixtral, ids, dense_plan):
    model, plain = make_mixtral(), make_mixtral()
    for layer, other in zip(moe_layers(model), moe_layers(plain)):
        in_float8(layer.experts)
        with torch.no_grad():
            for weight in other.experts.parameters():
                weight.copy_(weight.to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match="quantised and cannot be merged"), patched(model, dense_plan(router="prob")):
        pass
    plan = Plan.one_hot(KEPT, experts=8, k=2)
    with patched(model, plan), patched(plain, plan):
        assert torch.equal(logits(model, ids), logits(plain, ids))


def integers(experts):
    packed = experts.gate_up_proj.detach().to(torch.int8)
    experts.gate_up_proj = torch.nn.Parameter(packed, requires_grad=False)


def deaf(experts):
    """Of a class that does not dispatch."""
    experts.__class__ = type("Deaf", (type(experts),), {"forward": type(experts).forward.__wrapped__})


def closed(experts):
    """Of a class that is not known to run what it is told to."""
    base = type(experts)
    experts.__class__ = type("Closed", (base,), {"forward": lambda self, *args: base.forward.__wrapped__(self, *args)})


def test_experts_that_do_not_dispatch_are_merged_all_the_same(make_mixtral, ids, dense_plan):
    model, other = make_mixtral(), make_mixtral()
    other.set_experts_implementation("eager")
    for layer in moe_layers(model):
        deaf(layer.experts)
    before = vars(moe_layers(model)[0].experts).copy()
    with patched(model, dense_plan(router="prob")), patched(other, dense_plan(router="prob")):
        assert torch.equal(logits(model, ids), logits(other, ids))
        with patched(model, Plan.one_hot(KEPT, experts=8, k=2).with_skip(0.5)) as state:
            logits(model, ids)
            assert max(state.active) < 2
    assert vars(moe_layers(model)[0].experts) == before
    assert torch.equal(logits(model, ids), logits(other, ids))


@pytest.mark.parametrize(
    ("change", "message"), [(integers, "mlp"), (closed, "not called with expert numbers and weights")]
)
def test_experts_that_cannot_be_merged_are_refused(make_mixtral, dense_plan, change, message):
    model = make_mixtral()
    for layer in moe_layers(model):
        change(layer.experts)
    plans = [dense_plan(router="prob")]
    plans += [Plan.one_hot(KEPT, experts=8, k=2)] * (change is integers)  # whose block does not even run
    for plan in plans:
        with pytest.raises(ModelError, match=message), patched(model, plan):
            pass


def test_a_block_that_bypasses_its_router_is_refused(make_mixtral):
    model = make_mixtral()
    block = moe_layers(model)[0].block
    block.forward = lambda hidden: hidden + block.gate.forward(hidden)[1].sum()
    with pytest.raises(ModelError, match="does not call its router"), patched(model, Plan.identity(3, 8, 2)):
        pass


def test_a_patched_model_can_be_freed(make_mixtral, ids, dense_plan):
    model = make_mixtral()
    cache = MergedCache()
    with patched(model, dense_plan(router="prob"), cache=cache):
        logits(model, ids)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert cache.nbytes == 0


def test_without_a_plan_stays_so_after_an_inner_one(make_mixtral, ids):
    model, outer = make_mixtral(), Plan.one_hot(KEPT, experts=8, k=2)
    plain = logits(model, ids)
    with patched(model, outer):
        pruned = logits(model, ids)
        with without_plan(model):
            assert torch.equal(logits(model, ids), plain)
            with patched(model, outer.with_k(1)):
                assert not torch.equal(logits(model, ids), plain)
            assert torch.equal(logits(model, ids), plain)
            assert plan_in_force(model) is None
        assert torch.equal(logits(model, ids), pruned)
