"""Blocks, visits and the replay of block-coordinate CMA-ES."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import optuna
import pytest

from moeopt.plan import ModelShape, Plan
from moeopt.samplers import BlockCMAESSampler, Observation
from moeopt.samplers.blockcmaes import blocks
from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace, Space
from moeopt.trials import genome

SHAPE = ModelShape(layers=4, experts=6, k=1)
AROUND = Plan.one_hot([[0, 1], [2, 3], [4, 5], [0, 3]], experts=6, k=1)
SPACE = MergeSpace(SHAPE, around=AROUND)


def evaluate(study: optuna.Study, space: Space, target: np.ndarray, n: int) -> None:
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, float(((space.vector(trial) - target) ** 2).mean()))


def notes(study: optuna.Study) -> list[dict[str, Any]]:
    return [genome.origin(trial)["notes"] for trial in study.trials]


def test_blocks_cover_the_space_once() -> None:
    for space in (SPACE, EEPSpace(ModelShape(7, 8, 2), keep=4), PruneSpace(ModelShape(5, 8, 2), keep=4)):
        per_group = space.size // len(space.groups)
        for size in (1, 3, 7, per_group, 2 * per_group, 100, 10_000):
            parts = blocks(space, size)
            assert [i for first, stop in parts for i in range(first, stop)] == list(range(space.size))
            for first, stop in parts:
                assert stop - first <= size
                whole = first % per_group == stop % per_group == 0
                assert whole or first // per_group == (stop - 1) // per_group
    assert blocks(SPACE, 48) == ((0, 48), (48, 96))
    assert blocks(SPACE, 16) == tuple((i, i + 12) for i in range(0, 96, 12))


def test_k_and_betas_have_blocks_of_their_own() -> None:
    shape = ModelShape(layers=6, experts=6, k=2)
    inner = PruneSpace(shape, keep=3, groups=2)
    both = ActiveSpace(inner, k=(1, 3), skip=True, groups=[(0, 0), (1, 2), (3, 5)])
    alone = ActiveSpace(shape, k=(1, 2))
    for space in (both, alone):
        for size in (1, 2, 4, 6, 100):
            sampler = BlockCMAESSampler(space, seed=0, block_size=size)
            parts = [sampler.numbers(block).tolist() for block in sampler.blocks]
            assert sorted(i for numbers in parts for i in numbers) == list(range(space.size))
            for numbers in parts:
                assert len(numbers) <= max(size, 2 if space is both else 1)
                assert max(numbers) < space.inner.size or min(numbers) >= space.inner.size
    sampler = BlockCMAESSampler(both, seed=0, block_size=4)
    assert [sampler.numbers(block).tolist() for block in sampler.blocks[-2:]] == [[12, 13, 15, 16], [14, 17]]
    assert [sampler.layer(block) for block in sampler.blocks] == [0, 0, 3, 3, 0, 3]
    study = optuna.create_study(sampler=BlockCMAESSampler(both, seed=0, population_size=4, generations=2))
    evaluate(study, both, both.sample(np.random.default_rng(1)), 60)
    played = set()
    for trial in study.trials[1:]:
        origin = genome.origin(trial)
        differs = np.flatnonzero(genome.read(trial) != genome.read(study.trials[origin["parents"][0]]))
        numbers = sampler.numbers(tuple(origin["notes"]["block"]))
        assert set(differs) <= set(numbers)
        played.add(int(numbers[0]))
    assert played == {0, 12}


@pytest.mark.slow
def test_only_the_block_differs_from_the_centre() -> None:
    study = optuna.create_study(sampler=BlockCMAESSampler(SPACE, seed=0, block_size=24, population_size=4))
    target = SPACE.snap(SPACE.start() + 2 * SPACE.step)
    evaluate(study, SPACE, target, 60)
    noted = notes(study)
    for trial, note in zip(study.trials[1:], noted[1:]):
        (parent,) = genome.origin(trial)["parents"]
        differs = np.flatnonzero(genome.read(trial) != genome.read(study.trials[parent]))
        first, stop = note["block"]
        assert differs.size
        assert first <= differs.min()
        assert differs.max() < stop
        earlier = [t for t in study.trials[: trial.number] if notes(study)[t.number].get("visit", -1) < note["visit"]]
        assert parent == min(earlier, key=lambda t: t.value).number
    assert [note["visit"] for note in noted[1:]] == [i // 12 for i in range(59)]
    assert [note["generation"] for note in noted[1:25]] == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4
    assert len({tuple(note["block"]) for note in noted[1:]}) > 1
    assert study.best_value < study.trials[0].value


def test_within_a_block_it_is_the_package_itself() -> None:
    from cmaes import CMA

    sampler = BlockCMAESSampler(SPACE, seed=5, sigma=2.0, block_size=24, population_size=6, generations=3)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, SPACE, np.zeros(SPACE.size), 19)
    first, stop = notes(study)[1]["block"]
    part, x0 = slice(first, stop), SPACE.start().astype(np.float64)
    bounds = np.stack([np.full(24, -3.0), np.full(24, 3.0)], axis=1)
    reference = CMA(mean=np.zeros(24), sigma=2.0, bounds=bounds, population_size=6, n_max_resampling=0)
    obs = []
    for trial in study.trials[1:]:
        rng = sampler.rng(trial.number)
        if trial.number == 1:
            sampler.visit(rng, sampler.history(study, study.trials[:1], without=-1))
        reference.reseed_rng(int(rng.integers(1 << 32)))
        x = x0.copy()
        x[part] += reference.ask() * SPACE.step[part]
        assert np.allclose(SPACE.snap(x), genome.read(trial), atol=1e-6)
        obs.append(((genome.read(trial)[part] - x0[part]) / SPACE.step[part], trial.value))
        if len(obs) == 6:
            reference.tell(obs)
            obs = []


def test_the_start_and_enqueued_trials() -> None:
    study = optuna.create_study(sampler=BlockCMAESSampler(SPACE, seed=0, sigma=1e-6, block_size=24))
    near = SPACE.snap(SPACE.start() + SPACE.step)
    study.add_trial(genome.waiting(genome.pack(genome.GENOME, near), {}))
    evaluate(study, SPACE, SPACE.snap(SPACE.start() + 2 * SPACE.step), 3)
    assert [genome.origin(t)["operator"] for t in study.trials] == ["enqueued", "start", "blockcmaes"]
    assert np.allclose(genome.read(study.trials[2]), near, atol=1e-5)
    assert genome.origin(study.trials[2])["parents"] == [0]
    assert np.array_equal(genome.read(study.trials[1]), SPACE.start())


def test_bandit_prefers_the_block_that_gained() -> None:
    """All blocks gain equally often and cost the same by their own account; one gains a hundred times as much."""
    sampler = BlockCMAESSampler(SPACE, seed=0, block_size=24, population_size=4, generations=1, memory=1e6)
    history = [Observation(0, 0, SPACE.start(), 5.0, False, "0", "start", {})]
    for slot in range(1, 161):
        block = sampler.blocks[(slot - 1) // 4 % 4]
        loss = 5.0 - (0.1 if block == sampler.blocks[1] else 0.001)
        note = {"visit": (slot - 1) // 4, "block": list(block), "around": 0, "generation": 0}
        attrs = {"layer_tokens": 20, "tokens": 10}
        history.append(Observation(slot, slot, SPACE.start(), loss, False, str(slot), "blockcmaes", attrs, note))
    chosen = Counter(tuple(sampler.propose(history, slot, 0).notes["block"]) for slot in range(1000, 1100))
    assert chosen[sampler.blocks[1]] > 80


def test_population_of_a_block() -> None:
    sampler = BlockCMAESSampler(SPACE, seed=0, block_size=24)
    assert sampler.trials((0, 24)) == 4 + math.floor(3 * math.log(24))
