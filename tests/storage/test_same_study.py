"""Same seed, one worker: the same study on every database."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from databases import SERVERS

import moeopt
from moeopt import samplers
from moeopt.study.storage import attributes
from moeopt.trials import genome

from .conftest import opened

SPACE = moeopt.EEPSpace(moeopt.ModelShape(4, 6, k=2), keep=3, groups=2)
TIMES = ("worker", "started")


def content(url: str, name: str, sampler: Any) -> list[Any]:
    """All that a study holds, but for times, its worker and its random identity."""
    study = opened(url, name, sampler)

    def objective(trial: optuna.Trial) -> float:
        x = SPACE.vector(trial)
        loss = float(((x - 0.3) ** 2).sum())
        scores = genome.pack(genome.SCORES, x)
        attributes.write(study, trial, scores, {"accuracy": 1 / (1 + loss), "unicode": "τ <b>"})
        if trial.number == 3:
            return float("nan")
        return loss

    moeopt.optimize(study, objective, n_trials=5)
    study = opened(url, name, sampler)
    moeopt.optimize(study, objective, n_trials=9)
    contents = []
    for trial in opened(url, name, sampler).trials:
        system = dict(trial.system_attrs)
        system[genome.ORIGIN] = {k: v for k, v in system[genome.ORIGIN].items() if k not in TIMES}
        facts = (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs, system)
        contents.append(facts)
    return contents


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["eep", "local", "cmaes"])
def test_every_database_gives_the_same_study(tmp_path: Path, sampler: str) -> None:
    urls = [url for variable in SERVERS.values() if (url := os.environ.get(variable))]
    if not urls:
        pytest.skip(f"none of {', '.join(SERVERS.values())} is set")
    options: dict[str, Any] = {"initial": 3, "prune_until": 6} if sampler == "eep" else {}
    made = [samplers.get(sampler, SPACE, seed=7, **options) for _ in range(1 + len(urls))]
    reference = content(f"sqlite:///{tmp_path}/study.db", "same", made[0])
    assert len(reference) == 9
    for url, other in zip(urls, made[1:]):
        name = f"test-{uuid.uuid4().hex[:12]}"
        try:
            assert content(url, name, other) == reference
        finally:
            with suppress(KeyError):
                optuna.delete_study(study_name=name, storage=url)
