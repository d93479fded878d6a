"""Budgets by layer: counts against brute force, predictions against slow sums, plans against what was asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeopt import methods
from moeopt.errors import MethodError
from moeopt.methods import budgets
from moeopt.methods.budgets import cheapest
from moeopt.tasks import TextTask


@pytest.fixture(scope="module")
def text():
    return TextTask("text", search=["".join(chr(40 + i * j % 50) for i in range(90)) for j in (3, 7, 11)], window=30)


@pytest.fixture(scope="module")
def calibration(make_mixtral, tiny_tokenizer, text):
    return methods.Calibration(make_mixtral(layers=3, experts=4, k=1), tiny_tokenizer, text)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 3), (700, 1000, 500)])
def test_the_cheapest_counts_are_those_of_all_tried(seed, sizes):
    rng = np.random.default_rng(seed)
    options = np.arange(1, 6)
    costs = [rng.standard_normal(5) for _ in sizes]
    weights = [options * size for size in sizes]
    capacity = int(rng.integers(sum(sizes), 5 * sum(sizes) + 1))
    tried = list(itertools.product(range(5), repeat=3))
    fit = [picks for picks in tried if sum(w[i] for w, i in zip(weights, picks)) <= capacity]
    full = max(sum(w[i] for w, i in zip(weights, picks)) for picks in fit)
    filled = [p for p in fit if sum(w[i] for w, i in zip(weights, p)) > full - max(sizes)]
    best = min(filled, key=lambda picks: sum(c[i] for c, i in zip(costs, picks)))
    assert cheapest(costs, weights, capacity) == list(best)


def test_a_budget_of_many_parts_is_never_overspent(monkeypatch):
    monkeypatch.setattr(budgets, "STEPS", 50)
    weights = [np.arange(1, 9) * size for size in (1009, 1013, 2003)]
    costs = [-np.arange(8.0)] * 3
    picks = cheapest(costs, weights, 9000)
    assert 6700 <= sum(int(w[i]) for w, i in zip(weights, picks)) <= 9000
    assert cheapest(costs, weights, 1009 + 1013 + 2003) == [0, 0, 0]


@pytest.mark.parametrize(
    ("total", "low", "high", "groups"), [(7, 1, 4, None), (6, 2, 3, None), (9, 1, 4, [(0, 1), (2, 2)])]
)
def test_a_plan_keeps_what_is_asked(calibration, total, low, high, groups):
    plan = methods.allocate("loss_aware", calibration, total=total, low=low, high=high, groups=groups)
    counts = [layer.kept_experts for layer in plan.layers]
    assert low <= min(counts) <= max(counts) <= high
    assert total - (groups is not None) <= sum(counts) <= total
    if groups:
        assert plan.layers[0] == plan.layers[1]


def test_router_groups_are_kept_alike(make_mixtral, tiny_tokenizer, text, monkeypatch):
    calibration = methods.Calibration(make_mixtral(layers=2, experts=8), tiny_tokenizer, text)
    monkeypatch.setattr(calibration, "shape", calibration.shape.__class__(2, 8, 2, router_groups=2))
    plan = methods.allocate("loss_aware", calibration, total=8, low=2, high=6)
    for layer in plan.layers:
        assert sum(e < 4 for e in layer.kept) * 2 == layer.kept_experts
    assert sum(layer.kept_experts for layer in plan.layers) == 8


def test_a_layer_that_matters_keeps_more(make_mixtral, tiny_tokenizer, text):
    """Experts of one layer give nothing at all: that layer keeps as few as it may."""
    model = make_mixtral(layers=3, experts=4, k=1)
    model.model.layers[1].mlp.experts.down_proj.data.zero_()
    made = methods.plans(["loss_aware_budgets"], methods.Calibration(model, tiny_tokenizer, text), keep=2)
    plan = made["loss_aware_budgets"].plan
    assert [layer.kept_experts for layer in plan.layers][1] == 1
    assert sum(layer.kept_experts for layer in plan.layers) == 6
    assert "keeps" in made["loss_aware_budgets"].how


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("reap", {"total": 6}, "order='reap'"),
        ("loss_aware", {"total": 2}, "total must be from 3 to 12 experts"),
        ("loss_aware", {"total": 6, "low": 3, "high": 2}, "low and high"),
        ("loss_aware", {"total": True}, "got True"),
    ],
)
def test_what_cannot_be_is_refused(calibration, name, arguments, says):
    with pytest.raises(MethodError, match=says):
        methods.allocate(name, calibration, **arguments)
