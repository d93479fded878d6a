"""Rankings: the first r of each layer are what the method's plan of r keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeopt import methods
from moeopt.errors import MethodError
from moeopt.methods.names import ROUTERS, UNRANKED
from moeopt.tasks import TextTask

RANKED = [name for name in ROUTERS if name not in UNRANKED]


@pytest.fixture(scope="module")
def calibration(make_mixtral, tiny_tokenizer):
    text = TextTask("text", search=["".join(chr(40 + i * j % 50) for i in range(90)) for j in (3, 7, 11)], window=30)
    return methods.Calibration(make_mixtral(layers=2, experts=5), tiny_tokenizer, text)


@pytest.mark.parametrize("name", [name for name in RANKED if name != "loss_aware"])
def test_the_first_of_a_ranking_are_kept(calibration, name):
    order = methods.ranking(name, calibration)
    assert order.dtype == np.int64
    assert np.sort(order).tolist() == [list(range(5))] * 2
    for r in (2, 3, 4):
        plan = methods.plan(name, calibration, keep=r)
        assert [layer.kept for layer in plan.layers] == [tuple(sorted(row[:r])) for row in order.tolist()]


def test_loss_aware_ranks_by_elimination(calibration, monkeypatch):
    """Each expert is the one without which, of those not ranked behind it, the sums over tokens are least."""
    from moeopt.methods import loss_aware

    seen = []
    order_of = loss_aware.Changes.order
    monkeypatch.setattr(
        loss_aware.Changes, "order", lambda self, rule: seen.append((self, rule)) or order_of(self, rule)
    )
    order = methods.ranking("loss_aware", calibration)
    for row, (changes, rule) in zip(order.tolist(), seen, strict=True):
        for left in range(5, 2, -1):  # while as many are left as run
            sets = list(itertools.combinations(sorted(row[:left]), left - 1))
            assert sets[int(rule(changes.of_sets(sets)).argmin())] == tuple(sorted(row[: left - 1]))


@pytest.mark.parametrize("name", UNRANKED)
def test_methods_that_choose_sets_rank_none(calibration, name):
    with pytest.raises(MethodError, match=f"{name} chooses whole sets"):
        methods.ranking(name, calibration)
