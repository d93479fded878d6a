"""Studies as moeopt writes them, without a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import hostile
import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from moeopt.trials.objectives import direction as objective_direction

BEGAN = datetime(2026, 1, 1)
ABOUT: dict[str, Any] = {
    "version": "0.1.0",
    "model": {"name_or_path": "tiny", "architecture": "Mixtral", "config_hash": "c", "weights": "w"},
    "task": {"name": "sums", "fingerprint": "f", "split": "search", "limit": 8, "max_length": None},
    "space": {
        "kind": "prune",
        "shape": {"layers": 2, "experts": 4, "k": 2},
        "keep": 2,
        "k": 2,
        "groups": [[0, 0], [1, 1]],
        "router": "prob",
    },
    "evaluation": {"rungs": [8], "report": "mean", "attention": "sdpa", "experts": "eager"},
    "pruner": {"class": "optuna.pruners._nop.NopPruner"},
}
Facts = dict[str, Any]


def trial(
    loss: float | Sequence[float] | None = None,
    *,
    state: TrialState = TrialState.COMPLETE,
    start: float = 0.0,
    end: float | None = None,
    system: Facts | None = None,
    **user: Any,
) -> FrozenTrial:
    """An ended trial, of several objectives by their values; seconds are from `BEGAN`."""
    values: Facts = {"value": None, "values": list(loss)} if isinstance(loss, Sequence) else {"value": loss}
    return FrozenTrial(
        number=0, trial_id=0, state=state, **values, params={}, distributions={}, intermediate_values={},
        datetime_start=BEGAN + timedelta(seconds=start),
        datetime_complete=BEGAN + timedelta(seconds=start + 1 if end is None else end),
        user_attrs=user, system_attrs=system or {},
    )  # fmt: skip


def make(
    name: str,
    trials: Sequence[FrozenTrial] | Sequence[float] | Sequence[Sequence[float]],
    sampler: str = "eep",
    seed: int = 0,
    *,
    change: dict[str, Any] | None = None,
    options: Facts | None = None,
    test_loss: float | None = None,
    storage: Any = None,
    direction: str = "minimize",
    objectives: Sequence[str] = (),
) -> optuna.Study:
    """A study of these trials; of losses: a second and 10 layer-tokens each. `change` sets dotted fields of `ABOUT`."""
    directions = [objective_direction(each) for each in objectives] or [direction]
    study = optuna.create_study(study_name=name, storage=storage, directions=directions)
    about = copy.deepcopy(ABOUT) | {"sampler": {"name": sampler, "seed": seed, "redraw": 20, **(options or {})}}
    for path, value in (change or {}).items():
        part, _, key = path.partition(".")
        about[part][key] = value
    if objectives:
        about["evaluation"]["objectives"] = list(objectives)
    study.set_user_attr("moeopt", about)
    if test_loss is not None:
        scores = {"search": {}, "dev": {}, "test": {"winner": {"loss": test_loss}}}
        examples = {"test": {"of": "of", "count": 12}}
        study.set_user_attr("selection", {**hostile.RECORD, "examples": examples, "scores": scores})
    for i, given in enumerate(trials):
        study.add_trial(given if isinstance(given, FrozenTrial) else trial(given, start=i, layer_tokens=10))
    return study


def grid(
    samplers: dict[str, float], seeds: int, trials: int = 12, storage: Any = None, **more: Any
) -> list[optuna.Study]:
    """A study of every sampler and seed, whose losses lie around the sampler's level."""
    studies = []
    for i, (name, level) in enumerate(samplers.items()):
        for seed in range(seeds):
            losses = level * np.random.default_rng([i, seed]).lognormal(sigma=0.3, size=trials)
            studies.append(make(f"{name}-{seed}", list(map(float, losses)), name, seed, storage=storage, **more))
    return studies


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(name="trial")
def _trial() -> Callable[..., FrozenTrial]:
    return trial


@pytest.fixture(name="make")
def _make() -> Callable[..., optuna.Study]:
    return make


@pytest.fixture(name="grid")
def _grid() -> Callable[..., list[optuna.Study]]:
    return grid
