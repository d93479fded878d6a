"""Means that are no weighted sums, and neurons in another order: against slow references, in every family."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import moeopt
from moeopt.errors import ModelError, PlanError, SpaceError
from moeopt.evaluation.memory import merged_bytes
from moeopt.models import mixing, moe_layers, patched
from moeopt.plan import LayerPlan, Merge, Plan
from moeopt.report.terminal.plans import layer_rows, plan_table

IDS = torch.arange(3, 43)[None] * 5 % 90


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def parts(seed: int, m: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(m, generator=generator) + 0.1, torch.randn(m, *shape, generator=generator)


@given(st.integers(0, 99), st.integers(1, 4))
def test_ties_is_number_by_number(seed: int, m: int) -> None:
    weights, w = parts(seed, m, 5, 4)
    base = int(weights.argmax())
    differences = [(w[j] - w[base]).flatten() for j in range(m)]
    for d in differences:
        for i in sorted(range(20), key=lambda i: abs(float(d[i])))[: 20 - 4]:
            d[i] = 0
    expected = w[base].flatten().clone()
    for i in range(20):
        pairs = [(float(weights[j]), float(differences[j][i])) for j in range(m) if j != base]
        sign = np.sign(sum(g * d for g, d in pairs))
        agreeing = [(g, d) for g, d in pairs if d and np.sign(d) == sign]
        if agreeing:
            expected[i] += sum(g * d for g, d in agreeing) / sum(g for g, _ in agreeing)
    torch.testing.assert_close(mixing.ties(weights, w).flatten(), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 99), st.integers(2, 5))
def test_slerp_is_multislerp_of_mergekit(seed: int, m: int) -> None:
    """mergekit's step in the tangent space included, which changes nothing."""
    weights, w = parts(seed, m, 6, 3)
    shares, flat = weights / weights.sum(), w.flatten(1)
    norms = flat.norm(dim=1, keepdim=True)
    mean = (flat / norms * shares[:, None]).sum(0)
    mean = mean / mean.norm()
    tangents = flat / norms - (flat / norms * mean).sum(-1, keepdim=True) * mean
    step = (tangents * shares[:, None]).sum(0)
    length = step.norm() + 1e-8
    expected = (mean * length.cos() + step * length.sin() / length) * (norms[:, 0] * shares).sum()
    torch.testing.assert_close(mixing.slerp(weights, w).flatten(), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 99))
def test_the_frechet_mean_of_two_is_slerp_proper(seed: int) -> None:
    weights, w = parts(seed, 2, 6, 3)
    t = float(weights[1] / weights.sum())
    norms = w.flatten(1).double().norm(dim=1)
    a, b = w.flatten(1).double() / norms[:, None]
    omega = torch.arccos(a @ b)
    expected = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)
    expected *= (1 - t) * norms[0] + t * norms[1]
    torch.testing.assert_close(mixing.karcher(weights, w).flatten().double(), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 99), st.integers(3, 5))
def test_no_direction_is_nearer_than_the_frechet_mean(seed: int, m: int) -> None:
    weights, w = parts(seed, m, 4, 3)
    w += 1.0  # in one half of the sphere, where the mean is one
    units = w.flatten(1).double() / w.flatten(1).double().norm(dim=1, keepdim=True)

    def cost(direction: torch.Tensor) -> float:
        angles = torch.arccos((units @ (direction / direction.norm())).clamp(-1, 1))
        return float((weights.double() * angles**2).sum())

    mean = mixing.karcher(weights, w).flatten().double()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        step = 1e-2 * mean.norm() * torch.randn(12, generator=generator, dtype=torch.float64)
        assert cost(mean) < cost(mean + step)


@pytest.mark.parametrize("merge", get_args(Merge))
def test_of_equal_experts_every_mean_is_that_expert(merge: str) -> None:
    _, w = parts(0, 1, 5, 4)
    mean = mixing.MERGES[merge](torch.tensor([0.25, 0.75]), w.expand(2, 5, 4))
    torch.testing.assert_close(mean, w[0])
    zeros = torch.zeros(2, 5, 4)
    assert torch.equal(mixing.MERGES[merge](torch.tensor([0.25, 0.75]), zeros), zeros[0])


