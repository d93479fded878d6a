"""Outages: waited for, nothing done twice, nothing evaluated lost, workers killed meanwhile."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

import moeopt
from moeopt.errors import StorageError
from moeopt.study.storage import attributes, open_storage
from moeopt.study.storage.outages import is_outage
from moeopt.trials import genome

from .conftest import Wire, backend, loss, opened, processes, said, slots, until


def kept(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(spool.rglob("*.json"))]


@pytest.mark.slow
def test_a_search_goes_on_after_an_outage(
    wire: Wire, wired: str, name: str, spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = make_url(wired).set(password="hush").render_as_string(hide_password=False)
    study = opened(secret if "postgres" in wired else wired, name)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            wire.cut()
            threading.Timer(2.5, wire.mend).start()
        value = loss(trial)
        attributes.write(study, trial, {}, {"note": value})
        return value

    with caplog.at_level(logging.WARNING, "moeopt"):
        moeopt.optimize(study, objective, n_trials=3)
    assert slots(study) == list(range(3))
    assert all(t.state == TrialState.COMPLETE and t.user_attrs["note"] == t.value for t in study.trials)
    assert kept(spool) == []
    assert ["answers again" in text for text in said(caplog)] == [False, True]
    assert "hush" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("step", ["study", "create", "propose", "add", "start", "attribute", "end", "take over"])
def test_a_commit_whose_answer_was_lost_is_done_once(wire: Wire, wired: str, name: str, step: str) -> None:
    storage = open_storage(wired, patience=60)
    if step == "study":
        wire.losing = True
    study = optuna.create_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
    if step in ("start", "add"):
        study.enqueue_trial({"x": 0.5})
    team = backend(study)
    team.storage.identity(team.study_id)
    if step in ("create", "start"):
        wire.losing = True
    trial = study.ask()
    if step == "propose":
        wire.losing = True
    x = trial.suggest_float("x", 0, 1)
    if step == "add":
        wire.losing = True
        study.add_trial(create_trial(state=TrialState.COMPLETE, value=3.0))
    if step == "attribute":
        wire.losing = True
    trial.set_user_attr("note", 1)
    if step == "take over":
        other = opened(wired, name)
        theirs = backend(other)
        theirs.storage.identity(theirs.study_id)
        wire.losing = True
        theirs.storage.take_over(theirs.study_id, attributes.key(study.trials[0]), "test")
        assert [t.state.name for t in other.trials] == ["FAIL", "WAITING"]
        assert other.trials[1].params == {"x": x}
        assert not wire.losing
        return
    if step == "end":
        wire.losing = True
    study.tell(trial, 2.0)
    assert not wire.losing
    first = study.trials[0]
    assert (first.state, first.value) == (TrialState.COMPLETE, 2.0)
    assert (first.params, first.user_attrs) == ({"x": x}, {"note": 1})
    assert len(study.trials) == (2 if step == "add" else 1)


@pytest.mark.slow
def test_patience_ends_with_one_error_and_the_result_is_stored_later(
    wire: Wire, wired: str, name: str, spool: Path
) -> None:
    study, calls = opened(wired, name, patience=1), []

    def objective(trial: optuna.Trial) -> float:
        calls.append(trial.number)
        if trial.number == 1 and len(calls) == 2:
            wire.cut()
        return loss(trial)

    with pytest.raises(StorageError, match="did not answer for 1 s") as error:
        moeopt.optimize(study, objective, n_trials=3)
    assert "\n" not in str(error.value)
    (result,) = kept(spool)
    assert (result["number"], result["state"]) == (1, "COMPLETE")
    wire.mend()
    later = opened(wired, name)
    moeopt.study.reclaim(later, other_hosts=True)  # this process lives, so that its trial is not dead
    file = next(spool.rglob("*.json"))
    result["worker"]["started"] = 1.0
    file.write_text(json.dumps(result))
    moeopt.optimize(later, objective, n_trials=3)
    assert slots(later) == [0, 1, 2]
    assert calls == [0, 1, 2]
    assert kept(spool) == []


def worker_on_full_disk(url: str, name: str, at: str, said: str) -> None:
    study = opened(url, name)

    def fill() -> None:
        @event.listens_for(backend(study).storage.engine, "commit")
        def full(connection: Any) -> None:
            raise OperationalError("x", {}, sqlite3.OperationalError("database or disk is full"))

    def objective(trial: optuna.Trial) -> float:
        value = loss(trial)
        if trial.number == 1:
            fill()
            if at == "attrs":
                attributes.write(study, trial, {}, {"note": value})
        return value

    try:
        moeopt.optimize(study, objective, n_trials=3)
    except StorageError as error:
        Path(said).write_text(str(error))


@pytest.mark.parametrize("at", ["attrs", "value"])
def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path, name: str, spool: Path, at: str) -> None:
    url, said = f"sqlite:///{tmp_path}/study.db", tmp_path / "said"
    opened(url, name)
    (process,) = processes(1, worker_on_full_disk, url, name, at, str(said))
    process.join()
    assert "\n" not in said.read_text()
    assert said.read_text().endswith("study.db: database or disk is full")
    (result,) = kept(spool)
    assert (result["number"], result["state"]) == (1, "COMPLETE" if at == "value" else None)
    later, calls = opened(url, name), []

    def objective(trial: optuna.Trial) -> float:
        calls.append(trial.number)
        return loss(trial)

    moeopt.optimize(later, objective, n_trials=3)
    assert slots(later) == [0, 1, 2]
    assert calls == ([2, 3] if at == "attrs" else [2])
    assert kept(spool) == []


def worker_at_outage(url: str, name: str, ready: str) -> None:
    study = opened(url, name)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1 and not Path(ready).exists():
            Path(ready).touch()
            until(lambda: Path(ready + ".cut").exists())
            value = loss(trial)
            if ready.endswith("attrs"):
                attributes.write(study, trial, {}, {"note": value})
            return value
        assert trial.number != 1
        return loss(trial)

    moeopt.optimize(study, objective, n_trials=3)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["value", "attrs"])
def test_what_a_worker_had_evaluated_outlives_it(
    wire: Wire, wired: str, direct: str, name: str, tmp_path: Path, spool: Path, at: str
) -> None:
    opened(direct, name)
    ready = str(tmp_path / at)
    (process,) = processes(1, worker_at_outage, wired, name, ready)
    until(Path(ready).exists)
    wire.cut()
    Path(ready + ".cut").touch()
    until(lambda: kept(spool))
    assert process.is_alive()
    process.kill()
    process.join()
    (result,) = kept(spool)
    wire.mend()
    later = opened(wired, name)
    moeopt.study.reclaim(later)
    if at == "value":
        assert later.trials[1].state == TrialState.COMPLETE
        assert [later.trials[1].value] == result["values"]
    else:  # not evaluated to the end: what is known goes to the trial that repeats it
        assert [t.state.name for t in later.trials] == ["COMPLETE", "FAIL", "WAITING"]
        assert later.trials[1].user_attrs["note"] == result["user_attrs"]["note"]
    moeopt.optimize(later, loss, n_trials=3)
    assert slots(later) == [0, 1, 2]
    assert kept(spool) == []


@pytest.mark.slow
@pytest.mark.parametrize("repeated", ["waiting", "running", "complete"])
def test_a_trial_taken_over_while_its_worker_lives_ends_once(url: str, name: str, repeated: str) -> None:
    mine, other = opened(url, name), opened(url, name)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0:
            team = backend(other)
            assert team.storage.take_over(team.study_id, attributes.key(trial), "looked dead") == 1
            if repeated != "waiting":
                again = other.ask()
                if repeated == "complete":
                    other.tell(again, -1.0)
        value = loss(trial)
        attributes.write(mine, trial, {genome.SCORES: {"of": "x"}}, {"note": value})
        assert mine.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING
        return value

    moeopt.optimize(mine, objective, n_trials=2)
    first, second, third = mine.trials
    assert (first.state, first.user_attrs["failure"]) == (TrialState.FAIL, "looked dead")
    assert second.state == third.state == TrialState.COMPLETE
    assert slots(mine) == [0, 1]
    if repeated == "complete":
        assert second.value == -1.0
    else:
        assert second.value == second.user_attrs["note"] == loss(second)
        assert second.system_attrs[genome.SCORES] == {"of": "x"}
        assert genome.read(second) is not None
        assert second.params == first.params


@pytest.mark.slow
def test_timeout_and_ctrl_c_end_the_wait(wire: Wire, wired: str, name: str, spool: Path) -> None:
    study = opened(wired, name)

    def cuts(trial: optuna.Trial) -> float:
        wire.cut()
        return loss(trial)

    moeopt.optimize(study, cuts, timeout=1.0)
    assert len(kept(spool)) == 1
    wire.mend()
    again = opened(wired, name)

    def interrupted(trial: optuna.Trial) -> float:
        wire.cut()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return loss(trial)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        moeopt.optimize(again, interrupted, n_trials=5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(kept(spool)) == 2
    wire.mend()


def test_a_database_that_is_not_there_is_an_error_at_once_or_waited_for(wire: Wire, wired: str, name: str) -> None:
    wire.cut()
    with pytest.raises(StorageError, match="cannot use the storage"):
        open_storage(wired)
    threading.Timer(1.0, wire.mend).start()
    assert opened(wired, name).trials == []


class Coded(Exception):
    """An error of PostgreSQL's."""

    def __init__(self, sqlstate: str, text: str = "") -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (sqlite3.OperationalError("database is locked"), True),
        (sqlite3.OperationalError("no such table: trials"), False),
        (sqlite3.OperationalError("database or disk is full"), False),
        (Coded("25P02", "current transaction is aborted"), True),
        (Coded("57014", "canceling statement due to user request"), True),
        (Coded("28P01", "password authentication failed for user"), False),
        (Exception(1317, "Query execution was interrupted"), True),
    ],
    ids=str,
)
def test_which_errors_are_outages(cause: Exception, passes: bool) -> None:
    error = OperationalError("x", {}, cause)
    wrapped = optuna.exceptions.StorageInternalError("x")
    wrapped.__cause__ = error
    assert is_outage(error) == is_outage(wrapped) == passes
    assert not is_outage(ValueError(str(cause)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heartbeat_interval": 0}, "heartbeat_interval"),
        ({"grace_period": 30}, "longer than heartbeat_interval, 60 s, got 30 s"),
        ({"patience": -1}, "patience"),
        ({"retries": -1}, "retries"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(StorageError, match=named):
        open_storage(f"sqlite:///{tmp_path}/x.db", **options)
    assert not (tmp_path / "x.db").exists()
