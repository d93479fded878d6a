"""Studies: created, resumed exactly, refused when something differs, reclaimed after a crash."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import torch
from optuna.trial import TrialState

import moeopt
from moeopt import methods, samplers
from moeopt.errors import MethodError, SamplerError, SpaceError, StorageError, StudyError
from moeopt.study import finished, reclaim, space_of, stalled
from moeopt.study.storage import attributes
from moeopt.tasks import TextTask
from moeopt.trials import genome, process

optuna.logging.set_verbosity(optuna.logging.WARNING)

TEXTS = [f"the {a} {b} sat on the {c}" for a in ("red", "old", "big") for b in ("cat", "dog") for c in ("mat", "log")]


def text_task(name: str = "toy", texts: list[str] = TEXTS) -> TextTask:
    return TextTask(name, search=texts[:6], dev=texts[6:8], test=texts[8:], window=32)


@pytest.fixture
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=4, experts=6, hidden=16, intermediate=16)


@pytest.fixture
def objective(model: Any, tiny_tokenizer: Any) -> moeopt.Objective:
    return moeopt.Objective(model, tiny_tokenizer, text_task(), moeopt.EEPSpace.of(model, keep=3, groups=2))


@pytest.fixture
def study_name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def storage(database: str, study_name: str) -> Iterator[str]:
    yield database
    if study_name in optuna.get_all_study_names(database):
        optuna.delete_study(study_name=study_name, storage=database)


SMALL: dict[str, Any] = {"initial": 4, "prune_until": 9}


def test_the_former_name_of_n_trials_is_taken(objective: moeopt.Objective) -> None:
    study = moeopt.create_study(objective=objective, storage=None, sampler="random")
    with pytest.warns(FutureWarning, match="n_trials="):
        moeopt.optimize(study, objective, trials=2)
    assert finished(study) == 2


@pytest.mark.slow
def test_a_study_keeps_what_every_trial_was(objective: moeopt.Objective, storage: str, study_name: str) -> None:
    study = moeopt.create_study(study_name, objective=objective, storage=storage, seed=3, **SMALL)
    study.optimize(objective, n_trials=14)
    loaded = moeopt.load_study(study_name, storage)
    assert [t.value for t in loaded.trials] == [t.value for t in study.trials]
    for trial in loaded.trials:
        assert space_of(loaded).plan(trial) == objective.space.plan(trial)
        assert trial.user_attrs.keys() >= {"accuracy", "seconds", "tokens", "layer_tokens", "operator", "drift"}
        scores = genome.read_scores(trial)
        assert scores is not None
        losses, weights, correct = scores
        assert np.average(losses, weights=weights) == pytest.approx(trial.value, rel=1e-5)
        assert np.average(correct, weights=weights) == pytest.approx(trial.user_attrs["accuracy"], rel=1e-5)
        assert 0 < trial.user_attrs["layer_tokens"] <= 4 * trial.user_attrs["tokens"]
    merged = [t for t in loaded.trials if t.user_attrs["phase"] == "merge"]
    assert merged
    assert all(0 <= p < t.number for t in merged for p in t.user_attrs["parents"])
    evaluation = objective.evaluator.evaluate(objective.space.plan(loaded.best_trial))
    assert evaluation.loss == loaded.best_value


def changed_weights(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] += 1.0
    return model


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": True}, "model.weights"),
        ({"task": True}, "task.fingerprint"),
        ({"keep": 4}, "space.keep"),
        ({"limit": 2}, "task.limit"),
        ({"sampler": "random"}, "sampler.name"),
        ({"seed": 8}, "sampler.seed"),
    ],
)
def test_resuming_with_something_else_names_the_field(
    objective: moeopt.Objective, tmp_path: Path, tiny_tokenizer: Any, change: dict[str, Any], field: str
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    moeopt.create_study("s", objective=objective, storage=url)
    model = changed_weights(objective.model) if "model" in change else objective.model
    task = text_task(texts=[*TEXTS[1:], "another text that is new here"]) if "task" in change else objective.task
    space = moeopt.EEPSpace.of(model, keep=change.get("keep", 3), groups=2)
    other = moeopt.Objective(model, tiny_tokenizer, task, space, limit=change.get("limit"))
    arguments = {key: change[key] for key in ("sampler", "seed") if key in change}
    with pytest.raises(StudyError, match=field.replace(".", r"\.")):
        moeopt.create_study("s", objective=other, storage=url, load_if_exists=True, **arguments)


def test_an_existing_study_is_resumed_only_when_asked(objective: moeopt.Objective, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    moeopt.create_study("s", objective=objective, storage=url)
    with pytest.raises(StudyError, match="load_if_exists"):
        moeopt.create_study("s", objective=objective, storage=url)
    with pytest.raises(StudyError, match="did you mean 's'"):
        moeopt.load_study("S", url)


@pytest.mark.parametrize(("resume", "named"), [(True, "sampler.name: study has 'cmaes'"), (False, "already exists")])
def test_a_study_that_another_process_makes_meanwhile_is_refused_as_any_other(
    objective: moeopt.Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, named: str
) -> None:
    make = optuna.create_study

    def slowly(**options: Any) -> optuna.Study:
        monkeypatch.undo()
        moeopt.create_study("s", objective=objective, storage=f"sqlite:///{tmp_path}/study.db", sampler="cmaes")
        return make(**options)

    monkeypatch.setattr(optuna, "create_study", slowly)
    with pytest.raises(StudyError, match=named):
        moeopt.create_study(
            "s", objective=objective, storage=f"sqlite:///{tmp_path}/study.db", sampler="random", load_if_exists=resume
        )


def test_a_study_of_something_else_is_refused(objective: moeopt.Objective, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    foreign = optuna.create_study(study_name="s", storage=url)
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    for resume in (True, False):
        with pytest.raises(StudyError):
            moeopt.create_study("s", objective=objective, storage=url, load_if_exists=resume)
    assert len(optuna.load_study(study_name="s", storage=url).trials) == 1
    with pytest.raises(StudyError, match="moeopt did not make it"):
        moeopt.load_study("s", url)


def test_warm_starts_are_the_first_trials(objective: moeopt.Objective) -> None:
    kept = [[1, 2, 5]] * 2 + [[0, 3, 4]] * 2
    plan = moeopt.Plan.one_hot(kept, experts=6, k=2)
    study = moeopt.create_study("s", objective=objective, storage=None, warm_starts=[plan], **SMALL)
    study.optimize(objective, n_trials=2)
    assert objective.space.plan(study.trials[0]) == plan
    assert study.trials[0].user_attrs["operator"] == "enqueued"
    moeopt.enqueue(study, objective.space, moeopt.Plan.one_hot([[0, 1, 2]] * 4, experts=6, k=2), method="mine")
    study.optimize(objective, n_trials=1)
    assert study.trials[2].user_attrs["method"] == "mine"
    with pytest.raises(SpaceError, match="differ in the plan"):
        moeopt.enqueue(study, objective.space, moeopt.Plan.one_hot([[0, 1, 2], *kept[1:]], experts=6, k=2))


def test_an_interrupted_trial_is_queued_again_once(objective: moeopt.Objective, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = moeopt.create_study("s", objective=objective, storage=url, **SMALL)
    study.optimize(objective, n_trials=2)
    race = objective.evaluator.race
    objective.evaluator.race = lambda plan, known: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        study.optimize(objective, n_trials=1)
    objective.evaluator.race = race  # type: ignore[method-assign]
    for _ in range(2):
        study = moeopt.create_study("s", objective=objective, storage=url, load_if_exists=True, **SMALL)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    moeopt.optimize(study, objective, n_trials=4)
    assert finished(study) == 4
    assert np.array_equal(genome.read(study.trials[2]), genome.read(study.trials[3]))  # type: ignore[arg-type]


def test_threads_record_the_losses_of_their_own_plans(objective: moeopt.Objective) -> None:
    study = moeopt.create_study("s", objective=objective, storage=None, sampler="random")
    study.optimize(objective, n_trials=12, n_jobs=3)
    for trial in study.trials:
        assert trial.value == objective.evaluator.evaluate(objective.space.plan(trial)).loss


def test_methods_are_warm_starts(objective: moeopt.Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    ran: list[list[str]] = []
    calibrate = methods.plans

    def plans(names: Any, *args: Any, **options: Any) -> Any:
        ran.append(list(names))
        return calibrate(ran[-1], *args, **options)

    monkeypatch.setattr(methods, "plans", plans)
    names = ["naee", "frequency", "m_smoe_summed"]
    for given in (names[:2], names, names):
        study = moeopt.create_study("s", objective=objective, storage=url, warm_starts=given, load_if_exists=True)
    assert ran == [["naee", "frequency"], ["m_smoe_summed"]]
    study.optimize(objective, n_trials=3)
    assert [trial.user_attrs["method"] for trial in study.trials] == names
    space, evaluator = objective.space, objective.evaluator
    calibration = methods.Calibration(objective.model, objective.tokenizer, objective.task)
    for trial in study.trials:
        name = trial.user_attrs["method"]
        made = calibrate([name], calibration, keep=3, groups=space.groups)[name]
        assert space.plan(trial).fingerprint == made.plan.fingerprint
        assert trial.value == evaluator.evaluate(made.plan).loss
        assert trial.user_attrs["calibration_layer_tokens"] == made.layer_tokens > 0
    made = calibrate(["reap"], calibration, keep=3, groups=space.groups)
    study = moeopt.create_study("s", objective=objective, storage=url, warm_starts=made, load_if_exists=True)
    study.ask()
    assert study.trials[-1].user_attrs["method"] == "reap"


def test_eep_takes_methods_in_place_of_random_solutions(objective: moeopt.Objective) -> None:
    starts = ["naee", "soft_activation"]
    study = moeopt.create_study("s", objective=objective, storage=None, warm_starts=starts, initial=2, prune_until=8)
    study.optimize(objective, n_trials=5)
    assert [trial.user_attrs["operator"] for trial in study.trials] == ["enqueued"] * 2 + ["prune"] * 3
    assert set(study.trials[2].user_attrs["parents"]) <= {0, 1}


def test_a_retried_warm_start_keeps_its_method(objective: moeopt.Objective) -> None:
    study = moeopt.create_study("s", objective=objective, storage=None, warm_starts=["naee"])
    trial = study.ask()
    trial.set_user_attr("interrupted", True)
    study.tell(trial, state=TrialState.FAIL)
    assert reclaim(study) == [0]
    study.optimize(objective, n_trials=1)
    assert study.trials[1].user_attrs["method"] == "naee"


def test_methods_that_the_space_does_not_hold(objective: moeopt.Objective) -> None:
    with pytest.raises(MethodError, match="unknown method 'nae'; did you mean 'naee'"):
        moeopt.create_study("s", objective=objective, storage=None, warm_starts=["nae"])
    with pytest.raises(SpaceError, match="start from hc_smoe_summed"):
        moeopt.create_study("s", objective=objective, storage=None, warm_starts=["hc_smoe"])
    with pytest.raises(SpaceError, match="naee_progressive goes layer by layer"):
        moeopt.create_study("s", objective=objective, storage=None, warm_starts=["naee_progressive"])
    pruning = moeopt.PruneSpace.of(objective.model, keep=3)
    pruner = moeopt.Objective(objective.model, objective.tokenizer, objective.task, pruning)
    for name in ("output_fit", "m_smoe_summed"):
        with pytest.raises(SpaceError, match=f"{name} maps probabilities"):
            moeopt.create_study("s", objective=pruner, storage=None, warm_starts=[name])


def test_a_method_that_fails_leaves_no_study(
    objective: moeopt.Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(methods, "plans", fails)
    with pytest.raises(RuntimeError, match="no such luck"):
        moeopt.create_study("s", objective=objective, storage=url, warm_starts=["naee"])
    assert optuna.get_all_study_names(url) == []


def test_methods_start_an_active_space_within_its_range(objective: moeopt.Objective) -> None:
    space = moeopt.ActiveSpace(objective.space, k=(1, 3), skip=(0.25, 0.5))
    wide = moeopt.Objective(objective.model, objective.tokenizer, objective.task, space)
    study = moeopt.create_study("s", objective=wide, storage=None, warm_starts=["naee"])
    study.optimize(wide, n_trials=1)
    assert {(layer.k, layer.skip) for layer in space.plan(study.trials[0]).layers} == {(2, 0.25)}


def test_a_trial_whose_worker_died_before_proposing_is_run_again(objective: moeopt.Objective, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = moeopt.create_study("s", objective=objective, storage=url, **SMALL)
    study.optimize(objective, n_trials=2)

    def dies(history: Any, slot: int) -> Any:
        raise SystemExit

    study.sampler._new_plan = dies  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        study.ask()
    running = study.trials[2]
    assert running.state == TrialState.RUNNING
    dead = {**genome.origin(running), "worker": {**genome.origin(running)["worker"], "pid": 2**22 - 1}}
    attributes.write(study, running, {genome.ORIGIN: dead})
    resumed = moeopt.create_study("s", objective=objective, storage=url, load_if_exists=True, **SMALL)
    moeopt.optimize(resumed, objective, n_trials=4)
    done = [t for t in resumed.trials if t.state == TrialState.COMPLETE]
    assert [genome.origin(t)["slot"] for t in done] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "elsewhere",
    [{"host": "elsewhere"}, {"namespace": 1, "started": 0.0}],
    ids=["another host", "another container with this host's name"],
)
def test_a_worker_elsewhere_is_taken_for_dead_only_on_request(
    objective: moeopt.Objective, elsewhere: dict[str, Any]
) -> None:
    study = moeopt.create_study("s", objective=objective, storage=None, **SMALL)
    study.ask()
    (running,) = study.trials
    away = {**genome.origin(running), "worker": {**process.this_worker(), **elsewhere}}
    attributes.write(study, running, {genome.ORIGIN: away})
    assert reclaim(study) == []
    assert reclaim(study, other_hosts=True) == [0]


def test_a_correction_of_the_clock_kills_no_worker(
    objective: moeopt.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = moeopt.create_study("s", objective=objective, storage=None, **SMALL)
    study.ask()
    real = psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: real + 3600)
    assert reclaim(study) == []


def test_an_objective_is_minimised_and_takes_fixed_trials(model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.PruneSpace.of(model, keep=3, groups=2)
    objective = moeopt.Objective(model, tiny_tokenizer, text_task(), space)
    numbers = dict(zip(space.names, map(float, space.start())))
    assert objective(optuna.trial.FixedTrial(numbers)) == objective.evaluator.evaluate(space.decode(space.start())).loss
    upwards = optuna.create_study(direction="maximize", sampler=samplers.get("random", space))
    with pytest.raises(StudyError, match="direction='minimize'"):
        upwards.optimize(objective, n_trials=1)


def test_optimize_stops_by_patience_and_needs_a_limit(objective: moeopt.Objective) -> None:
    study = moeopt.create_study("s", objective=objective, storage=None, sampler="random")
    moeopt.optimize(study, objective, n_trials=60, patience=3)
    assert finished(study) < 60
    assert stalled(study) == 3
    with pytest.raises(StudyError, match="when to stop"):
        moeopt.optimize(study, objective)
    for limit in ({"n_trials": 0}, {"n_trials": 2.5}, {"patience": True}, {"timeout": -1}, {"timeout": float("nan")}):
        with pytest.raises(StudyError, match=f"{next(iter(limit))} must be .* at least [01], got"):
            moeopt.optimize(study, objective, **limit)  # type: ignore[arg-type]


def test_storages_that_cannot_serve_are_named(tmp_path: Path, objective: moeopt.Objective) -> None:
    (tmp_path / "text.db").write_text("this is no database, only a text file that is long enough to be looked at")
    with sqlite3.connect(tmp_path / "foreign.db") as other:
        other.execute("CREATE TABLE invoices (id INTEGER)")
    cases = {
        "nonsense": "SQLAlchemy URL",
        f"sqlite:///{tmp_path}/missing/x.db": "does not exist",
        f"sqlite:///{tmp_path}/text.db": "not a database",
        f"sqlite:///{tmp_path}/foreign.db": "invoices",
        "postgresql+psycopg://someone:secret@127.0.0.1:1/x": "127.0.0.1",
    }
    for url, reason in cases.items():
        with pytest.raises(StorageError, match=reason) as error:
            moeopt.create_study("s", objective=objective, storage=url)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match="no database"):
        moeopt.load_study("s", f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_locked_database_is_said_to_be_locked(tmp_path: Path, objective: moeopt.Objective) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    moeopt.create_study("s", objective=objective, storage=url)
    holder = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="locked"):
        moeopt.create_study("s", objective=objective, storage=f"{url}?timeout=1", load_if_exists=True)
    holder.execute("ROLLBACK")
    holder.close()


def test_unknown_samplers_get_a_hint(objective: moeopt.Objective) -> None:
    with pytest.raises(SamplerError, match="did you mean 'eep'"):
        moeopt.create_study("s", objective=objective, storage=None, sampler="epp")
    with pytest.raises(SamplerError, match="prune_untill"):
        moeopt.create_study("s", objective=objective, storage=None, prune_untill=3)


def test_an_objective_refuses_a_space_of_another_model(model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.EEPSpace(moeopt.ModelShape(5, 6, 2), keep=3)
    with pytest.raises(SpaceError, match="the model has"):
        moeopt.Objective(model, tiny_tokenizer, text_task(), space)
