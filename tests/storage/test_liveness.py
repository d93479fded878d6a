"""No worker stands still for ever: for a frozen one, for a link without a word, for a database that is set back."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.engine import make_url

import moeopt
from moeopt.errors import StorageError
from moeopt.samplers import base
from moeopt.study.storage import links, open_storage, rows

from .conftest import Wire, backend, loss, opened, processes, said, slots, until


def hasten() -> None:
    """Short limits, as if time went faster; also in a worker process."""
    links.LOCK, links.IDLE, links.SILENCE = 1, 2, 2
    for arguments in links.ARGUMENTS.values():
        for name in {"timeout", "connect_timeout", "read_timeout", "write_timeout"} & set(arguments):
            arguments[name] = 1 if name == "timeout" else 2


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCK", "IDLE", "SILENCE"):
        monkeypatch.setattr(links, name, getattr(links, name))
    monkeypatch.setattr(links, "ARGUMENTS", {driver: dict(given) for driver, given in links.ARGUMENTS.items()})
    hasten()


def freezes(url: str, name: str, step: str) -> None:
    """A worker that is frozen once, within a transaction that holds the study's lock or that of a trial."""
    hasten()
    study = opened(url, name)
    storage, _ = backend(study)
    call, frozen = getattr(storage, step), []

    def freeze(*arguments: Any) -> Any:
        result = call(*arguments)
        if not frozen:
            frozen.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(storage, step, freeze)
    moeopt.optimize(study, loss, n_trials=3)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["_get_prepared_new_trial", "_set_trial_value_without_commit"])
def test_a_worker_frozen_with_a_lock_stops_the_others_for_a_bounded_time(
    url: str, name: str, step: str, hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    study = opened(url, name, grace_period=2)
    (frozen,) = processes(1, freezes, url, name, step)
    process = psutil.Process(frozen.pid)
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    with caplog.at_level(logging.WARNING, "moeopt"):
        if url.startswith("sqlite"):  # nothing breaks its lock
            threading.Timer(3.0, process.resume).start()
        moeopt.optimize(study, loss, n_trials=3)
    with suppress(psutil.NoSuchProcess):
        process.resume()
    frozen.join()
    assert frozen.exitcode == 0
    assert slots(study) == list(range(3))
    told = said(caplog)
    if url.startswith("sqlite"):
        assert f"is locked (database is locked, by process {frozen.pid}, which is stopped); waiting up to" in told[0]
        assert len([text for text in told if "is locked" in text]) == 1
    elif step == "_get_prepared_new_trial":
        assert "is locked (" in told[0]


@pytest.mark.slow
def test_a_link_without_a_word_is_an_outage(wire: Wire, wired: str, name: str, hasty: None) -> None:
    study = opened(wired, name)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            wire.silent = True
            threading.Timer(3.0, setattr, (wire, "silent", False)).start()
        return loss(trial)

    moeopt.optimize(study, objective, n_trials=3)
    assert slots(study) == list(range(3))
    assert [trial.number for trial in study.trials] == list(range(3))


def test_what_a_connection_waits_for_is_bounded_but_for_what_the_url_says(direct: str) -> None:
    limits = {
        "postgresql": "SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')",
        "mysql": "SELECT @@innodb_lock_wait_timeout, @@idle_transaction_timeout",
    }
    parsed = make_url(direct)
    postgres = parsed.get_backend_name() == "postgresql"
    chosen = {"options": "-c lock_timeout=77s", "tcp_user_timeout": "1"}
    if not postgres:
        chosen = {"init_command": "SET innodb_lock_wait_timeout = 77", "read_timeout": "7"}

    def told(url: str) -> list[Any]:
        storage = open_storage(url)
        with storage.engine.connect() as connection:  # type: ignore[attr-defined]
            return list(connection.execute(text(limits[parsed.get_backend_name()])).one())

    assert told(direct) == (["10s", "30s"] if postgres else [10, 30])
    named = parsed.update_query_dict(chosen)
    assert told(named.render_as_string(hide_password=False)) == (["77s", "30s"] if postgres else [77, 30])
    given = links.options(named)["connect_args"]
    assert not set(given) & set(chosen)
    assert given["connect_timeout"] == 10


def forks(url: str, name: str, said: str) -> None:
    """A worker that forks before it runs trials, and while it runs one; all go on with the study that one opened."""
    study = opened(url, name)
    study.ask()
    children: list[int] = []

    def fork(work: Callable[[], Any]) -> None:
        children.append(os.fork())
        if not children[-1]:
            work()
            os._exit(0)

    def inside(trial: optuna.Trial) -> None:
        try:
            study.tell(trial, -1.0)
        except StorageError as error:
            Path(said).write_text(str(error))
        trial.set_user_attr("from", "child")
        for again in (study.ask() for _ in range(3)):
            study.tell(again, loss(again))

    def objective(trial: optuna.Trial) -> float:
        if len(children) == 1:
            fork(lambda: inside(trial))
            assert os.waitpid(children[1], 0)[1] == 0
        return loss(trial)

    def outside() -> None:
        until(Path(said).exists)
        moeopt.optimize(study, loss, n_trials=12)

    fork(outside)
    moeopt.optimize(study, objective, n_trials=11)
    study.tell(0, 0.5)
    assert os.waitpid(children[0], 0)[1] == 0


@pytest.mark.slow
def test_a_forked_process_gets_connections_of_its_own_and_ends_no_trial_of_its_parent(
    url: str, name: str, tmp_path: Path
) -> None:
    (process,) = processes(1, forks, url, name, str(tmp_path / "said"))
    process.join()
    assert process.exitcode == 0
    study = opened(url, name)
    assert slots(study) == list(range(12))
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 12
    assert study.trials[0].value == 0.5
    (forked,) = [trial for trial in study.trials if trial.user_attrs]
    assert forked.value == loss(forked)
    said = f"trial {forked.number} is ended by the process that runs it, not by one forked from that"
    assert (tmp_path / "said").read_text() == said


def forks_amid(url: str, name: str, said: str) -> None:
    """Fork while other threads hold a transaction, the lock of Optuna's cache, and that of those who ask."""
    study = opened(url, name)
    storage, study_id = backend(study)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with study._storage._lock, base._asking, rows.transaction(storage, study_id):  # type: ignore[attr-defined]
            holding.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    child = os.fork()
    if not child:
        try:
            moeopt.optimize(study, loss, n_trials=3)
        except StorageError as error:
            Path(said).write_text(str(error))
        os._exit(0)
    if url.startswith("sqlite"):
        os.waitpid(child, 0)
    done.set()
    thread.join()
    if not url.startswith("sqlite"):
        os.waitpid(child, 0)
    moeopt.optimize(study, loss, n_trials=4)


def test_a_process_forked_amid_a_transaction_works_or_says_why_not(url: str, name: str, tmp_path: Path) -> None:
    (process,) = processes(1, forks_amid, url, name, str(tmp_path / "said"))
    process.join()
    assert process.exitcode == 0
    assert slots(opened(url, name)) == list(range(4))
    said = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
    assert ("by 'spawn' or 'forkserver'" in said) == url.startswith("sqlite")
