"""No worker stands still for ever: for a frozen one, for a link without a word, for a database that is set back."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import suppress
from typing import Any

import optuna
import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

import moeopt
from moeopt import genome
from moeopt.storage import links, open_storage

from .conftest import Wire, loss, opened, processes, slots, until


def backend(study: optuna.Study) -> tuple[Any, int]:
    team = genome.shared(study)
    assert team is not None
    return team


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
    moeopt.optimize(study, loss, trials=5)


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
        moeopt.optimize(study, loss, trials=5)
    with suppress(psutil.NoSuchProcess):
        process.resume()
    frozen.join()
    assert frozen.exitcode == 0
    assert slots(study) == list(range(5))
    said = [record.getMessage() for record in caplog.records if record.name == "moeopt.storage"]
    if url.startswith("sqlite"):
        assert f"is locked (database is locked, by process {frozen.pid}, which is stopped); waiting up to" in said[0]
        assert len([text for text in said if "is locked" in text]) == 1
    elif step == "_get_prepared_new_trial":
        assert "is locked (" in said[0]


def test_a_link_without_a_word_is_an_outage(wire: Wire, wired: str, name: str, hasty: None) -> None:
    study = opened(wired, name)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2:
            wire.silent = True
            threading.Timer(3.0, setattr, (wire, "silent", False)).start()
        return loss(trial)

    moeopt.optimize(study, objective, trials=5)
    assert slots(study) == list(range(5))
    assert [trial.number for trial in study.trials] == list(range(5))


def test_what_a_connection_waits_for_is_bounded_but_for_what_the_url_says(direct: str) -> None:
    limits = {
        "postgresql": "SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')",
        "mysql": "SELECT @@innodb_lock_wait_timeout, @@idle_transaction_timeout",
    }
    parsed = make_url(direct)
    postgres = parsed.get_backend_name() == "postgresql"
    own = {"options": "-c lock_timeout=77s", "tcp_user_timeout": "1"}
    if not postgres:
        own = {"init_command": "SET innodb_lock_wait_timeout = 77", "read_timeout": "7"}

    def told(url: str) -> list[Any]:
        storage = open_storage(url)
        with storage.engine.connect() as connection:  # type: ignore[attr-defined]
            return list(connection.execute(text(limits[parsed.get_backend_name()])).one())

    assert told(direct) == (["10s", "30s"] if postgres else [10, 30])
    named = parsed.update_query_dict(own)
    assert told(named.render_as_string(hide_password=False)) == (["77s", "30s"] if postgres else [77, 30])
    given = links.options(named)["connect_args"]
    assert not set(given) & set(own)
    assert given["connect_timeout"] == 10


@pytest.mark.parametrize(
    ("driver", "names"),
    [
        ("postgresql+psycopg2", {"tcp_user_timeout", "keepalives_idle"}),
        ("mysql+mysqldb", {"read_timeout", "write_timeout"}),
        ("mariadb+pymysql", {"read_timeout", "write_timeout"}),
        ("sqlite", {"timeout"}),
    ],
)
def test_every_driver_is_bounded_by_what_it_takes(driver: str, names: set[str]) -> None:
    assert names <= set(links.options(make_url(f"{driver}://host/name"))["connect_args"])
