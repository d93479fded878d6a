"""Refits: the fitted weights are the ridge regression's, in every family, and a plan with them is like any other."""

from __future__ import annotations

from dataclasses import replace

import accelerate
import numpy as np
import pytest
import torch
from exporting.conftest import build_plans

import moeopt
from moeopt.errors import MethodError, PlanError
from moeopt.evaluation import Evaluator
from moeopt.evaluation.memory import merged_bytes
from moeopt.methods import Calibration, refitting
from moeopt.methods.refitting import HELD_OUT, refit
from moeopt.methods.ridge import Gram, Rows, solved
from moeopt.models import moe_layers, patched
from moeopt.plan import DownProjections, LayerPlan, Plan
from moeopt.results import analysis
from moeopt.tasks import TextTask


@pytest.fixture(scope="module")
def text():
    rows = ["".join(chr(40 + i * j % 83) for i in range(59 - j)) for j in range(1, 25)]
    return TextTask("text", search=rows, window=60)


def halved(model):
    layers = moe_layers(model)
    n, k = layers[0].n, layers[0].k
    return Plan.one_hot([[(i + j) % n for j in range(4)] for i in range(len(layers))], experts=n, k=k)


def with_novices(plan, hidden):
    """The same prunings, with constants of their own in place of each layer's other experts."""
    rng = np.random.default_rng(0)
    constants = [rng.standard_normal((p.experts - p.kept_experts, hidden)).astype(np.float32) for p in plan.layers]
    return Plan(tuple(replace(p, router="whole", novices=c) for p, c in zip(plan.layers, constants)))


def gaps(model, calibration, plan, depth=1):
    """Of every batch, how far the hidden states behind decoder layer `depth` are from the full model's."""
    distances = []
    with torch.no_grad():
        for batch in calibration.batches:
            run = {"output_hidden_states": True, **batch.inputs(torch.device("cpu"))}
            states = model(**run).hidden_states
            with patched(model, plan):
                small = model(**run).hidden_states
            distances.append((states[depth] - small[depth])[batch.mask.bool()].double())
    return torch.cat(distances)


def down_of(model, plan, layer):
    """What the plan makes of a layer's down projections, (r, hidden, inner)."""
    with patched(model, replace_down(plan, layer, None)) as inside:
        experts = inside.layers[layer].experts
    part = plan.layers[layer]
    tensor = experts.down_proj.detach()
    tensor = tensor.mT if getattr(experts, "is_transposed", False) else tensor
    return np.einsum("rn,nhi->rhi", part.expert_matrix, tensor.numpy())


def replace_down(plan, layer, whole):
    down = None if whole is None else DownProjections(whole=whole)
    return Plan(tuple(replace(part, down=down) if i == layer else part for i, part in enumerate(plan.layers)))


@pytest.mark.slow
@pytest.mark.parametrize("novices", [False, True])
def test_the_fit_is_the_ridge_regression_in_every_family(family, novices, build_family, tiny_tokenizer, text):
    """The objective is quadratic in W2: where it is least, a step in any direction costs as much as its opposite."""
    model = build_family(family, vocabulary=300, corrected=True)
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    plan = with_novices(plan, moe_layers(model)[0].hidden) if novices else plan
    rng = np.random.default_rng(0)
    first = refit(plan, calibration, ridges=[1.0])
    fit = first.layers[0]
    assert fit.ridge == 1.0
    assert fit.after < fit.before
    plan = replace_down(plan, 0, first.plan.layers[0].down.whole)
    before = down_of(model, plan, 0)

    def cost(step):
        whole = plan.layers[0].down.whole + np.float32(step)
        gap = gaps(model, calibration, replace_down(plan, 0, whole))
        return float(gap.square().sum()), float(((whole.astype(np.float64) - before) ** 2).sum())

    slopes = []
    for _ in range(2):
        step = 0.05 * rng.standard_normal(before.shape)
        ups, downs = cost(step), cost(-step)
        curvature = ups[0] + downs[0] - 2 * cost(0)[0]
        slopes.append(((ups[0] - downs[0]) / curvature, (ups[1] - downs[1]) / curvature))
    # d gap / d step + lam d penalty / d step = 0, with one lam for all directions
    lams = [-gap / penalty for gap, penalty in slopes]
    assert lams[0] == pytest.approx(lams[1], rel=0.02)
    assert lams[0] > 0


