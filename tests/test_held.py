"""What is left on dev of a gain on search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeopt
from moeopt.errors import StudyError
from moeopt.plan import Plan
from moeopt.report.terminal.studies import study_record
from moeopt.results.selection import Held, held
from moeopt.tasks import Example, MultipleChoiceTask

LAYERS, EXPERTS = 3, 6
ROWS = [Example(str(i), f"is {i * 7 % 40} so {'very ' * (i % 3)}odd?", ("n", "y"), i % 2) for i in range(30)]
TASK = MultipleChoiceTask("questions", search=ROWS[:10], dev=ROWS[10:24], test=ROWS[24:])
PLANS = [Plan.one_hot([[a, b, c]] * LAYERS, experts=EXPERTS, k=2) for a, b, c in ((0, 1, 2), (1, 2, 3), (3, 4, 5))]


@pytest.fixture(scope="module")
def make(make_mixtral: Any, tiny_tokenizer: Any) -> Any:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)
    space = moeopt.PruneSpace.of(model, keep=3)
    return lambda task=TASK, **options: moeopt.Objective(model, tiny_tokenizer, task, space, **options)


@pytest.mark.parametrize("warm", [True, False])
def test_it_is_the_difference_of_both_plans_on_dev(make: Any, warm: bool) -> None:
    objective = make(limit=8)
    study = moeopt.create_study(objective=objective, storage=None, sampler="random", warm_starts=PLANS if warm else ())
    moeopt.optimize(study, objective, n_trials=14)
    made = held(study, objective)
    assert made is not None
    start = min(study.trials[: 3 if warm else 1], key=lambda trial: trial.value)
    assert (made.trial, made.start) == (study.best_trial.number, start.number)
    assert made.search == pytest.approx(start.value - study.best_value)
    dev = moeopt.Evaluator(objective.model, objective.tokenizer, TASK, split="dev", limit=8)
    losses = [dev.evaluate(objective.space.plan(trial)).losses for trial in (start, study.best_trial)]
    assert made.dev == pytest.approx(float(np.mean(losses[0] - losses[1])), rel=1e-5)
    assert made.low < made.dev < made.high
    assert made.share == made.dev / made.search
    assert (made.examples, study.user_attrs["held"]["dev"]) == (8, made.dev)
    assert study_record(study)["held"] == study.user_attrs["held"]


@pytest.mark.parametrize(("dev", "said"), [(0.05, "50%"), (0.2, "All and more"), (0.0, "Nothing"), (-0.1, "Nothing")])
def test_a_share_is_said_where_there_is_one(dev: float, said: str) -> None:
    assert str(Held(3, 1, 0.1, dev, dev - 0.1, dev + 0.1, 8)).startswith(f"{said} of the gain held: 0.1000 on search")


def test_what_is_there_is_not_run_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make()
    study = moeopt.create_study(objective=objective, storage=None, sampler="random")
    moeopt.optimize(study, objective, n_trials=8)
    made = held(study, objective)
    monkeypatch.setattr(moeopt.Evaluator, "evaluate", None)
    assert made is not None
    assert held(study, objective) == made


@pytest.mark.filterwarnings("ignore:task 'questions' has no dev")
def test_without_a_gain_nothing_is_said_and_without_dev_why(make: Any) -> None:
    objective = make()
    study = moeopt.create_study(objective=objective, storage=None, sampler="random")
    moeopt.optimize(study, objective, n_trials=1)
    assert held(study, objective) is None
    assert "held" not in study.user_attrs
    with pytest.raises(StudyError, match="'questions' has no dev split"):
        held(study, make(MultipleChoiceTask("questions", search=ROWS)))


@pytest.mark.parametrize("value", [1, {}, {"trial": 0}, {"search": "much"}])
def test_what_is_no_gain_is_refused(make: Any, value: Any) -> None:
    study = moeopt.create_study(objective=make(), storage=None, sampler="random")
    study.set_user_attr("held", value)
    with pytest.raises(StudyError, match="'held'"):
        study_record(study)
