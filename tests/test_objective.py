"""The objective: no plan twice, racing under any pruner of Optuna, honest estimates, failures, exact resumption."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

import moeopt
from moeopt.errors import StudyError
from moeopt.plan import Plan
from moeopt.samplers import get
from moeopt.samplers.racing import RacingPruner, blocks, rung_sizes
from moeopt.study.recorded_tasks import Use, keep, restored
from moeopt.tasks import Example, MixtureTask, MultipleChoiceTask, TextTask
from moeopt.trials import genome

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
optuna.logging.set_verbosity(optuna.logging.ERROR)

LAYERS, EXPERTS, KEEP = 4, 6, 3
QUESTIONS = [Example(str(i), f"is {i * 7 % 40} so {'very ' * (i % 3)}odd?", ("n", "y"), i % 2) for i in range(40)]
TASK = MultipleChoiceTask("questions", search=QUESTIONS)
TEXT = TextTask(
    "text", search=[f"{i} lines of {i * i} words, " * 2 + "and so on" * (i % 3) for i in range(32)], window=80
)
KEPT = [[0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4]]


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Any:
    space = moeopt.EEPSpace.of(model, keep=KEEP, groups=2)
    return lambda task=TASK, model=model, space=space, **options: moeopt.Objective(
        model, tiny_tokenizer, task, space, batch_tokens=200, **options
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def plain_study(objective: Any, pruner: Any = None, storage: str | None = None, seed: int = 0, **options: Any) -> Any:
    return optuna.create_study(
        study_name="s",
        storage=storage,
        load_if_exists=True,
        sampler=get(options.pop("sampler", "eep"), objective.space, seed=seed, **options),
        pruner=pruner or optuna.pruners.NopPruner(),
    )


def one_hot(*kept: list[int]) -> Plan:
    return Plan.one_hot([list(rows) for rows in (*kept, *KEPT[len(kept) :])], experts=EXPERTS, k=2)


def enqueue(study: Any, objective: Any, *plans: Plan) -> list[FrozenTrial]:
    """Queue and run plans; the trials they became."""
    for plan in plans:
        moeopt.enqueue(study, objective.space, plan)
    before = len(study.trials) - len(plans)
    study.optimize(objective, n_trials=len(plans))
    return study.trials[before:]  # type: ignore[no-any-return]


def ungrouped(model: Any) -> Any:
    return moeopt.EEPSpace.of(model, keep=KEEP, groups=LAYERS)


# Never twice --------------------------------------------------------------------------------------------------------


def assert_copied(trial: FrozenTrial, source: FrozenTrial) -> None:
    assert trial.user_attrs["copied_from"] == source.number
    assert trial.user_attrs["tokens"] == trial.user_attrs["layer_tokens"] == 0
    assert trial.value == source.value
    assert trial.user_attrs["accuracy"] == source.user_attrs["accuracy"]
    np.testing.assert_array_equal(genome.read_scores(trial), genome.read_scores(source))
    assert trial.state == source.state


@pytest.mark.parametrize("rungs", [1, 4])
@pytest.mark.parametrize("task", [TASK, TEXT], ids=["questions", "text"])
def test_a_plan_is_evaluated_once(make: Any, model: Any, rungs: int, task: Any) -> None:
    objective = make(task, rungs=rungs, space=ungrouped(model))
    study = plain_study(objective)
    first, other, again = enqueue(study, objective, one_hot(), one_hot([5, 4, 3]), one_hot())
    assert_copied(again, first)
    assert "copied_from" not in first.user_attrs
    assert "copied_from" not in other.user_attrs
    assert again.intermediate_values == first.intermediate_values


def test_a_plan_whose_experts_are_reordered_is_the_same(make: Any, model: Any) -> None:
    objective = make(space=ungrouped(model))
    study = plain_study(objective)
    first, again = enqueue(study, objective, one_hot([0, 1, 2], [3, 4, 5]), one_hot([2, 0, 1], [5, 3, 4]))
    assert_copied(again, first)


def test_a_plan_of_another_worker_is_not_evaluated_again(make: Any, model: Any, url: str) -> None:
    ours, theirs = make(space=ungrouped(model), rungs=3), make(space=ungrouped(model), rungs=5)
    (first,) = enqueue(plain_study(ours, storage=url), ours, one_hot())
    copied, new = enqueue(plain_study(theirs, storage=url), theirs, one_hot(), one_hot([5, 4, 3]))
    assert_copied(copied, first)
    assert new.user_attrs["layer_tokens"] > 0
    (back,) = enqueue(plain_study(ours, storage=url), ours, one_hot([5, 4, 3]))
    assert_copied(back, new)


def test_no_study_saves_what_another_one_ran(make: Any) -> None:
    shared, costs = make(), []
    for objective in (shared, shared, make()):
        study = plain_study(objective)
        study.optimize(objective, n_trials=4)
        costs.append([trial.user_attrs["layer_tokens"] for trial in study.trials])
    assert costs[0] == costs[1] == costs[2]


def test_a_sampler_that_is_not_ours_does_not_evaluate_twice(make: Any, model: Any) -> None:
    space = moeopt.PruneSpace.of(model, keep=KEEP, groups=1)
    objective = make(space=space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    numbers = dict(zip(space.names, map(float, space.start())))
    study.enqueue_trial(numbers)
    study.enqueue_trial(numbers)
    study.optimize(objective, n_trials=2)
    assert_copied(study.trials[1], study.trials[0])


def test_what_a_pruned_trial_knows_is_taken_and_the_rest_is_run(make: Any, model: Any) -> None:
    objective = make(space=ungrouped(model), rungs=4)
    unraced = make(space=ungrouped(model))
    study = plain_study(objective, pruner=Stop(10))
    (pruned,) = enqueue(study, objective, one_hot())
    assert pruned.state == TrialState.PRUNED
    study.pruner = optuna.pruners.NopPruner()
    (whole,) = enqueue(study, objective, one_hot())
    assert whole.state == TrialState.COMPLETE
    assert whole.user_attrs["copied_from"] == pruned.number
    tokens = [sum(batch.tokens for batch in rung) for rung in objective.evaluator.passes.batches]
    assert whole.user_attrs["tokens"] == sum(tokens[2:])
    assert whole.value == pytest.approx(unraced.evaluator.evaluate(one_hot()).loss, abs=1e-5)
    assert list(whole.intermediate_values) == list(objective.evaluator.rungs)
    scores, earlier = genome.read_scores(whole), genome.read_scores(pruned)
    np.testing.assert_array_equal(scores[:, :10], earlier)
    study.pruner = Stop(5)
    (again,) = enqueue(study, objective, one_hot())
    assert (again.state, again.value) == (TrialState.COMPLETE, whole.value)  # known in full: nothing to save
    assert again.user_attrs["layer_tokens"] == 0


@pytest.mark.parametrize("other", ["limit", "examples", "answers", "max_length", "text", "model"])
def test_nothing_is_taken_from_other_examples_or_another_model(
    make: Any, model: Any, make_mixtral: Any, other: str
) -> None:
    options: dict[str, Any] = {"space": ungrouped(model)}
    first = make(**options)
    shifted = [Example(f"x{e.id}", e.prompt + "?", e.options, e.answer) for e in QUESTIONS]
    turned = [Example(e.id, e.prompt, e.options, 1 - e.answer) for e in QUESTIONS]
    second = {
        "limit": lambda: make(limit=20, **options),
        "examples": lambda: make(MultipleChoiceTask("other", search=shifted), **options),
        "answers": lambda: make(MultipleChoiceTask("turned", search=turned), **options),
        "max_length": lambda: make(max_length=9, **options),
        "text": lambda: make(TEXT, **options),
        "model": lambda: make(
            model=make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16, seed=3), **options
        ),
    }[other]
    with pytest.warns(UserWarning, match="cut at") if other == "max_length" else contextlib.nullcontext():
        objective = second()
    study = plain_study(first)
    enqueue(study, first, one_hot())
    (trial,) = enqueue(study, objective, one_hot())
    assert "copied_from" not in trial.user_attrs
    assert trial.value == objective.evaluator.evaluate(one_hot()).loss


def test_nothing_is_paired_with_trials_of_other_examples(make: Any, model: Any) -> None:
    options: dict[str, Any] = {"space": ungrouped(model)}
    other = [Example(f"x{e.id}", f"why {e.prompt}", e.options, e.answer) for e in QUESTIONS]
    first, second = make(**options), make(MultipleChoiceTask("other", search=other), limit=20, rungs=2, **options)
    study = plain_study(first)
    enqueue(study, first, one_hot())
    study.pruner = Stop(10)
    (trial,) = enqueue(study, second, one_hot([5, 4, 3]))
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["estimate"] == pytest.approx(trial.value)  # no incumbent to compare with


def test_a_retried_trial_goes_on_from_its_scores(make: Any, model: Any, url: str) -> None:
    objective = make(space=ungrouped(model), rungs=4, reference=False)
    study = moeopt.create_study("s", objective=objective, storage=url, warm_starts=[one_hot()])
    race = objective.evaluator.race

    def interrupted(plan: Any, earlier: Any) -> Any:
        for i, evaluation in enumerate(race(plan, earlier)):
            yield evaluation
            if i == 1:
                raise KeyboardInterrupt

    objective.evaluator.race = interrupted
    with pytest.raises(KeyboardInterrupt):
        study.optimize(objective, n_trials=1)
    objective.evaluator.race = race
    resumed = moeopt.create_study("s", objective=objective, storage=url, load_if_exists=True)
    moeopt.optimize(resumed, objective, n_trials=1)
    dead, retried = resumed.trials[:2]
    assert (dead.state, retried.state) == (TrialState.FAIL, TrialState.COMPLETE)
    tokens = [sum(batch.tokens for batch in rung) for rung in objective.evaluator.passes.batches]
    assert retried.user_attrs["tokens"] == sum(tokens[2:])
    assert list(retried.intermediate_values) == list(objective.evaluator.rungs)
    assert retried.value == pytest.approx(make(space=ungrouped(model)).evaluator.evaluate(one_hot()).loss, abs=1e-5)


# Racing under pruners -----------------------------------------------------------------------------------------------


class Stop(optuna.pruners.BasePruner):
    """Stops every trial once it has seen so many examples."""

    def __init__(self, at: int) -> None:
        self.at = at

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.last_step is not None and trial.last_step >= self.at


PRUNERS: dict[str, Any] = {
    "racing": lambda: RacingPruner(error=0.2, n_min=4),
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=2),
    "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=4, max_resource=32, reduction_factor=2),
    "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=4, reduction_factor=2),
    "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.3, n_startup_steps=4),
    "none": lambda: optuna.pruners.NopPruner(),
}


def honest(study: Any, trial: FrozenTrial) -> float:
    """The estimate of a pruned trial, slowly: incumbent's mean + mean paired difference on the examples so far."""
    scores = genome.read_scores(trial)
    assert scores is not None
    assert trial.datetime_complete is not None
    done = [
        t
        for t in study.trials
        if t.state == TrialState.COMPLETE and t.datetime_complete and t.datetime_complete < trial.datetime_complete
    ]
    if not done:
        return sum(map(float, scores[0] * scores[1])) / sum(map(float, scores[1]))
    reference = genome.read_scores(min(done, key=lambda t: (t.value, t.number)))
    assert reference is not None
    weights = [float(w) for w in scores[1]]
    difference = sum(w * (float(a) - float(b)) for w, a, b in zip(weights, scores[0], reference[0])) / sum(weights)
    mean = sum(float(w) * float(m) for m, w in zip(*reference[:2])) / sum(map(float, reference[1]))
    return mean + difference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "jobs"),
    [*((name, TEXT, 1) for name in PRUNERS), ("racing", TASK, 2), ("racing", TEXT, 2), ("wilcoxon", TASK, 2)],
)
def test_any_pruner_of_optuna(make: Any, model: Any, name: str, task: Any, jobs: int, url: str) -> None:
    report = "block" if name == "wilcoxon" else "mean"
    objective = make(task, rungs=8 if report == "block" else 4, report=report)
    n = objective.evaluator.examples
    sizes = blocks(n, 8) if report == "block" else rung_sizes(n, 4)
    assert objective.evaluator.rungs == sizes
    unraced = make(task)
    study = plain_study(
        objective, PRUNERS[name](), url if (name, jobs) == ("racing", 2) else None, initial=6, prune_until=11
    )
    study.optimize(objective, n_trials=16, n_jobs=jobs)
    states = [trial.state for trial in study.trials]
    assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert (TrialState.PRUNED in states) == (name != "none")
    assert objective.evaluator.model is model
    for trial in study.trials:
        scores = genome.read_scores(trial)
        assert scores is not None
        seen = scores.shape[1]
        assert list(trial.intermediate_values) == [size for size in sizes if size <= seen]
        for first, size in zip([0, *sizes], trial.intermediate_values):
            part = scores[:, first if report == "block" else 0 : size].astype(np.float64)
            assert trial.intermediate_values[size] == pytest.approx(np.average(part[0], weights=part[1]))
        whole = unraced.evaluator.evaluate(objective.space.plan(trial))
        np.testing.assert_allclose(scores, whole.scores[:, :seen], atol=2e-5)
        assert trial.user_attrs["tokens"] <= trial.user_attrs["layer_tokens"] or "copied_from" in trial.user_attrs
        assert trial.user_attrs["layer_tokens"] <= LAYERS * trial.user_attrs["tokens"]
        if trial.state == TrialState.COMPLETE:
            assert seen == n
            assert trial.value == pytest.approx(whole.loss, abs=1e-5)
            assert "estimate" not in trial.user_attrs
        else:
            assert seen < n
            assert trial.user_attrs["accuracy"] == pytest.approx(np.average(scores[2], weights=scores[1]))
            if jobs == 1:
                assert trial.user_attrs["estimate"] == pytest.approx(honest(study, trial), abs=1e-9)


