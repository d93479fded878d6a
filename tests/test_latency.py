"""The cost model of latency: what it fits, and that a study keeps one for all of its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import moeopt
from moeopt.errors import StudyError
from moeopt.study.latency import LATENCY, Latency
from moeopt.study.storage import attributes
from moeopt.tasks import Example, MultipleChoiceTask

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("task '", "the full model's", "latency is that")
]
TASK = MultipleChoiceTask("q", search=[Example(str(i), f"is {i} odd?", ("n", "y"), i % 2) for i in range(8)])


@pytest.fixture(scope="module")
def make(make_mixtral: Any, tiny_tokenizer: Any) -> Any:
    model = make_mixtral(layers=2, experts=6, hidden=16, intermediate=16, k=2)
    space = moeopt.ActiveSpace(moeopt.PruneSpace.of(model, keep=(2, 6)), k=(1, 2))
    return lambda: moeopt.Objective(model, tiny_tokenizer, TASK, space, objectives=("loss", "latency"))


def test_it_finds_the_costs_of_a_machine_that_slows_down(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, now = make(), [0.0]
    passes, model = [0], objective.model
    forward = model.forward

    def run(**inputs: Any) -> Any:
        passes[0] += 1
        kept, active = (np.mean([getattr(part, name) for part in plans[-1].layers]) for name in ("kept_experts", "k"))
        now[0] += (1 + passes[0] // 7) * inputs["input_ids"].numel() * (2 + 3 * active / 2 + kept / 6)
        return forward(**inputs)

    plans: list[Any] = []

    def patched(model: Any, plan: Any) -> Any:
        plans.append(plan)
        return moeopt.patched(model, plan)

    monkeypatch.setattr("moeopt.study.latency.patched", patched)
    monkeypatch.setattr(model, "forward", run)
    latency = Latency(objective.evaluator, clock=lambda: now[0])
    latency.begin(None)
    monkeypatch.undo()
    plan = objective.space.decode(objective.space.start())
    full = latency(plan, objective.evaluator.evaluate(plan))
    fewer = objective.space.decode(objective.space.with_counts(objective.space.start(), [3, 3]))
    assert latency(fewer, objective.evaluator.evaluate(fewer)) / full == pytest.approx((2 + 3 + 0.5) / 6, rel=0.1)


def test_a_study_keeps_its_cost_model(make: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    def searched(trials: int) -> optuna.Study:
        objective = make()
        study = moeopt.create_study(
            "s", objective=objective, storage=url, sampler="random", seed=0, load_if_exists=True
        )
        moeopt.optimize(study, objective, n_trials=trials)
        return study

    first = attributes.study_attributes(searched(2))[LATENCY]
    study = searched(5)
    assert attributes.study_attributes(study)[LATENCY] == first
    c, space = first["coefficients"], make().space
    for trial in study.trials:
        kept = np.mean([layer.kept_experts for layer in space.plan(trial).layers]) / 6
        told = (c[0] + c[1] * trial.user_attrs["active"] / 2 + c[2] * kept) * first["seconds"]
        assert trial.values[1] == trial.user_attrs["latency"] == pytest.approx(told)
    attributes.write_study(study, {LATENCY: first | {"coefficients": [1.0, -1.0, 0.0]}})
    with pytest.raises(StudyError, match="is no cost model"):
        searched(6)