@pytest.mark.parametrize("kind", [Gram, Rows])
def test_products_give_the_ridge_regression(kind):
    torch.manual_seed(0)
    a, r = torch.randn(60, 40), torch.randn(60, 5)
    fitted, held = kind(40, 5), kind(40, 5)
    for rows in (slice(0, 20), slice(20, 45)):
        fitted.add(a[rows], r[rows])
    held.add(a[45:], r[45:])
    d = fitted.solution(0.3)
    first, target = a[:45].double(), r[:45].double()
    expected = torch.linalg.solve(first.T @ first + 0.3 * torch.eye(40), first.T @ target)
    torch.testing.assert_close(d.double(), expected, rtol=1e-4, atol=1e-5)
    assert held.left(d) == pytest.approx(float((r[45:] - a[45:] @ d).square().sum()), rel=1e-4)
    assert fitted.scale == pytest.approx(float(first.square().sum()) / 40, rel=1e-5)
    both = fitted.joined(held).solution(0.3)
    expected = torch.linalg.solve(a.T @ a + 0.3 * torch.eye(40), a.T @ r)
    torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-4)


def test_a_matrix_that_float32_cannot_solve_is_solved_in_float64():
    torch.manual_seed(0)
    a = torch.randn(50, 30) * torch.logspace(-4, 4, 30)
    x = solved(a.T @ a, a.T @ torch.ones(50, 1), 1e-3)
    assert x.isfinite().all()