def test_samplers_read_the_estimates_of_pruned_trials(make: Any) -> None:
    objective = make(TEXT, rungs=4)
    study = plain_study(objective, RacingPruner(error=0.3, n_min=4), initial=6, prune_until=14)
    study.optimize(objective, n_trials=16)
    pruned = {trial.number: trial for trial in study.trials if trial.state == TrialState.PRUNED}
    assert pruned
    history = study.sampler.history(study, study.get_trials(deepcopy=False), without=-1)
    assert len(history) == 16
    for told in history:
        trial = study.trials[told.number]
        expected = honest(study, trial) if told.number in pruned else trial.value
        assert told.loss == pytest.approx(expected, abs=1e-9)
        assert not told.failed
    assert any(abs(trial.value - trial.user_attrs["estimate"]) > 1e-3 for trial in pruned.values())


def test_pruned_trials_cost_what_they_ran(make: Any, model: Any) -> None:
    objective = make(space=ungrouped(model), rungs=4, prefix_memory=0)
    study = plain_study(objective, pruner=Stop(10))
    (trial,) = enqueue(study, objective, one_hot())
    tokens = [sum(batch.tokens for batch in rung) for rung in objective.evaluator.passes.batches]
    assert trial.user_attrs["tokens"] == sum(tokens[:2])
    assert trial.user_attrs["layer_tokens"] == LAYERS * sum(tokens[:2])
    assert trial.user_attrs["estimate"] == pytest.approx(honest(study, trial))


