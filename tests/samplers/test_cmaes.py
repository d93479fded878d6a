from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from moeopt.plan import ModelShape, Plan
from moeopt.samplers import CMAESSampler
from moeopt.spaces import MergeSpace, PruneSpace, Space
from moeopt.trials import genome

SHAPE = ModelShape(layers=2, experts=4, k=1)
AROUND = Plan.one_hot([[0, 1], [2, 3]], experts=4, k=1)


def merge() -> MergeSpace:
    return MergeSpace(SHAPE, around=AROUND)


def evaluate(study: optuna.Study, space: Space, target: np.ndarray, n: int) -> None:
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, float(((space.vector(trial) - target) ** 2).mean()))


def notes(study: optuna.Study) -> list[int | None]:
    return [genome.origin(trial)["notes"].get("generation") for trial in study.trials]


@pytest.mark.parametrize("separable", [False, True])
def test_converges_on_a_quadratic(separable: bool) -> None:
    space = merge()
    target = space.start() + 1.5 * space.step * np.where(np.arange(space.size) % 2, 1, -1)
    study = optuna.create_study(sampler=CMAESSampler(space, seed=0, separable=separable))
    evaluate(study, space, target, 300)
    assert study.best_value < 0.2 * study.trials[0].value


def test_generations_fill_one_after_the_other() -> None:
    space = merge()
    sampler = CMAESSampler(space, seed=0)
    assert sampler.population_size == 4 + math.floor(3 * math.log(space.size))
    study = optuna.create_study(sampler=CMAESSampler(space, seed=0, population_size=4))
    evaluate(study, space, space.start(), 14)
    assert notes(study) == [None, *[0] * 4, *[1] * 4, *[2] * 4, 3]


def test_same_as_the_package_itself() -> None:
    """Four generations of `cmaes.CMA` in scaled coordinates, told the stored numbers."""
    from cmaes import CMA

    space = merge()
    sampler = CMAESSampler(space, seed=5, sigma=2.0, population_size=6)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, space, np.zeros(space.size), 25)

    x0 = space.start().astype(np.float64)
    bounds = np.stack([(space.low - x0) / space.step, (space.high - x0) / space.step], axis=1)
    reference = CMA(mean=np.zeros(space.size), sigma=2.0, bounds=bounds, population_size=6, n_max_resampling=0)
    obs = []
    for trial in study.trials[1:]:
        reference.reseed_rng(int(sampler.rng(trial.number).integers(1 << 32)))
        x = space.snap(x0 + reference.ask() * space.step)
        assert np.array_equal(x, genome.read(trial))
        obs.append(((x - x0) / space.step, trial.value))
        if len(obs) == 6:
            reference.tell(obs)
            obs = []


def test_first_mean_is_the_best_of_start_and_enqueued_trials() -> None:
    space = merge()
    target = space.snap(space.start() + 2 * space.step)
    study = optuna.create_study(sampler=CMAESSampler(space, seed=0, sigma=1e-6))
    for x in (space.snap(space.start() + space.step), space.snap(space.start() + 1.5 * space.step)):
        study.add_trial(genome.waiting(genome.pack(genome.GENOME, x), {}))
    evaluate(study, space, target, 4)
    assert [genome.origin(trial)["operator"] for trial in study.trials] == ["enqueued", "enqueued", "start", "cmaes"]
    near = genome.read(study.trials[3])
    assert near is not None
    assert np.allclose(near, space.start() + 1.5 * space.step, atol=1e-5)
    assert genome.origin(study.trials[3])["parents"] == [1]


def test_start_may_be_a_plan_or_a_vector() -> None:
    space = PruneSpace(SHAPE, keep=2)
    plan = Plan.one_hot([[1, 3], [0, 2]], experts=4, k=1)
    for start in (plan, space.encode(plan)):
        study = optuna.create_study(sampler=CMAESSampler(space, seed=0, start=start))
        trial = study.ask()
        assert space.plan(trial) == plan
    assert CMAESSampler(space, seed=0).settings() != CMAESSampler(space, seed=0, start=plan).settings()


def test_failed_trials_are_the_worst_and_late_ones_are_ignored() -> None:
    space = merge()
    sampler = CMAESSampler(space, seed=0, population_size=4)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, space, space.start(), 1)
    running = [study.ask() for _ in range(6)]
    assert notes(study)[1:] == [0] * 6
    for trial in running:
        space.plan(trial)
    study.tell(running[0], state=TrialState.FAIL)
    for loss, trial in zip([3.0, 1.0, 2.0], running[1:4]):
        study.tell(trial, loss)
    history = sampler.history(study, study.trials, without=-1)
    assert [obs.loss for obs in sampler.generations(history)[0]] == [None, 3.0, 1.0, 2.0]
    assert genome.origin(study._storage.get_trial(study.ask()._trial_id))["notes"]["generation"] == 1
    study.tell(running[4], 0.0)
    study.tell(running[5], 0.0)
    again = sampler.generations(sampler.history(study, study.trials, without=-1))
    assert [[obs.slot for obs in generation] for generation in again] == [[1, 2, 3, 4]]


def test_one_number() -> None:
    space = PruneSpace(ModelShape(layers=2, experts=8, k=2), keep=4, groups=1, encoding="subset")
    study = optuna.create_study(sampler=CMAESSampler(space, seed=0, separable=True))
    evaluate(study, space, np.array([50.0]), 30)
    assert study.best_value < 25.0