def test_experts_a_few_at_a_time_come_near_to_all_at_once(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    whole, few = (refit(plan, calibration, columns=columns) for columns in (8192, 100))
    for first, other in zip(whole.layers, few.layers):
        assert other.after < other.before
        assert other.after < first.after + 0.25 * (first.before - first.after)
    assert few.layer_tokens > whole.layer_tokens


@pytest.mark.parametrize("family", ["granitemoe", "minimax"])
def test_what_scales_the_layer_s_output_is_found_out(family, build_family, tiny_tokenizer, text):
    """Twice the residual multiplier: half the gap is left to explain, and the same weights are fitted."""
    factors = {"granitemoe": ("residual_multiplier", 0.25), "minimax": ("mlp_beta_factor", 0.25)}
    model = build_family(family, vocabulary=300)
    name, value = factors[family]
    for layer in model.model.layers:
        assert hasattr(layer, name)
        setattr(layer, name, value)
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    made = refit(plan, calibration, ridges=[1.0])
    assert [fit.factor for fit in made.layers] == pytest.approx([value] * 2, rel=1e-3)
    assert made.layers[0].after < made.layers[0].before
    before, after = (float(gaps(model, calibration, p).square().sum()) for p in (plan, made.plan))
    assert after / before == pytest.approx(made.layers[0].after / made.layers[0].before, abs=0.15)


def test_where_a_norm_follows_the_experts_the_layer_alone_is_fitted(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    for layer in moe_layers(model):
        layer.block.register_forward_hook(lambda _module, _args, y: torch.nn.functional.rms_norm(y, y.shape[-1:]))
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    made = refit(plan, calibration)
    assert [fit.factor for fit in made.layers] == [None] * 3
    assert all(fit.after < fit.before for fit in made.layers if fit.ridge is not None)
    assert made.plan.is_refitted


def test_a_full_rank_is_the_whole_change_and_a_low_one_is_nearly_as_good(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    whole, full, low = (refit(plan, calibration, rank=rank, ridges=[0.3]) for rank in (None, 32, 4))
    ids = calibration.batches[0].ids
    outputs = []
    for made in (whole, full, low):
        with torch.no_grad(), patched(model, made.plan):
            outputs.append(model(ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    assert low.plan.nbytes < full.plan.nbytes
    assert low.plan.layers[0].down.rank == 4
    assert low.layers[0].after < low.layers[0].before


@pytest.mark.parametrize("kind", list(build_plans()))
def test_every_kind_of_plan_can_be_refitted(kind, make_mixtral, tiny_tokenizer, text):
    model, plan = make_mixtral(experts=6), build_plans()[kind]
    calibration = Calibration(model, tiny_tokenizer, text)
    made = refit(plan, calibration)
    assert all(fit.after < fit.before for fit in made.layers if fit.ridge is not None)
    assert any(fit.ridge is not None for fit in made.layers)
    before, after = (float(gaps(model, calibration, p, 3).square().sum()) for p in (plan, made.plan))
    assert after < before
    routing = ("k", "skip", "router", "negative", "kept", "aliases")
    for part, old in zip(made.plan.layers, plan.layers):
        assert all(getattr(part, name) == getattr(old, name) for name in routing)
        assert np.array_equal(part.novices, old.novices)


def test_a_refitted_plan_can_be_refitted_again(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    calibration = Calibration(model, tiny_tokenizer, text)
    once = refit(halved(model), calibration, ridges=[1.0], rank=4)
    twice = refit(once.plan, calibration, ridges=[1.0], rank=4)
    assert twice.layers[0].before == pytest.approx(once.layers[0].after, rel=0.6)
    assert twice.plan.layers[0].down.whole is not None
    assert twice.layers[0].after < twice.layers[0].before


def test_a_layer_that_does_not_get_better_keeps_its_weights_and_that_is_said(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    plan = Plan.identity(3, 8, 2)
    made = refit(plan, Calibration(model, tiny_tokenizer, text))
    assert made.plan == plan
    assert not made.plan.is_refitted
    assert [fit.ridge for fit in made.layers] == [None] * 3
    assert "keep their weights: layers 0, 1, 2" in " ".join(made.lines())


def test_the_model_is_left_as_it_was_and_padding_does_not_count(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    plan = halved(model)
    ids = torch.arange(40)[None]
    before = model(ids).logits
    first, other = (refit(plan, Calibration(model, tiny_tokenizer, text, batch_tokens=b)) for b in (30, 4000))
    assert torch.equal(model(ids).logits, before)
    for a, b in zip(first.plan.layers, other.plan.layers):
        np.testing.assert_allclose(a.down.whole, b.down.whole, rtol=0.01, atol=2e-3)


def test_under_offload_it_is_the_same(make_mixtral, tiny_tokenizer, text):
    model, twin = make_mixtral(), make_mixtral()
    plan = halved(model)
    away = accelerate.cpu_offload(twin, execution_device=torch.device("cpu"))
    first, other = (refit(plan, Calibration(m, tiny_tokenizer, text)) for m in (model, away))
    assert first.plan == other.plan


def test_what_was_cut_off_goes_on_layer_by_layer(make_mixtral, tiny_tokenizer, text, tmp_path, monkeypatch):
    model = make_mixtral()
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    expected = refit(plan, calibration)
    run = refitting.LayerFitting.run
    ran = []

    def cut_off(self, *args):
        ran.append(self.layer.index)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(refitting.LayerFitting, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        refit(plan, calibration, parts=tmp_path)
    again = refit(plan, calibration, parts=tmp_path)
    assert ran == [0, 1, 1, 2]
    assert again.plan == expected.plan
    assert again.layers == expected.layers
    refit(plan, calibration, parts=tmp_path, rank=2)  # its own layers lie beside them
    assert len(list(tmp_path.iterdir())) == 2
    assert refit(plan, calibration, parts=tmp_path).plan == expected.plan


def test_a_file_keeps_the_weights_and_what_they_were_fitted_to(make_mixtral, tiny_tokenizer, text, tmp_path):
    model = make_mixtral()
    calibration = Calibration(model, tiny_tokenizer, text)
    for rank in (None, 4):
        made = refit(halved(model), calibration, rank=rank)
        made.save(tmp_path / "plan.safetensors")
        loaded = Plan.load(tmp_path / "plan.safetensors")
        assert loaded == made.plan
        assert loaded.fingerprint == made.plan.fingerprint
        about = Plan.about(tmp_path / "plan.safetensors")["refit"]
        assert about["sequences"] == calibration.sequences
        assert len(about["layers"]) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_takes_no_more_bytes_than_the_weights(make_mixtral, tiny_tokenizer, text, tmp_path, dtype):
    """And keeps every bit, of small numbers, of -0.0 and of large ones, too."""
    model = make_mixtral(dtype=dtype)
    made = refit(halved(model), Calibration(model, tiny_tokenizer, text))
    whole = torch.tensor([[[-0.0, 1e-7, 3.0, 1e-40]], [[65504.0, 1 / 3, -2.5, 0.0]]]).to(dtype).float().numpy()
    odd = Plan((LayerPlan(4, 2, kept=(0, 1), down=DownProjections(whole=whole)),))
    for plan in (made.plan, odd):
        plan.save(tmp_path / "plan.safetensors")
        loaded = Plan.load(tmp_path / "plan.safetensors")
        assert loaded == plan
        for first, other in zip(loaded.layers, plan.layers):
            assert first.down is None or first.down.whole.tobytes() == other.down.whole.tobytes()
    made.plan.save(tmp_path / "plan.safetensors")
    numbers = sum(part.down.whole.size for part in made.plan.layers if part.down is not None)
    assert (tmp_path / "plan.safetensors").stat().st_size < dtype.itemsize * numbers + 4000


def test_evaluations_reuse_prefixes_of_refitted_plans_only_where_they_are_equal(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    calibration = Calibration(model, tiny_tokenizer, text)
    made = refit(halved(model), calibration).plan
    other = replace_down(made, 2, made.layers[2].down.whole * 1.5)
    warm = Evaluator(model, tiny_tokenizer, text)
    losses = [warm.evaluate(plan).losses for plan in (halved(model), made, other, made)]
    fresh = [
        Evaluator(model, tiny_tokenizer, text).evaluate(plan).losses for plan in (halved(model), made, other, made)
    ]
    for first, two in zip(losses, fresh):
        assert np.array_equal(first, two)
    assert not np.array_equal(losses[1], losses[2])
    assert made.fingerprint != other.fingerprint
    assert made.first_difference(other) == 2


def test_experts_in_another_order_share_a_fingerprint_with_their_weights():
    whole = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    layer = LayerPlan(6, 2, kept=(0, 2, 5), down=DownProjections(whole=whole))
    other = LayerPlan(6, 2, kept=(5, 0, 2), down=DownProjections(whole=whole[[2, 0, 1]]))
    wrong = LayerPlan(6, 2, kept=(5, 0, 2), down=DownProjections(whole=whole))
    assert Plan((layer,)).fingerprint == Plan((other,)).fingerprint != Plan((wrong,)).fingerprint
    assert layer != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ridges": [0.1, 0.0]}, "above 0"),
        ({"ridges": []}, "above 0"),
        ({"ridges": 0.1}, "above 0, got 0.1"),
        ({"ridges": ["a"]}, "above 0"),
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"rank": 1.5}, "rank must be an integer of at least 1"),
        ({"columns": True}, "columns must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_named(make_mixtral, tiny_tokenizer, text, arguments, message):
    model = make_mixtral()
    with pytest.raises(MethodError, match=message):
        refit(halved(model), Calibration(model, tiny_tokenizer, text), **arguments)


def test_what_is_held_out_is_drawn_and_the_same_in_every_layer(make_mixtral, tiny_tokenizer, text, monkeypatch):
    """Rows of a mixture come by turns, which a step of four would make one member's alone."""
    model, held = make_mixtral(), []
    init = refitting.LayerFitting.__init__

    def noted(self, layer, part, batches, gaps, out, given):
        held.append({int(n) for acts, each in zip(batches, out) for n in acts.sequence[each].unique()})
        init(self, layer, part, batches, gaps, out, given)

    monkeypatch.setattr(refitting.LayerFitting, "__init__", noted)
    calibration = Calibration(model, tiny_tokenizer, text)
    refit(halved(model), calibration)
    assert held[0] == held[1] == held[2]
    assert len(held[0]) == calibration.sequences // 4
    assert len({number % 4 for number in held[0]}) > 1


def test_tokens_that_no_expert_takes_count_before_and_after(make_mixtral, tiny_tokenizer, text):
    """A negative mapping of all probabilities: nothing can be explained, so that the layer keeps its weights."""
    model = make_mixtral()
    w_rm = np.zeros((4, 8), np.float32)
    w_rm[:, :1] = 1.0  # tokens with little of expert 0's probability still take something: all but those below
    none = LayerPlan(8, 2, kept=(0, 1, 2, 3), w_rm=-w_rm, router="prob")
    made = refit(Plan((none,) * 3), Calibration(model, tiny_tokenizer, text))
    assert [fit.ridge for fit in made.layers] == [None] * 3
    assert all(fit.after == fit.before for fit in made.layers)


def test_a_plan_of_another_model_is_refused_before_any_pass(make_mixtral, tiny_tokenizer, text, monkeypatch):
    model = make_mixtral()
    calibration = Calibration(model, tiny_tokenizer, text)
    monkeypatch.setattr(refitting, "Stream", None)
    with pytest.raises(PlanError, match="for 2 MoE layers"):
        refit(Plan.one_hot([[0, 1]] * 2, experts=8, k=2), calibration)
    with pytest.raises(MethodError, match="takes a Plan"):
        refit("plan", calibration)


def test_nan_of_an_expert_that_is_not_kept_does_no_harm(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    made = refit(halved(model), Calibration(model, tiny_tokenizer, text), rank=4).plan
    ids = torch.arange(40)[None]
    with torch.no_grad(), patched(model, made):
        expected = model(ids).logits
    with torch.no_grad():
        moe_layers(model)[0].experts.gate_up_proj[7].fill_(torch.nan)
        moe_layers(model)[0].experts.down_proj[7].fill_(torch.inf)
    with torch.no_grad(), patched(model, made):
        assert torch.equal(model(ids).logits, expected)


def test_a_model_in_training_mode_can_be_refitted(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral(router_jitter_noise=0.1)
    plan = halved(model)
    expected = refit(plan, Calibration(model, tiny_tokenizer, text)).plan
    assert refit(plan, Calibration(model.train(), tiny_tokenizer, text)).plan == expected
    assert model.training


def test_too_few_sequences_are_refused(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    with pytest.raises(MethodError, match=f"at least {HELD_OUT} sequences"):
        refit(halved(model), Calibration(model, tiny_tokenizer, text, limit=3))


def test_weights_of_another_form_are_refused(make_mixtral):
    model = make_mixtral()
    down = DownProjections(whole=np.zeros((2, 3, 4), np.float32))
    plan = Plan((LayerPlan(8, 2, kept=(0, 1), down=down),) * 3)
    with pytest.raises(PlanError, match=r"\(hidden, inner\) = \(3, 4\)"), patched(model, plan):
        pass
    with pytest.raises(PlanError, match="of the 3 experts kept, got 2"):
        LayerPlan(8, 2, kept=(0, 1, 2), down=down)
    for arrays in (
        {},
        {"whole": np.zeros((2, 3))},
        {"whole": np.full((1, 1, 1), np.inf)},
        {"left": np.zeros((2, 3, 1))},
    ):
        with pytest.raises(PlanError, match="down projections"):
            DownProjections(**arrays)
    with pytest.raises(PlanError, match="do not fit"):
        DownProjections(left=np.zeros((2, 3, 1)), right=np.zeros((2, 2, 4)))


def test_no_space_takes_it_for_its_pruning(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    made = refit(halved(model), Calibration(model, tiny_tokenizer, text)).plan
    with pytest.raises(moeopt.errors.SpaceError, match="down projections of its own"):
        moeopt.PruneSpace.of(model, keep=4).encode(made)
    with pytest.raises(moeopt.errors.SpaceError, match="first, then refit"):
        moeopt.ActiveSpace.of(model, around=made, k=(1, 2))
    both = with_novices(made, 32)
    with pytest.raises(moeopt.errors.SpaceError, match="has down projections of its own and novices, which no space"):
        moeopt.PruneSpace.of(model, keep=4).encode(both)
    with pytest.raises(moeopt.errors.SpaceError, match=r"has novices, which no study keeps$"):
        moeopt.ActiveSpace.of(model, around=with_novices(halved(model), 32), k=(1, 2))
    with pytest.raises(moeopt.errors.SpaceError, match="has novices, which no space searches"):
        moeopt.MergeSpace.of(model, around=with_novices(halved(model), 32))


def test_memory_and_shares_are_those_of_the_pruning(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    calibration, plan = Calibration(model, tiny_tokenizer, text), halved(model)
    made = refit(plan, calibration, ridges=[1e6]).plan  # weights that barely change
    whole = sum(p.nbytes for layer in moe_layers(model) for p in layer.experts.parameters())
    assert merged_bytes(moe_layers(model), made) == whole // 2
    shares = [analysis.activation_shares(calibration, each) for each in (plan, made)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.02)
