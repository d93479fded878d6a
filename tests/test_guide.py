"""Guides of a real objective: when there is one, what it costs, and that searches go on with it as without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import moeopt
from moeopt.errors import StudyError
from moeopt.methods.guiding import Guiding
from moeopt.plan import Plan
from moeopt.samplers.guided import GUIDED
from moeopt.study import recipe
from moeopt.tasks import Example, MultipleChoiceTask
from moeopt.trials import genome, guide
from moeopt.trials.guide import COST, GUIDE

LAYERS, EXPERTS, KEEP = 3, 6, 3
ROWS = [Example(str(i), f"is {i * 7 % 40} so {'very ' * (i % 3)}odd?", ("n", "y"), i % 2) for i in range(24)]
TASK = MultipleChoiceTask("questions", search=ROWS[:16], dev=ROWS[16:20], test=ROWS[20:])
PLANS = [Plan.one_hot([[a, b, c]] * LAYERS, experts=EXPERTS, k=2) for a, b, c in ((0, 1, 2), (1, 2, 3), (3, 4, 5))]


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Any:
    space = moeopt.PruneSpace.of(model, keep=KEEP)
    return lambda model=model, space=space, **options: moeopt.Objective(
        model, tiny_tokenizer, TASK, space, **{"guide": 0.9, "reference": False, **options}
    )


def study_of(objective: Any, storage: str | None = None, sampler: str = GUIDED, **options: Any) -> optuna.Study:
    return moeopt.create_study("s", objective=objective, storage=storage, sampler=sampler, seed=3, **options)


def guides(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if GUIDE in trial.system_attrs]


def test_the_best_pruning_so_far_gets_a_guide_once_all_warm_starts_are_tried(make: Any) -> None:
    objective = make()
    study = study_of(objective, warm_starts=PLANS)
    moeopt.optimize(study, objective, n_trials=3)
    (held,) = guides(study)
    best = objective.space.plan(study.best_trial)
    assert held.number == 2
    assert guide.plan_of(held) == (best.fingerprint, genome.scores_of(study.best_trial))
    read = guide.read(held, LAYERS, EXPERTS)
    made = Guiding(objective.evaluator, "it").guide(best)
    assert read is not None
    np.testing.assert_allclose(read.signed, made.signed, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(read.squared, made.squared, rtol=1e-4, atol=1e-9)


def test_what_guides_cost_is_counted_and_bounded(make: Any) -> None:
    alone, objective = make(guide=0.0), make(guide=0.7)
    study = study_of(objective)
    moeopt.optimize(study, objective, n_trials=30)
    made = guides(study)
    assert len({guide.plan_of(trial) for trial in made}) == len(made) > 1
    total = sum(trial.user_attrs["layer_tokens"] for trial in study.trials)
    costs = [trial.user_attrs[COST] for trial in made]
    assert set(costs) == {Guiding(objective.evaluator, "it").layer_tokens}
    assert study.trials[-1].user_attrs["spent"] == total
    without_reuse = sum(trial.user_attrs["tokens"] for trial in study.trials) * LAYERS
    assert sum(costs[1:]) > 0
    assert sum(costs) <= 0.7 * (without_reuse + sum(costs))
    evaluated = alone.evaluator.evaluate(objective.space.plan(study.trials[0]))
    assert study.trials[0].user_attrs["layer_tokens"] == evaluated.layer_tokens + costs[0]
    for trial in study.trials:
        assert (COST in trial.user_attrs) == (GUIDE in trial.system_attrs)


@pytest.mark.parametrize("sampler", ["eep", "local", "random"])
def test_other_samplers_leave_it_aside(make: Any, sampler: str) -> None:
    studies = []
    for share in (0.0, 0.9):
        objective = make(guide=share)
        studies.append(study_of(objective, sampler=sampler))
        moeopt.optimize(studies[-1], objective, n_trials=6)
    assert [t.value for t in studies[0].trials] == [t.value for t in studies[1].trials]
    assert (len(guides(studies[0])), bool(guides(studies[1]))) == (0, True)


@pytest.mark.slow
def test_a_resumed_search_and_a_worker_s_go_on_with_the_guides(make: Any, tmp_path: Path) -> None:
    whole = study_of(objective := make())
    moeopt.optimize(whole, objective, n_trials=12)
    url = f"sqlite:///{tmp_path}/study.db"
    for trials in (3, 7, 12):
        objective = make()
        part = study_of(objective, url, load_if_exists=True)
        moeopt.optimize(part, objective, n_trials=trials)
    for a, b in zip(whole.trials, part.trials):
        assert np.array_equal(genome.read(a), genome.read(b))
        assert (a.value, a.user_attrs.get(COST)) == (b.value, b.user_attrs.get(COST))
    assert recipe.read(part).objective["guide"] == 0.9
    with pytest.raises(StudyError, match="guide"):
        study_of(make(guide=0.2), url, load_if_exists=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "rungs", "trials"), [("guided", 1, 16), ("guided", 3, 16), ("local", 3, 16), ("blockcmaes", 1, 25)]
)
def test_what_a_process_could_reuse_changes_no_proposal(sampler: str, rungs: int, trials: int, tmp_path: Path) -> None:
    """A search that goes on in a new process, which has no prefixes in memory, tries what it would have tried."""
    task, url = moeopt.demo.skill_task("caesar"), f"sqlite:///{tmp_path}/study.db"
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    space = moeopt.PruneSpace.of(model, keep=3)

    def begun(storage: str | None) -> tuple[optuna.Study, moeopt.Objective]:
        guide = 0.3 if sampler == "guided" else 0.0
        objective = moeopt.Objective(model, tokenizer, task, space, limit=12, rungs=rungs, guide=guide)
        study = moeopt.create_study(
            "s",
            objective=objective,
            storage=storage,
            sampler=sampler,
            pruner="racing" if rungs > 1 else None,
            seed=0,
            load_if_exists=True,
        )
        return study, objective

    whole, objective = begun(None)
    moeopt.optimize(whole, objective, n_trials=trials)
    for reached in (4, 5, 10, trials):
        part, objective = begun(url)
        moeopt.optimize(part, objective, n_trials=reached)
    costs = [[trial.user_attrs["layer_tokens"] for trial in study.trials] for study in (whole, part)]
    assert costs[0] != costs[1]
    assert [trial.value for trial in whole.trials] == [trial.value for trial in part.trials]
    for trial, other in zip(whole.trials, part.trials):
        assert np.array_equal(genome.read(trial), genome.read(other))


def test_plans_that_merge_get_none(make: Any, model: Any) -> None:
    space = moeopt.MergeSpace.of(model, around=PLANS[0])
    objective = make(space=space)
    merged = space.decode(space.start() + 0.1)
    assert any(layer.kept is None for layer in merged.layers)
    study = moeopt.create_study(objective=objective, storage=None, sampler="local", warm_starts=[merged])
    moeopt.optimize(study, objective, n_trials=1)
    assert not guides(study)


def test_memory_that_runs_out_for_a_guide_ends_no_trial(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make()

    def runs_out(*_: Any) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(Guiding, "guide", runs_out)
    study = study_of(objective)
    with pytest.warns(UserWarning, match="there is no guide, as memory ran out"):
        moeopt.optimize(study, objective, n_trials=2)
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, True, "half", None, float("nan")])
def test_a_share_out_of_range_is_refused(make: Any, share: Any) -> None:
    with pytest.raises(StudyError, match="guide is the share of layer-tokens"):
        make(guide=share)


def test_a_score_without_derivative_has_no_guide(make: Any) -> None:
    with pytest.raises(StudyError, match="score='metric' has none"):
        make(score="metric")


def test_a_guided_search_without_guides_says_so(make: Any) -> None:
    with pytest.warns(UserWarning, match=r"guided.*Objective\(guide="):
        study_of(make(guide=0.0))
