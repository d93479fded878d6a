"""REAM against its description, step by step, and methods whose names say how they merge."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch

from moeopt import methods
from moeopt.errors import MethodError, SpaceError
from moeopt.evaluation import Evaluator
from moeopt.methods import matching, ream
from moeopt.methods.base import Budget
from moeopt.methods.names import MERGING, Name, parsed
from moeopt.models import moe_layers
from moeopt.plan import LayerPlan, Merge, ModelShape, Plan
from moeopt.spaces import MergeSpace
from moeopt.study.warm_starts import check_expressible
from moeopt.tasks import TextTask

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 4


@pytest.fixture(scope="module")
def text() -> TextTask:
    return TextTask("text", search=[TEXT[i * 7 :][: 53 + i % 3] + str(i) for i in range(6)], window=20)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def own_weights(layer: Any, j: int) -> np.ndarray:
    """[row of W3 | row of W1 | column of W2] of each neuron of a Mixtral's or Qwen3's expert."""
    gate_up, down = layer.experts.gate_up_proj[j].detach().numpy(), layer.experts.down_proj[j].detach().numpy()
    gate, up = np.split(gate_up, 2)
    return np.concatenate([gate, up, down.T], 1)


def own_activations(layer: Any, j: int, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ layer.experts.gate_up_proj[j].detach().numpy().T, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def best_order(cost: np.ndarray) -> float:
    """The least cost of an assignment of 8, by going through all."""
    every = np.array(list(itertools.permutations(range(8))))
    return float(cost[np.arange(8), every].sum(1).min())


def test_it_is_its_description(make_mixtral: Any, tiny_tokenizer: Any, text: TextTask) -> None:
    """Layer by layer, on what the merged layers so far give, from ordinary forwards."""
    model = make_mixtral(seed=3, intermediate=8)
    layers, r = moe_layers(model), 3
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=6, batch_tokens=40)
    plan = methods.plan("ream", calibration, keep=r)
    full = Plan.identity(len(layers), 8, 2)
    merged = 0
    for index, (layer, part) in enumerate(zip(layers, plan.layers)):
        xs: list[np.ndarray] = []
        so_far = Plan((*plan.layers[:index], *full.layers[index:]))
        calibration.run(
            lambda acts, i=index, xs=xs: xs.append(acts.hidden.numpy().copy()) if acts.layer.index == i else None,
            plan=so_far,
        )
        x = np.concatenate(xs).astype(np.float64)
        ell = x @ layer.router.weight.detach().numpy().T.astype(np.float64)
        p = np.exp(ell - ell.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        acts = [own_activations(layer, j, x) for j in range(8)]
        outs = [acts[j] @ layer.experts.down_proj[j].detach().numpy().T for j in range(8)]
        routed = [np.flatnonzero((np.argsort(-p, axis=1)[:, :2] == j).any(1)) for j in range(8)]
        s = np.array(
            [np.mean(p[t, j] * np.linalg.norm(outs[j][t], axis=1)) if len(t) else 0 for j, t in enumerate(routed)]
        )
        s[s == 0] = min(0.5, s[s > 0].min())
        means = unit(np.stack([(p[:, [j]] * outs[j]).mean(0) for j in range(8)]))
        columns = unit(ell.T)
        distances = np.linalg.norm(columns[:, None] - columns[None], axis=-1)
        likeness = ((means @ means.T + 1) / 2 + 1 - distances / distances.max()) / 2
        ranked = np.argsort(-s)[:r]
        leads, labels = sorted(ranked.tolist()), np.full(8, -1)
        labels[leads] = range(r)
        for lead in ranked:
            for j in np.argsort(-likeness[lead]):
                if labels[j] < 0 and (labels == labels[lead]).sum() < 16:
                    labels[j] = labels[lead]
        assert part.router_rows == tuple(leads)
        w_em = (labels[None] == np.arange(r)[:, None]) * s
        np.testing.assert_allclose(part.expert_matrix, w_em / w_em.sum(1, keepdims=True), rtol=1e-4)
        for lead, j in ((leads[labels[j]], j) for j in range(8) if j not in leads):
            assert part.neurons is not None
            cost = sum(
                np.linalg.norm(unit(a)[:, None] - unit(b)[None], axis=-1)
                for a, b in (
                    (acts[lead].T, acts[j].T),
                    (own_weights(layer, lead).astype(float), own_weights(layer, j).astype(float)),
                )
            )
            order = part.neurons[j]
            assert cost[np.arange(len(order)), order].sum() == pytest.approx(best_order(cost), rel=1e-4)
            merged += 1
    assert merged == 5 * len(layers)


def test_where_every_expert_is_kept_nothing_changes(make_mixtral: Any, tiny_tokenizer: Any, text: TextTask) -> None:
    calibration = methods.Calibration(make_mixtral(), tiny_tokenizer, text, limit=3)
    assert methods.plan("ream", calibration, keep=8) == Plan.identity(3, 8, 2)


def test_groups_take_no_more_than_they_may() -> None:
    rng = np.random.default_rng(0)
    saliency, likeness = rng.random(40), rng.random((40, 40))
    leads, labels = ream.grouped(saliency, likeness, Budget(len(saliency), 2, 3, 2))
    sizes = np.bincount(labels)[np.argsort(-saliency[leads])]
    assert sizes.tolist() == [16, 16, 8]
    assert set(leads) == set(np.argsort(-saliency)[:3].tolist())
    assert np.bincount(ream.grouped(saliency, likeness, Budget(len(saliency), 2, 2, 2))[1]).tolist() == [20, 20]


@pytest.mark.parametrize("name", [name for name in MERGING if name != "ream"])
def test_options_say_how_a_method_merges(
    name: str, family: str, build_family: Any, tiny_tokenizer: Any, text: TextTask
) -> None:
    model = build_family(family, vocabulary=len(tiny_tokenizer))
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=3)
    spelled = [name, f"{name}:aligned", f"{name}:karcher", f"{name}:aligned+ties"]
    plain, aligned, karcher, both = (plan.plan for plan in methods.plans(spelled, calibration, keep=3).values())
    for i, part in enumerate(plain.layers):
        assert (part.neurons, part.merge) == (None, "linear")
        for other, merge in ((aligned, "linear"), (karcher, "karcher"), (both, "ties")):
            assert np.array_equal(other.layers[i].expert_matrix, part.expert_matrix)
            assert other.layers[i].merge == merge
        assert karcher.layers[i].neurons is None
        assert np.array_equal(aligned.layers[i].neurons, both.layers[i].neurons)


def test_layers_that_share_a_choice_have_orders_of_their_own(
    make_mixtral: Any, tiny_tokenizer: Any, text: TextTask
) -> None:
    model = make_mixtral(seed=3, intermediate=8)
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=3)
    layers = moe_layers(model)
    plan = methods.plan("m_smoe:aligned", calibration, keep=3, groups=[(0, len(layers) - 1)])
    assert len({part.expert_matrix.tobytes() for part in plan.layers}) == 1
    for layer, part in zip(layers, plan.layers):
        for row in part.expert_matrix:
            lead = int(row.argmax())
            for j in set(np.flatnonzero(row).tolist()) - {lead}:
                assert part.neurons is not None
                squares = ((own_weights(layer, lead)[:, None] - own_weights(layer, j)[None]) ** 2).sum(-1)
                cost = squares[np.arange(8), part.neurons[j]].sum()
                assert cost == pytest.approx(best_order(squares), rel=1e-4)


def test_an_expert_that_is_another_one_in_disorder_is_put_in_order(make_mixtral: Any) -> None:
    layer = moe_layers(make_mixtral(seed=3))[0]
    experts = layer.experts
    inner = experts.down_proj.shape[2]
    disorder = torch.from_numpy(np.random.default_rng(0).permutation(inner))
    experts.gate_up_proj.data[1] = experts.gate_up_proj.data[0][torch.cat([disorder, inner + disorder])]
    experts.down_proj.data[1] = experts.down_proj.data[0][:, disorder]
    w_em = np.zeros((7, 8), np.float32)
    w_em[0, :2], w_em[range(1, 7), range(2, 8)] = (0.6, 0.4), 1
    orders = matching.by_weights(LayerPlan(8, 2, w_em=w_em, w_rm=w_em > 0, router="prob"), layer)
    assert disorder[orders[1]].tolist() == list(range(inner))


def test_names_have_options() -> None:
    assert parsed("hc_smoe") == Name("hc_smoe")
    assert parsed("m_smoe:aligned+ties") == Name("m_smoe", True, "ties")
    assert parsed("ream:slerp") == Name("ream", False, "slerp")
    merges: Any = get_args(Merge)
    assert [parsed(f"ream:{merge}").merge for merge in merges[1:]] == list(merges[1:])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("hc_smo:ties", "unknown method 'hc_smo:ties'; did you mean 'hc_smoe'"),
        ("reap:ties", "only methods that merge take options"),
        ("hc_smoe:", "options are aligned, one of ties, slerp, karcher"),
        ("hc_smoe:tie", "options are aligned, one of ties, slerp, karcher.*did you mean 'ties'"),
        ("hc_smoe:ties+aligned", r"or as aligned\+ties"),
        ("hc_smoe:aligned+aligned", "options are aligned, one of ties, slerp, karcher"),
        (3, "a method is a name, such as 'naee', got 3"),
        ("hc_smoe:ties+slerp", "options are aligned, one of ties, slerp, karcher"),
        ("hc_smoe:linear", "options are aligned, one of ties, slerp, karcher"),
        ("ream:aligned", "ream aligns neurons in any case"),
    ],
)
def test_names_that_say_nothing_are_refused(name: Any, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        parsed(name)


@pytest.mark.parametrize("name", ["ream", "hc_smoe_summed:aligned", "m_smoe_summed:slerp"])
def test_no_search_starts_from_what_it_cannot_express(name: str) -> None:
    with pytest.raises(SpaceError, match="orders neurons, or merges"):
        check_expressible(name, MergeSpace(ModelShape(3, 8, k=2), around=Plan.one_hot([range(4)] * 3, experts=8, k=2)))


@pytest.mark.parametrize("name", ["mone", "m_smoe:aligned"])
def test_a_router_that_picks_among_all_may_pick_more_than_are_kept(
    name: str, make_mixtral: Any, tiny_tokenizer: Any, text: TextTask
) -> None:
    model = make_mixtral(seed=3)
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=3)
    plan = methods.plan(name, calibration, keep=1, k=2)
    assert plan.layers[0].k == 2
    assert np.isfinite(Evaluator(model, tiny_tokenizer, text, split="search").evaluate(plan).loss)
    with pytest.raises(MethodError, match="k must be an integer between 1 and the 8 experts each layer has, got 9"):
        methods.plan(name, calibration, keep=1, k=9)
    with pytest.raises(MethodError, match="k must be an integer between 1 and the 1 experts kept, got 2"):
        methods.plans([name, "reap"], calibration, keep=1, k=2)
