"""The guided sampler: its linear model, its trust region, and what it does where guides mislead."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import optuna
import pytest

from moeopt.errors import StorageError
from moeopt.plan import ModelShape, Plan
from moeopt.samplers import GuidedSampler, Observation, get
from moeopt.samplers.guided import GUIDED, INTERACTION, SPREAD, SQUARED, _Model
from moeopt.samplers.moves import MOVES
from moeopt.spaces import ActiveSpace, EEPSpace, PruneSpace, Space
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.guide import GUIDE, Guide

SHAPE = ModelShape(layers=6, experts=16, k=2)
VALUES = np.random.default_rng(3).normal(size=(6, 16))
"""What having each expert costs, in the loss below."""
SPACES: dict[str, Space] = {
    "scores": PruneSpace(SHAPE, keep=6),
    "rows": PruneSpace(SHAPE, keep=6, encoding="rows", groups=3),
    "eep": EEPSpace(SHAPE, keep=6),
    "active": ActiveSpace(PruneSpace(SHAPE, keep=6), k=(1, 2)),
}


def membership(plan: Plan) -> np.ndarray:
    return np.stack([np.isin(np.arange(16), layer.expert_matrix.argmax(1)) for layer in plan.layers]).astype(float)


def loss_of(plan: Plan) -> float:
    """Linear in the experts that are kept, but for those that adjacent layers share, and what is merged."""
    kept = membership(plan)
    merged = sum(float(np.abs(layer.router_matrix - layer.expert_matrix).sum()) for layer in plan.layers)
    return float((kept * VALUES).sum() + 0.3 * (kept[:-1] * kept[1:]).sum() + merged)


def leave_guide(study: optuna.Study, trial: optuna.Trial, plan: Plan, truth: float) -> None:
    """The derivative of the linear part, times `truth`."""
    signed = (np.where(membership(plan), -VALUES, VALUES) * truth).astype(np.float32)
    attributes.write(study, trial, Guide(plan.fingerprint, "test", signed, np.zeros_like(signed)).packed())


def search(sampler: optuna.samplers.BaseSampler, trials: int, *, truth: float = 1.0, study: Any = None) -> optuna.Study:
    study = optuna.create_study(sampler=sampler) if study is None else study

    def objective(trial: optuna.Trial) -> float:
        plan = sampler.space.decode(sampler.space.vector(trial))  # type: ignore[attr-defined]
        loss = loss_of(plan)
        done = [t for t in study.get_trials() if t.state.is_finished()]
        best = min((t.value for t in done), default=np.inf)
        if loss < best and not any(GUIDE in t.system_attrs for t in done[-10:]):
            leave_guide(study, trial, plan, truth)
        return loss

    study.optimize(objective, n_trials=trials)
    return study


def operators(study: optuna.Study) -> Counter[str]:
    return Counter(genome.origin(trial)["operator"] for trial in study.trials)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPACES)
def test_what_a_guide_tells_is_followed(kind: str) -> None:
    space = SPACES[kind]
    guided, local = ([search(get(name, space, seed=seed), 40) for seed in range(4)] for name in (GUIDED, "local"))
    assert all(a.best_value < b.best_value for a, b in zip(guided, local))
    assert all(operators(study)[GUIDED] >= 15 for study in guided)
    for study in guided:
        for trial in study.trials:
            origin = genome.origin(trial)
            if origin["operator"] != GUIDED:
                continue
            (parent,), notes = origin["parents"], origin["notes"]
            before, after = (space.matrices(space.vector(study.trials[i])) for i in (parent, trial.number))
            changed = [i for i in range(len(space.groups)) if not np.array_equal(before[i], after[i])]
            assert (changed[0], len(changed)) == (notes["first"], notes["width"])


def test_it_comes_near_the_best_pruning_there_is() -> None:
    space = SPACES["scores"]
    kept = np.argsort(VALUES, axis=1)[:, :6]
    linear = loss_of(Plan.one_hot([sorted(row.tolist()) for row in kept], experts=16, k=2))
    start = loss_of(space.decode(space.start()))
    study = search(GuidedSampler(space, seed=0), 40)
    assert start - study.best_value > 0.95 * (start - linear)


@pytest.mark.parametrize("truth", [-1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_guide_that_misleads_leaves_it_to_local_moves(truth: float) -> None:
    space = SPACES["eep"]
    sampler = GuidedSampler(space, seed=0, patience=4)
    study = search(sampler, 120, truth=truth)
    assert sum(operators(study)[move] for move in MOVES) > 20
    assert study.best_value < loss_of(space.decode(space.start())) - 3


def test_without_a_guide_it_proposes_what_local_does() -> None:
    space = SPACES["eep"]
    studies = [optuna.create_study(sampler=get(name, space, seed=4)) for name in (GUIDED, "local")]
    for study in studies:
        study.optimize(lambda trial: loss_of(space.decode(space.vector(trial))), n_trials=30)
    assert all(np.array_equal(genome.read(a), genome.read(b)) for a, b in zip(*(s.trials for s in studies)))


def model_of(trials: int) -> _Model:
    rng = np.random.default_rng(1)
    signed, squared = rng.normal(size=(2, 3, 5))
    differing = rng.integers(-1, 2, size=(trials, 15)).astype(float)
    differing[:, 0] = 1.0  # no trial is the guide's plan
    return _Model(0, signed, squared, differing, differing @ rng.normal(size=15))


@pytest.mark.parametrize("trials", [0, 1, 7, 40])
def test_its_mean_is_that_of_bayesian_regression(trials: int) -> None:
    model = model_of(trials)
    mean, spread, noise = model.prior
    features = np.stack([model.signed.reshape(-1), model.squared.reshape(-1)], axis=1)
    # (a, b): least squares with one row a trial, and one that holds each factor at what it is before.
    first = features @ [1.0, SQUARED]
    weigh = 1 / (INTERACTION * np.abs(model.differing) @ (SPREAD * (abs(first) + np.median(abs(first)))) + 1e-9)
    rows = np.concatenate([model.differing @ features * weigh[:, None], np.diag([1.0, 1 / SQUARED])])
    factors = np.linalg.lstsq(rows, np.concatenate([model.changes * weigh, [1.0, 1.0]]), rcond=None)[0]
    np.testing.assert_allclose(mean, features @ factors.clip(0), rtol=1e-6)
    precision = np.diag(1 / spread**2) + model.differing.T @ np.diag(1 / noise**2) @ model.differing
    weighted = mean / spread**2 + model.differing.T @ (model.changes / noise**2)
    np.testing.assert_allclose(model.mean(), np.linalg.solve(precision, weighted), rtol=1e-6, atol=1e-8)
    draws = np.stack([model.draw(np.random.default_rng(i)) for i in range(4000)])
    np.testing.assert_allclose(draws.mean(0), model.mean(), atol=5 * np.sqrt(spread.max() ** 2 / 4000))
    np.testing.assert_allclose(np.cov(draws.T), np.linalg.inv(precision), atol=0.12 * spread.max() ** 2)


def obs(slot: int, loss: float | None, **more: Any) -> Observation:
    x = SPACES["eep"].start()
    facts: dict[str, Any] = {"failed": loss is None, "fingerprint": str(slot), "operator": GUIDED, "attrs": {}}
    return Observation(number=slot, slot=slot, x=x, loss=loss, **(facts | more))


@pytest.mark.parametrize(
    ("losses", "radius"),
    [
        ([], 3),
        ([0.9], 6),  # a gain of what was predicted
        ([0.99], 3),  # of less than a quarter of it
        ([1.5], 1),
        ([1.5, None, 0.9], 2),
        ([0.9, 1.5], 3),
    ],
)
def test_the_radius_grows_where_predictions_hold(losses: list[float | None], radius: int) -> None:
    history = [obs(0, 1.0, operator="start")]
    for slot, loss in enumerate(losses, start=1):
        history.append(obs(slot, loss, notes={"parent": 0, "first": 0, "width": 1, "predicted": 0.1}))
    assert GuidedSampler(SPACES["eep"], seed=0).reach(history, 0) == radius


def test_a_damaged_guide_is_said_to_be() -> None:
    sampler = GuidedSampler(SPACES["eep"], seed=0)
    study = optuna.create_study(sampler=sampler)
    trial = study.ask()
    attributes.write(study, trial, Guide("plan", "of", *np.zeros((2, 5, 16), np.float32)).packed())
    study.tell(trial, 1.0)
    with pytest.raises(StorageError, match=r"moeopt:guide.* of trial 0 is damaged"):
        study.ask()