def test_one_rung_reports_nothing(make: Any) -> None:
    objective = make()
    study = plain_study(objective, Stop(0))
    study.optimize(objective, n_trials=3)
    assert [(t.state, t.intermediate_values) for t in study.trials] == [(TrialState.COMPLETE, {})] * 3


@pytest.mark.parametrize(
    "options",
    [
        *({"rungs": rungs} for rungs in (0, True, 1.5, -3)),
        {"report": "median"},
        *({"active_weight": weight} for weight in (-0.1, math.nan, math.inf, "1", True)),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(make: Any, options: Any) -> None:
    with pytest.raises(StudyError, match=next(iter(options))):
        make(**options)


# Resuming -----------------------------------------------------------------------------------------------------------


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    import conftest, test_objective as t

    model = conftest.build_mixtral(layers=t.LAYERS, experts=t.EXPERTS, hidden=16, intermediate=16)

    def kill(*_):
        trials = study.get_trials(deepcopy=False)
        if len(trials) >= 7 and len(trials[-1].intermediate_values) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.layers[-1].mlp.register_forward_hook(kill)
    objective, study = t.raced(model, conftest.build_tokenizer(), sys.argv[1])
    t.moeopt.optimize(study, objective, n_trials=16)
"""


def raced(model: Any, tokenizer: Any, storage: str) -> tuple[moeopt.Objective, optuna.Study]:
    space = moeopt.EEPSpace.of(model, keep=KEEP, groups=2)
    objective = moeopt.Objective(model, tokenizer, TEXT, space, batch_tokens=200, rungs=4)
    pruner = RacingPruner(error=0.2, n_min=4)
    return objective, plain_study(objective, pruner, storage, seed=1, initial=5, prune_until=10)


@pytest.mark.slow
def test_a_study_killed_in_the_middle_of_a_race_goes_on_as_if_it_had_not_been(
    model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("whole", "killed")]
    arguments = [urls[1], str(Path(__file__).parent)]
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    dead = optuna.load_study(study_name="s", storage=urls[1]).trials[-1]
    assert (dead.state, len(dead.intermediate_values)) == (TrialState.RUNNING, 1)
    assert genome.read_scores(dead) is not None
    outcomes = []
    for storage in urls:
        objective, study = raced(model, tiny_tokenizer, storage)
        moeopt.optimize(study, objective, n_trials=16)
        done = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        assert sorted(genome.origin(t)["slot"] for t in done) == list(range(16))
        outcomes.append(
            {
                genome.origin(t)["slot"]: (
                    t.state,
                    genome.origin(t)["plan"],
                    t.value,
                    t.intermediate_values,
                    t.user_attrs.get("estimate"),
                )
                for t in done
            }
        )
    assert outcomes[0] == outcomes[1]
    assert TrialState.PRUNED in {state for state, *_ in outcomes[0].values()}


# Failures -----------------------------------------------------------------------------------------------------------


def poisoned(make: Any, make_mixtral: Any, value: float, rungs: int = 4) -> tuple[Any, int]:
    """An objective whose loss is not finite for a plan that keeps expert 0 of layer 2, from its last rung on."""
    model = make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)
    objective = make(model=model, space=ungrouped(model), rungs=rungs, reference=False)
    evaluator = objective.evaluator
    race = evaluator.race

    def break_later(plan: Any = None, earlier: Any = None) -> Any:
        experts = model.model.layers[2].mlp.experts
        for i, evaluation in enumerate(race(plan, earlier)):
            yield evaluation
            if i == 1 and 0 in plan.layers[2].kept:
                with torch.no_grad():
                    experts.down_proj[0] = value

    evaluator.race = break_later
    return objective, 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_in_a_later_rung(make: Any, make_mixtral: Any, value: float) -> None:
    objective, rungs = poisoned(make, make_mixtral, value)
    study = plain_study(objective)
    bad, good = [0, 1, 2], [1, 2, 3]
    first, failed, after, again = enqueue(
        study,
        objective,
        one_hot(KEPT[0], KEPT[1], good),
        one_hot(KEPT[0], KEPT[1], bad),
        one_hot(KEPT[0], KEPT[1], [3, 4, 5]),
        one_hot(KEPT[0], KEPT[1], good),
    )
    assert [t.state.name for t in (first, failed, after, again)] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "layer 2" in failed.user_attrs["failure"]
    assert list(failed.intermediate_values) == list(objective.evaluator.rungs)[:rungs]
    assert "estimate" not in failed.user_attrs
    assert np.isfinite(after.value)
    assert_copied(again, first)
    history = study.sampler.history(study, study.get_trials(deepcopy=False), without=-1)
    assert [told.failed for told in history] == [False, True, False, False]


def test_a_plan_that_failed_is_not_run_again(make: Any, make_mixtral: Any) -> None:
    """A plan without a finite loss has none the next time, either."""
    model = make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[0] = math.nan
    objective = make(model=model, space=ungrouped(model), reference=False)
    study = plain_study(objective)
    bad = one_hot(KEPT[0], KEPT[1], [0, 1, 2])
    runs: list[int] = []
    run = objective.evaluator.passes._run
    objective.evaluator.passes._run = lambda *args: runs.append(1) or run(*args)
    first, again = enqueue(study, objective, bad, bad)
    assert first.state == again.state == TrialState.FAIL
    assert "layer 2" in again.user_attrs["failure"]
    assert len(runs) == 1


def test_memory_that_runs_out_in_a_later_rung_fails_the_trial_and_the_search_goes_on(
    make: Any, make_mixtral: Any
) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)
    objective = make(TEXT, model=model, space=ungrouped(model), rungs=4)
    study = plain_study(objective)
    (first,) = enqueue(study, objective, one_hot())
    calls: list[int] = []

    def full(*_: Any) -> None:
        calls.append(1)
        if len(calls) > len(objective.evaluator.passes.batches[0]):
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[-1].mlp.register_forward_pre_hook(full)
    with pytest.warns(UserWarning, match="out of memory"):
        (failed,) = enqueue(study, objective, one_hot([5, 4, 3]))
    handle.remove()
    after, again = enqueue(study, objective, one_hot([1, 4, 5]), one_hot())
    assert (failed.state, after.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert "single sequence" in failed.user_attrs["failure"]
    assert list(failed.intermediate_values) == [objective.evaluator.rungs[0]]
    assert_copied(again, first)


# Active experts -----------------------------------------------------------------------------------------------------

FULL = Plan.identity(LAYERS, EXPERTS, 2)
HALF_SKIPPED = FULL.with_skip([0.0, 0.5, 0.9, 0.3])


def active_space(model: Any) -> Any:
    return moeopt.ActiveSpace.of(model, k=(1, 3), skip=True)


def test_without_a_weight_the_objective_is_the_loss_and_active_is_noted(make: Any, model: Any) -> None:
    objective = make(space=active_space(model))
    assert "active_weight" not in objective.describe()["evaluation"]
    full, fewer, skipped = enqueue(plain_study(objective), objective, FULL, FULL.with_k(1), HALF_SKIPPED)
    for trial, plan in ((full, FULL), (fewer, FULL.with_k(1)), (skipped, HALF_SKIPPED)):
        evaluation = objective.evaluator.evaluate(plan)
        assert trial.value == evaluation.loss
        assert trial.user_attrs["active"] == round(evaluation.active, 4)
    assert (full.user_attrs["active"], fewer.user_attrs["active"]) == (2.0, 1.0)
    assert 1 < skipped.user_attrs["active"] < 2


@pytest.mark.parametrize("report", ["mean", "block"])
def test_active_experts_are_weighed_in_wherever_a_loss_is_told(make: Any, model: Any, report: Any) -> None:
    objective = make(space=active_space(model), rungs=4, report=report, active_weight=0.75)
    free = make(space=active_space(model), rungs=4, report=report)
    assert objective.describe()["evaluation"] == free.describe()["evaluation"] | {"active_weight": 0.75}
    study = plain_study(objective)
    first, again = enqueue(study, objective, HALF_SKIPPED, HALF_SKIPPED)
    stages = list(free.evaluator.race(HALF_SKIPPED))
    assert first.value == pytest.approx(stages[-1].loss + 0.75 * stages[-1].active, abs=1e-4)
    assert first.value == stages[-1].loss + 0.75 * first.user_attrs["active"]
    np.testing.assert_array_equal(genome.read_scores(first), stages[-1].scores)
    for before, stage in zip([0, *free.evaluator.rungs], stages):
        losses, weights = (part[before if report == "block" else 0 :] for part in (stage.losses, stage.weights))
        told = first.intermediate_values[len(stage.losses)]
        assert told == pytest.approx(np.average(losses, weights=weights) + 0.75 * stage.active, abs=1e-4)
    assert (again.value, again.user_attrs["active"]) == (first.value, first.user_attrs["active"])
    assert again.user_attrs["copied_from"] == first.number
    study.pruner = Stop(5)
    (pruned,) = enqueue(study, objective, FULL)
    assert pruned.state == TrialState.PRUNED
    assert pruned.user_attrs["active"] == 2.0
    assert pruned.user_attrs["estimate"] == pytest.approx(honest(study, pruned) + 1.5, abs=1e-9)
    study.pruner = optuna.pruners.NopPruner()
    (whole,) = enqueue(study, objective, FULL)  # the rest of the pruned trial
    assert whole.user_attrs["copied_from"] == pruned.number
    assert whole.value == pytest.approx(free.evaluator.evaluate(FULL).loss + 1.5, abs=1e-5)


def test_a_pruned_trial_of_a_skipping_plan_is_gone_on_with(make: Any, model: Any) -> None:
    objective = make(space=active_space(model), rungs=4, active_weight=2.0)
    study = plain_study(objective, pruner=Stop(10))
    (pruned,) = enqueue(study, objective, HALF_SKIPPED)
    study.pruner = optuna.pruners.NopPruner()
    (whole,) = enqueue(study, objective, HALF_SKIPPED)
    alone = make(space=active_space(model), rungs=4).evaluator.evaluate(HALF_SKIPPED)
    assert (pruned.state, whole.state) == (TrialState.PRUNED, TrialState.COMPLETE)
    assert pruned.user_attrs["active"] != whole.user_attrs["active"] == round(alone.active, 4)
    assert whole.user_attrs["layer_tokens"] < alone.layer_tokens


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_racing_stops_a_plan_for_its_active_experts(make: Any, model: Any, weight: float) -> None:
    """A plan that is as good as the incumbent but runs twice the experts is stopped only if experts weigh something."""
    objective = make(space=active_space(model), rungs=4, active_weight=weight)
    study = plain_study(objective, RacingPruner(error=0.05, noise_floor=0.0, n_min=4))
    single, pair = enqueue(study, objective, FULL.with_k(1), FULL)
    losses = [make(space=active_space(model)).evaluator.evaluate(plan).loss for plan in (FULL.with_k(1), FULL)]
    assert losses[1] - losses[0] < 0.01
    assert single.state == TrialState.COMPLETE
    assert pair.state == (TrialState.PRUNED if weight else TrialState.COMPLETE)


def test_scores_of_an_older_version_are_taken_where_their_k_says_what_ran(make: Any, model: Any) -> None:
    objective = make(space=active_space(model), active_weight=1.0)
    study = plain_study(objective)
    enqueue(study, objective, FULL, HALF_SKIPPED)
    for trial in study.get_trials(deepcopy=False):
        for key in ("active", "penalty"):
            del trial.system_attrs[genome.SCORES][key]
    full, skipped = enqueue(study, objective, FULL, HALF_SKIPPED)
    assert (full.user_attrs["active"], full.user_attrs["copied_from"]) == (2.0, 0)
    assert "copied_from" not in skipped.user_attrs
    assert skipped.value == study.trials[1].value


# Too little data ----------------------------------------------------------------------------------------------------


def questions(first: int, count: int, repeats: int = 1) -> list[Example]:
    """Questions, each of them in several forms that differ in white space."""
    forms = [(i, " " * k) for i in range(first, first + count) for k in range(repeats)]
    return [Example(f"{i}{space}", f"is {space}{i}?", (" a", " b"), 0) for i, space in forms]


def said(make: Any, task: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(task, **options)
    return [str(warning.message) for warning in seen]


def test_a_task_without_dev_or_test_says_so_once(make: Any, tiny_tokenizer: Any) -> None:
    search, dev, test = questions(0, 9), questions(10, 3), questions(20, 3)
    assert said(make, MultipleChoiceTask("t", search, dev, test), limit=9) == []
    for parts, lacks in (((search,), "no dev split and no test split"), ((search, dev), "no test split"),
                         ((search, (), test), "no dev split")):  # fmt: skip
        task = MultipleChoiceTask("t", *parts)
        (message,) = said(make, task)
        assert message.startswith(f"task 't' has {lacks} (it has {task.summary}): ")
        assert "Give more rows, or a file for each split" in message
        assert said(make, restored(keep(task, Use("search", tiny_tokenizer)), "search"), limit=100) == []
    task = MultipleChoiceTask.from_rows("few", range(1), lambda i: Example(f"{i}", f"is {i}?", (" a", " b"), 0))
    (message,) = said(make, task, split=task.splits[0])
    assert "no dev split" in message or "no test split" in message
    assert len(said(make, MixtureTask({"m": (MultipleChoiceTask("t", search), 1)}))) == 1


@pytest.mark.parametrize("shots", [0, 2])
def test_a_limit_above_the_distinct_examples_says_so(make: Any, shots: int) -> None:
    task: Any = MultipleChoiceTask("t", questions(0, 6, repeats=3), questions(10, 3), questions(20, 3))
    task = task.prompted(shots=shots) if shots else task
    count, distinct = 18 - 3 * shots, 6 - shots
    assert said(make, task) == said(make, task, limit=distinct) == []
    for limit in (distinct + 1, count, 100):
        (message,) = said(make, task, limit=limit)
        assert message == (
            f"the limit is {limit}, but the search split of task 't' gives {count} examples, {distinct} of them"
            f" distinct (it has {task.summary})"
        )
    assert ("2 more of search are shown as shots" in task.summary) == bool(shots)
    few = MultipleChoiceTask("t", questions(0, 6), questions(10, 3), questions(20, 3))
    assert said(make, few, limit=7)[0].startswith(
        "the limit is 7, but the search split of task 't' gives 6 examples (it"
    )


def test_a_limit_of_text_counts_windows(make: Any) -> None:
    texts = [f"document {i} has words enough for some windows of its own" for i in range(3)]
    task = TextTask("t", texts[:1], texts[1:2], texts[2:], window=16)
    assert said(make, task, limit=3) == []
    (message,) = said(make, task, limit=50)
    assert "but the search split of task 't' gives 3 windows (it has search 1, dev 1 and test 1 documents)" in message


def test_plans_that_run_and_do_not_export_are_warned_of(make: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose mapped probabilities moeopt has no class for."""
    monkeypatch.setattr("moeopt.models.layers.has_custom_form", lambda model: False)
    assert moeopt.EEPSpace.of(model, keep=4).router == "logit"
    with pytest.warns(UserWarning, match="maps probabilities, .* only prunings export; with router='logit' or 'rows'"):
        make(space=moeopt.EEPSpace.of(model, keep=4, router="prob"))
    for space in (moeopt.EEPSpace.of(model, keep=4), moeopt.PruneSpace.of(model, keep=4)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*maps probabilities")
            make(space=space)
