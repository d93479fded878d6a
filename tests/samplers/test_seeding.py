from __future__ import annotations

from typing import Any

import optuna
import pytest

from moeopt.samplers.seeding import reseed

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.mark.parametrize(
    "make",
    [
        lambda: optuna.samplers.RandomSampler(),
        lambda: optuna.samplers.TPESampler(n_startup_trials=2),
        lambda: optuna.samplers.NSGAIISampler(population_size=2),
        lambda: optuna.samplers.PartialFixedSampler({"y": 0.5}, optuna.samplers.TPESampler(n_startup_trials=2)),
    ],
    ids=["random", "tpe", "nsga2", "nested"],
)
def test_reseed_reaches_every_random_state(make: Any) -> None:
    def draws(seed: int) -> list[float]:
        sampler = make()
        reseed(sampler, seed)
        study = optuna.create_study(sampler=sampler)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1), n_trials=6)
        return [trial.params["x"] for trial in study.trials]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