def clusters(model: Any, **options: Any) -> Plan:
    """Every expert merged with the next one, unequally."""
    layers = moe_layers(model)
    n = layers[0].n
    w_em = np.zeros((n // 2, n), np.float32)
    for i in range(n // 2):
        w_em[i, 2 * i : 2 * i + 2] = 0.3, 0.7
    return Plan(tuple(LayerPlan(n, layer.k, w_em=w_em, w_rm=w_em > 0.5, **options) for layer in layers))


def shuffled(model: Any, seed: int = 0) -> np.ndarray:
    experts = moe_layers(model)[0].experts
    inner = mixing.ExpertForm.from_module(experts).inner
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(inner) for _ in range(moe_layers(model)[0].n)]).astype(np.int32)


def in_order(model: Any, orders: np.ndarray) -> None:
    """Put the neurons of a model's own experts in order, tensor by tensor as each class stores them."""
    for layer in moe_layers(model):
        for name, tensor in layer.experts.named_parameters():
            for j, order in enumerate(torch.from_numpy(orders.astype(np.int64))):
                if name == "down_proj":
                    axis = 0 if layer.experts.is_transposed else 1
                elif name == "down_proj_bias":
                    continue
                else:
                    axis = 1 if layer.experts.is_transposed and tensor.ndim == 3 else 0
                    inner = len(order)
                    both = [order, inner + order] if layer.experts.is_concatenated else [2 * order, 2 * order + 1]
                    order = torch.cat(both) if layer.experts.is_concatenated else torch.stack(both, 1).flatten()
                tensor.data[j] = tensor.data[j].index_select(axis, order)


@pytest.mark.slow
@pytest.mark.parametrize("merge", get_args(Merge))
def test_an_order_is_that_of_the_full_model_s_own_experts(merge: str, family: str, build_family: Any) -> None:
    """Neurons put in order in the plan, or in the full model before: the same bits, in every family."""
    model, ordered = build_family(family), build_family(family)
    orders = shuffled(model)
    in_order(ordered, orders)
    torch.testing.assert_close(logits(ordered), logits(model), rtol=1e-3, atol=1e-3)
    plain = clusters(model, merge=merge)
    # the same order for all is none of a sum's business, so that what is compared with runs the same code
    anyhow = np.tile(np.arange(orders.shape[1], dtype=np.int32)[::-1], (len(orders), 1))
    with patched(model, Plan(tuple(replace(p, neurons=orders) for p in plain.layers))):
        planned = logits(model)
    with patched(ordered, plain):
        expected = logits(ordered)
    with patched(ordered, Plan(tuple(replace(p, neurons=anyhow) for p in plain.layers))):
        again = logits(ordered)
    torch.testing.assert_close(planned, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-3)
    with patched(model, plain):
        assert not torch.allclose(logits(model), expected, rtol=1e-2, atol=1e-2)


def test_an_order_is_a_part_of_what_a_plan_is(make_mixtral: Any, tmp_path: Any) -> None:
    model = make_mixtral()
    orders = shuffled(model)
    plain, other = clusters(model), clusters(model, merge="slerp")
    ordered = clusters(model, neurons=orders)
    assert len({plan.fingerprint for plan in (plain, other, ordered, clusters(model, neurons=orders[::-1]))}) == 4
    assert ordered.first_difference(plain) == 0
    assert ordered.nbytes > plain.nbytes
    assert merged_bytes(moe_layers(model), ordered) == merged_bytes(moe_layers(model), plain)
    for plan, version in ((plain, "1"), (other, "3"), (ordered, "3")):
        plan.save(tmp_path / "plan.safetensors")
        assert Plan.load(tmp_path / "plan.safetensors") == plan
        assert f'"version":"{version}"'.encode() in (tmp_path / "plan.safetensors").read_bytes()
    around = Plan.one_hot([range(4)] * len(plain.layers), experts=8, k=2)
    told = [row["beyond_matrices"] for plan in (plain, other, ordered) for row in layer_rows(plan)]
    assert told == [None, "experts merged by slerp", "an order of neurons"]
    text = StringIO()
    Console(file=text, width=200).print(plan_table(ordered))
    assert "an order of neurons" in text.getvalue()
    space = moeopt.MergeSpace(moeopt.ModelShape(len(plain.layers), 8, k=2), around=around)
    with pytest.raises(SpaceError, match="has an order of neurons, which no space searches"):
        space.encode(ordered)


def test_an_order_of_experts_that_are_not_mixed_is_no_order() -> None:
    orders = np.array([[1, 0, 2]] * 4)
    pruned = LayerPlan(4, 1, kept=(0, 2), neurons=orders, merge="ties")
    assert pruned == LayerPlan(4, 1, kept=(0, 2))
    assert pruned.neurons is None
    w = np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0]], np.float32)
    merged = LayerPlan(4, 1, w_em=w, w_rm=w > 0, router="prob", neurons=orders)
    assert merged.neurons is not None
    assert merged.neurons[3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"neurons": np.zeros((3, 4), int)}, r"integers of shape \(4, inner\), got int64 \(3, 4\)"),
        ({"neurons": np.zeros((4, 3))}, r"integers of shape \(4, inner\), got float64 \(4, 3\)"),
        ({"neurons": np.zeros((4, 3), int)}, "every row of neurons must hold each of 0 to 2 once"),
        ({"neurons": [[0, 1], [1]]}, "neurons must be an array of numbers"),
        ({"w_em": "abc"}, "w_em must be an array of numbers"),
        ({"merge": "mean"}, "merge must be one of linear, ties, slerp, karcher, got 'mean'"),
        ({"merge": "ties", "w_em": [[1, -1, 0, 0], [0, 0, 1, 0]]}, "needs rows of w_em without a negative"),
    ],
)
def test_what_is_no_order_or_no_mean_is_refused(options: dict[str, Any], match: str) -> None:
    w = np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0]], np.float32)
    with pytest.raises(PlanError, match=match):
        LayerPlan(4, 1, **{"w_em": w, "w_rm": w > 0, "router": "prob", **options})


def test_an_order_for_other_experts_is_refused(make_mixtral: Any) -> None:
    model = make_mixtral()
    plan = clusters(model, neurons=np.array([[1, 0]] * 8))
    with (
        pytest.raises(PlanError, match=r"orders 2 neurons, experts of model\.layers\.0\.mlp have \d+"),
        patched(model, plan),
    ):
        pass


def test_experts_that_an_order_changes_are_refused(make_mixtral: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mixtral()
    by_turns = classmethod(lambda cls, experts: cls(32, 48, False, concatenated=False))
    monkeypatch.setattr(mixing.ExpertForm, "from_module", by_turns)
    plan = clusters(model, neurons=shuffled(model))
    with pytest.raises(ModelError, match="gives other results with its neurons in another order"), patched(model, plan):
        pass
