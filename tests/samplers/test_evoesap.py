"""EvoESAP: switches keep the total and the range, generations have elites as parents, and counts get better."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import optuna
import pytest

from moeopt.errors import SamplerError
from moeopt.plan import ModelShape
from moeopt.samplers.evoesap import PATTERNS, EvoESAPSampler, laid_out
from moeopt.spaces import PruneSpace
from moeopt.trials import genome

SHAPE = ModelShape(layers=8, experts=16, k=2)
ORDER = np.tile(np.arange(16), (8, 1))


def space(**given: Any) -> PruneSpace:
    return PruneSpace(SHAPE, **{"keep": (2, 16), "total": 64, "order": ORDER} | given)


def searched(sampler: EvoESAPSampler, trials: int, wanted: np.ndarray) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        trial = study.ask()
        counts = np.array([layer.kept_experts for layer in sampler.space.plan(trial).layers])
        study.tell(trial, float(((counts - wanted) ** 2).sum()))
    return study


def test_switches_move_experts_between_layers() -> None:
    searches = space()
    sampler, rng = EvoESAPSampler(searches, seed=0), np.random.default_rng(0)
    counts, moved = searches.counts(searches.start()), Counter[int]()
    for _ in range(400):
        child = sampler.switched(rng, counts, searches.keep_range)
        assert child.sum() == 64
        assert child.min() >= 2
        assert child.max() <= 16
        moved[int(np.abs(child - counts).sum()) // 2] += 1
        counts = child
    assert set(moved) <= set(range(13))
    assert len(moved) > 6
    assert counts.std() > 1


def test_router_groups_and_groups_of_layers_are_kept() -> None:
    grouped = PruneSpace(ModelShape(8, 16, 2, router_groups=4), keep=(4, 16), total=64, groups=3, order=ORDER)
    sampler, rng = EvoESAPSampler(grouped, seed=0), np.random.default_rng(0)
    x = grouped.start()
    for _ in range(60):
        x = sampler.child(rng, x)
        counts = grouped.counts(x)
        assert (counts % 4 == 0).all()
        assert 64 - 4 * 4 < counts @ np.array(grouped.keep_range.layers) <= 64


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_use_up_the_total(name: str) -> None:
    counts = laid_out(PATTERNS[name], space().keep_range)
    assert counts.sum() == 64
    order = {"up": -1, "down": 1, "front-heavy": 1, "back-heavy": -1}.get(name)
    if order is not None:
        assert (np.diff(counts) * order >= -1).all()  # what rounding leaves goes where most was lost


def test_children_are_of_the_elites_of_earlier_generations() -> None:
    wanted = np.array([14, 12, 10, 8, 8, 6, 4, 2])
    sampler = EvoESAPSampler(space(), seed=0, population=12, elites=3)
    study = searched(sampler, 66, wanted)
    trials = study.trials
    for trial in trials[12:]:
        first = trial.number - (trial.number - 12) % 9
        best = sorted(trials[:first], key=lambda t: t.value)
        plans = list(dict.fromkeys(genome.origin(t)["plan"] for t in best))[:3]
        (parent,) = genome.origin(trial)["parents"]
        assert genome.origin(trials[parent])["plan"] in plans
    assert study.best_value < 0.3 * trials[0].value
    assert len({genome.origin(trial)["plan"] for trial in trials}) == 66


def test_elites_leave_room_for_children() -> None:
    with pytest.raises(SamplerError, match="fewer than the population of 4"):
        EvoESAPSampler(space(), population=4, elites=4)
    assert "no plan of 20 trials has a parent" in (EvoESAPSampler(space(), seed=0).shortfall(20) or "")
