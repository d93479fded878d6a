"""Studies of several objectives and of constraints: plain and moeopt's, raced, resumed, by every sampler that can."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import moeopt
from moeopt.errors import SamplerError, StudyError
from moeopt.report.terminal.studies import study_record
from moeopt.results.front import front_of
from moeopt.results.method_comparison import searched as method_comparison
from moeopt.results.selection import held
from moeopt.samplers import SAMPLERS, get
from moeopt.statistics import hypervolume
from moeopt.study import best_trial, recipe, stalled
from moeopt.study.objective import Objective
from moeopt.tasks import Example, MixtureTask, MultipleChoiceTask
from moeopt.trials import front, genome
from moeopt.trials.objectives import parsed, size_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:task '"),
    pytest.mark.filterwarnings("ignore:the full model's accuracy"),
    pytest.mark.filterwarnings("ignore:the sampler 'guided' searches as"),
    pytest.mark.filterwarnings("ignore:all 10 trials of EEP"),
]
optuna.logging.set_verbosity(optuna.logging.ERROR)

QUESTIONS = [Example(str(i), f"is {i * 7 % 40} so {'very ' * (i % 3)}odd?", ("n", "y"), i % 2) for i in range(40)]
TASK = MultipleChoiceTask("questions", search=QUESTIONS)
BOTH = ("loss", "active")
OPTIONS: dict[str, dict[str, Any]] = {
    "nsgaii": {"population_size": 6}, "nsgaiii": {"population_size": 6}, "gp": {"n_startup_trials": 6},
}  # fmt: skip
ABLE = [name for name, make in SAMPLERS.items() if getattr(make, "several", False)]


@pytest.fixture(scope="module")
def make(make_mixtral: Any, tiny_tokenizer: Any) -> Any:
    model = make_mixtral(layers=3, experts=6, hidden=16, intermediate=16, k=3)
    space = moeopt.ActiveSpace(moeopt.PruneSpace.of(model, keep=4), k=(1, 3))

    def objective(**options: Any) -> Objective:
        options = {"objectives": BOTH, "limit": 12} | options
        return Objective(model, tiny_tokenizer, TASK, space, batch_tokens=200, **options)

    return objective


def searched(objective: Objective, trials: int, sampler: str = "random", url: str | None = None) -> optuna.Study:
    study = moeopt.create_study(
        "s", objective=objective, storage=url, sampler=sampler, seed=1, load_if_exists=True, warm_starts=[],
        **OPTIONS.get(sampler, {}),
    )  # fmt: skip
    moeopt.optimize(study, objective, n_trials=trials)
    return study


def volume(trials: list[Any]) -> float:
    return hypervolume(np.array([trial.values for trial in trials]), np.array([20.0, 4.0]))


def told(study: optuna.Study) -> list[Any]:
    return [(t.values, t.user_attrs.get("operator"), t.constraints) for t in study.trials]


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name in ("guided", "nsgaii") else pytest.mark.slow) for name in ABLE]
)
def test_resumed_is_uninterrupted_and_better_than_its_start(sampler: str, make: Any, tmp_path: Path) -> None:
    whole = searched(make(), 16, sampler)
    url = f"sqlite:///{tmp_path}/s.db"
    searched(make(), 7, sampler, url)
    assert told(searched(make(), 16, sampler, url)) == told(whole)
    assert volume(whole.trials) > volume(whole.trials[:1])
    assert {tuple(t.values) for t in whole.best_trials} == {tuple(t.values) for t in front.front(whole)}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ABLE])
def test_samplers_of_one_objective_say_so_at_once(sampler: str, make: Any) -> None:
    named = "nevergrad:DE" if sampler == "nevergrad" else sampler
    with pytest.raises(SamplerError, match="optimises one objective, the study has 2; several are for guided"):
        moeopt.create_study(objective=make(), sampler=named)


def test_every_sampler_of_several_is_named_by_the_refusal() -> None:
    from moeopt.samplers.base import SEVERAL

    assert all(name in SEVERAL for name in ABLE)


def test_values_are_what_they_are_called(make: Any) -> None:
    objective = make(objectives=("metric", "bytes", "active", "loss"))
    assert objective.directions == ["maximize", "minimize", "minimize", "minimize"]
    study = searched(objective, 3)
    for trial in study.trials:
        plan = objective.space.plan(trial)
        evaluation = objective.evaluator.evaluate(plan)
        bytes_ = objective.goals.quantities["bytes"](plan, None)
        assert trial.values == [evaluation.accuracy, bytes_, round(evaluation.active, 4), evaluation.loss]
        assert (trial.user_attrs["bytes"], trial.user_attrs["active"]) == (trial.values[1], trial.values[2])


@pytest.mark.parametrize("plain", [None, optuna.samplers.TPESampler, optuna.samplers.NSGAIISampler])
def test_plain_optuna(make: Any, plain: Any) -> None:
    objective = make()
    sampler = get("nsgaii", objective.space, population_size=4) if plain is None else plain(seed=0)
    study = optuna.create_study(directions=objective.directions, sampler=sampler)
    study.optimize(objective, n_trials=4)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4
    assert len(study.best_trials) >= 1
    with pytest.raises(StudyError, match=r"create the study with directions=\['minimize', 'minimize'\]"):
        optuna.create_study(sampler=get("random", objective.space)).optimize(objective, n_trials=1)


def test_racing_by_loss_where_the_rest_is_equal_prunes_what_racing_one_objective_does(make: Any) -> None:
    studies = []
    for objectives in (("loss",), ("bytes", "loss")):
        objective = make(objectives=objectives, rungs=3, limit=24)
        study = moeopt.create_study(objective=objective, sampler="random", pruner="racing", seed=0, warm_starts=[])
        moeopt.optimize(study, objective, n_trials=8)
        studies.append(study)
    single, double = studies
    assert [t.state for t in single.trials] == [t.state for t in double.trials]
    pruned = [(a, b) for a, b in zip(single.trials, double.trials) if a.state.name == "PRUNED"]
    assert pruned
    for a, b in pruned:
        assert b.user_attrs["estimate"] == [b.user_attrs["bytes"], a.user_attrs["estimate"]]


def test_what_cannot_be_raced(make: Any) -> None:
    for objectives in (BOTH, ("metric",)):
        objective = make(objectives=objectives, rungs=3)
        assert not objective.goals.races
        with pytest.raises(StudyError, match=f"cannot prune trials of {', '.join(objectives)}"):
            moeopt.create_study(objective=objective, sampler="random", pruner="racing")


def test_a_constraint_is_optunas(make: Any) -> None:
    objective = make(objectives=("loss",), constraints=["active <= 2"])
    study = searched(objective, 12, "tpe")
    assert {key for t in study.trials for key in t.constraints} == {"active <= 2"}
    for trial in study.trials:
        assert trial.constraints["active <= 2"] == trial.user_attrs["active"] - 2
    feasible = [t for t in study.trials if t.user_attrs["active"] <= 2]
    best = best_trial(study)
    assert best is not None
    assert best.value == min(t.value for t in feasible)
    assert study.best_trial.value == best.value


def test_what_no_trial_keeps_is_named_with_the_least_excess(make: Any) -> None:
    study = searched(make(constraints=["active <= 0.5"]), 3)
    least = min(t.constraints["active <= 0.5"] for t in study.trials)
    assert front.broken(study) == f": 3 of 3 break 'active <= 0.5', by {least:.3g} or more"
    with pytest.raises(StudyError, match=r"keeps its constraints yet: 3 of 3 break 'active <= 0\.5'"):
        front_of(study)
    assert front.broken(optuna.create_study()) == ""


@pytest.mark.parametrize("sampler", ["eep", "cmaes", "local", "guided", "nevergrad:DE", "blockcmaes"])
def test_infeasible_trials_come_last_to_samplers(sampler: str, make: Any) -> None:
    objective = make(objectives=("loss",), constraints=["active <= 2"])
    study = searched(objective, 10, sampler)
    history = study.sampler.history(study, study.trials, without=-1)  # type: ignore[attr-defined]
    assert [obs.number for obs in history] == list(range(10))
    losses = {bool(obs.broken): [] for obs in history}  # type: ignore[var-annotated]
    for obs in history:
        losses[bool(obs.broken)].append(obs.loss)
        if not obs.broken:
            assert obs.loss == study.trials[obs.number].value
    assert min(losses.get(True, [np.inf])) > max(losses.get(False, [-np.inf]))


def test_a_study_keeps_its_objectives(make: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    searched(make(constraints=["bytes<=1GB"]), 2, url=url)
    with pytest.raises(StudyError, match=r"evaluation\.constraints"):
        searched(make(), 3, url=url)
    with pytest.raises(StudyError, match=r"evaluation\.objectives"):
        searched(make(objectives=("active", "loss"), constraints=["bytes <= 1e9"]), 3, url=url)
    loaded = moeopt.load_study("s", url)
    assert loaded.metric_names == list(BOTH)
    assert recipe.arguments(recipe.read(loaded))["objectives"] == list(BOTH)
    with pytest.raises(StudyError, match="2 objectives and no best trial"):
        best_trial(loaded)
    last = max(t.number for t in front.front(loaded))
    assert stalled(loaded) == 1 - last


def test_the_loss_alone_is_described_as_ever(make: Any) -> None:
    about = make(objectives=("loss",)).describe()["evaluation"]
    assert not {"objectives", "constraints", "quantities"} & set(about)


def test_members_of_a_mixture(make_mixtral: Any, tiny_tokenizer: Any) -> None:
    tasks = {name: (MultipleChoiceTask(name, search=QUESTIONS[i::2]), 1.0 + i) for i, name in enumerate(("a", "b"))}
    model = make_mixtral(layers=2, experts=4)
    space = moeopt.PruneSpace.of(model, keep=2)
    names = ("worst", "loss:a", "loss:b", "metric:b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objective = Objective(model, tiny_tokenizer, MixtureTask(tasks), space, limit=24, objectives=names)
        study = searched(objective, 2)
    plan = objective.space.plan(study.trials[1])
    values = {}
    for name, (task, _) in tasks.items():
        count = sum(request.source.member == list(tasks).index(name) for request in objective.evaluator.requests) // 2
        each = moeopt.Evaluator(model, tiny_tokenizer, task, limit=count)
        values[name] = each.evaluate(plan), each.full_model()
    expected = [
        max(small.loss - full.loss for small, full in values.values()),
        values["a"][0].loss, values["b"][0].loss, values["b"][0].accuracy,
    ]  # fmt: skip
    assert study.trials[1].values == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ("loss", "size")}, "an objective is one of loss, metric, worst, bytes, active, latency"),
        ({"objectives": ("loss", "worst")}, "the task is none"),
        ({"objectives": ("loss:a",)}, "no member 'a'; it is no mixture"),
        ({"objectives": ("metric",), "guide": 0.3}, "guides are derivatives of the loss, which is none of metric"),
        ({"constraints": ["bytes < 3"]}, "a constraint is a text such as"),
        ({"constraints": ["bytes <= big"]}, "a size is a number of bytes"),
        ({"constraints": ["loss <= nan"]}, "must be a finite number"),
        ({"constraints": "bytes <= 3"}, "constraints is a list"),
        ({"constraints": ["bytes <= 3", "bytes<=3"]}, "stated twice"),
    ],
)
def test_bad_arguments(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        make(**options)


def test_sizes() -> None:
    assert [size_of(text) for text in ("24GB", "24 GiB", "24e9", 7, "1.5kB")] == [
        24 * 10**9,
        24 << 30,
        24 * 10**9,
        7,
        1500,
    ]
    assert str(parsed("metric>=0.8")) == "metric >= 0.8"


def test_estimates_of_pruned_trials_reach_samplers(make: Any) -> None:
    objective = make()
    study = optuna.create_study(directions=objective.directions)
    x = objective.space.start()
    attrs = genome.pack(genome.GENOME, x) | {genome.ORIGIN: {"slot": 0}}
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.PRUNED, user_attrs={"estimate": [0.5, 2.0]}, system_attrs=attrs
        )
    )
    (obs,) = get("random", objective.space).history(study, study.trials, without=-1)
    assert obs.values == (0.5, 2.0)


def test_what_is_maximised_is_shown_and_compared_by_its_most(make: Any) -> None:
    objective = make(objectives=("metric",), constraints=["active <= 2"])
    study = searched(objective, 8)
    best = max((t for t in study.trials if t.constraints["active <= 2"] <= 0), key=lambda t: (t.values[0], -t.number))
    compared = method_comparison.searched(study)
    assert compared[0].plan.fingerprint == objective.space.plan(best).fingerprint
    record = study_record(study)
    assert record["best"]["number"] == record["top"][0]["number"] == best.number
    assert max(phase["best_loss"] for phase in record["phases"]) == max(t.values[0] for t in study.trials)
    assert held(study, objective) is None


def test_one_shot_methods_are_not_compared_with_a_front(make: Any) -> None:
    with pytest.raises(StudyError, match="2 objectives and no best trial"):
        method_comparison.searched(searched(make(), 2))
