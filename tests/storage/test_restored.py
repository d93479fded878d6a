"""A database that is dropped, made anew, or restored to an earlier state while workers search."""

from __future__ import annotations

import functools
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

import moeopt
from moeopt import genome
from moeopt.errors import StorageError

from .conftest import loss, opened, slots

TABLES = models.BaseModel.metadata  # type: ignore[attr-defined]


class Own:
    """A database of this test's own."""

    def __init__(self, server: str, folder: Path) -> None:
        self._server = make_url(server)
        self.file = folder / "own.db" if self._server.get_backend_name() == "sqlite" else None
        self._name = f"moeopt_own_{uuid.uuid4().hex[:12]}"
        self.create()
        parsed = self._server.set(database=self._name if self.file is None else str(self.file))
        self.url = parsed.render_as_string(hide_password=False)

    def create(self) -> None:
        if self.file is None:
            self._tell(f"CREATE DATABASE {self._name}")

    def drop(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        else:
            force = " WITH (FORCE)" if self._server.get_backend_name() == "postgresql" else ""
            self._tell(f"DROP DATABASE IF EXISTS {self._name}{force}")

    def _tell(self, statement: str) -> None:
        engine = create_engine(self._server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def engine(self) -> Engine:
        return create_engine(self.url)

    def backup(self) -> Callable[[], None]:
        """What restores the database, or what is left of it, to what it holds now."""
        if self.file is not None:
            copy = self.file.with_suffix(".backup")
            _copy(self.file, copy)
            return functools.partial(_copy, copy, self.file)
        engine = self.engine()
        with engine.connect() as connection:
            rows = {table: connection.execute(table.select()).mappings().all() for table in TABLES.sorted_tables}
        engine.dispose()

        def restore() -> None:
            if engine.name == "mysql":
                time.sleep(2)  # no restore is as fast as its clock, which shows seconds
            TABLES.drop_all(engine)
            TABLES.create_all(engine)
            with engine.begin() as connection:
                for table in TABLES.sorted_tables:
                    if rows[table]:
                        connection.execute(table.insert(), [dict(row) for row in rows[table]])
                    key = next(iter(table.primary_key.columns)).name
                    if engine.name == "postgresql":
                        restart = f"SELECT setval(pg_get_serial_sequence('{table}', '{key}'), max({key})) FROM {table}"
                        connection.execute(text(restart))
            engine.dispose()

        return restore


def _copy(source: Path, target: Path) -> None:
    """Copy an SQLite database into another with SQLite's locks, which a process loses when it closes a file itself."""
    with closing(sqlite3.connect(source)) as origin, closing(sqlite3.connect(target)) as copy:
        origin.backup(copy)


@pytest.fixture
def own(database: str, tmp_path: Path) -> Iterator[Own]:
    made = Own(database, tmp_path)
    yield made
    made.drop()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "moeopt.storage"]


def facts(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.value, t.datetime_complete) for t in study.trials]


@pytest.mark.parametrize("others", [0, 2, 6])
def test_a_worker_goes_on_from_the_state_that_was_restored(
    own: Own, name: str, others: int, caplog: pytest.LogCaptureFixture
) -> None:
    mine = opened(own.url, name)
    moeopt.optimize(mine, loss, trials=4)
    restore = own.backup()
    moeopt.optimize(mine, loss, trials=8)
    restore()
    if others:
        moeopt.optimize(opened(own.url, name), lambda trial: loss(trial) + 100, trials=4 + others)
    with caplog.at_level(logging.WARNING, "moeopt"):
        moeopt.optimize(mine, loss, trials=11)
    assert slots(mine) == list(range(11))
    assert facts(mine) == facts(opened(own.url, name))
    assert [trial.value >= 100 for trial in mine.trials] == [4 <= i < 4 + others for i in range(11)]
    assert len([text for text in said(caplog) if "set back to an earlier state" in text]) == 1


@pytest.mark.parametrize("step", ["attribute", "report", "value"])
@pytest.mark.parametrize("others", ["none", "running", "complete"])
def test_a_trial_that_has_the_number_of_another_one_now_is_not_written_to(
    own: Own, name: str, others: str, step: str
) -> None:
    mine, other = opened(own.url, name), opened(own.url, name)
    moeopt.optimize(mine, loss, trials=2)
    restore = own.backup()
    calls: list[int] = []
    theirs: list[optuna.Trial] = []

    def tell() -> None:
        while theirs:
            other.tell(theirs[0], loss(theirs.pop(0)) + 100)

    def objective(trial: optuna.Trial) -> float:
        calls.append(trial.number)
        if len(calls) == 3:
            restore()
            theirs.extend(other.ask() for _ in range(3 if others != "none" else 0))
            if others == "complete":
                tell()
            if step == "attribute":
                genome.write(mine, trial, {}, {"note": "mine"})
            if step == "report":
                trial.report(1.0, 0)
        elif len(calls) > 3:
            tell()
        return loss(trial)

    moeopt.optimize(mine, objective, trials=7)
    assert facts(mine) == facts(opened(own.url, name))
    assert slots(mine) == list(range(7))
    assert [trial.value >= 100 for trial in mine.trials] == [others != "none" and i in (2, 3, 4) for i in range(7)]
    assert not any("note" in trial.user_attrs or trial.intermediate_values for trial in mine.trials)
    assert calls == [2, 3, 4, *([5, 6] if others != "none" else [2, 3, 4, 5, 6])]


def test_a_trial_that_ran_when_the_backup_was_made_is_done_once(own: Own, name: str) -> None:
    mine = opened(own.url, name, grace_period=2)
    backups: list[Callable[[], None]] = []

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1 and not backups:
            backups.append(own.backup())
        if trial.number == 3 and len(backups) == 1:
            backups.append(backups[0])
            backups[0]()
        return loss(trial)

    moeopt.optimize(mine, objective, trials=5)
    trials = opened(own.url, name).trials
    assert slots(mine) == list(range(5))
    assert [trial.state for trial in trials if trial.number != 1] == [TrialState.COMPLETE] * (len(trials) - 1)


@pytest.mark.parametrize("what", ["tables", "database"])
def test_a_database_that_was_dropped_is_waited_for_until_it_is_back(
    own: Own, name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    study = opened(own.url, name)
    moeopt.optimize(study, loss, trials=2)
    restore = own.backup()

    def bring_back() -> None:
        if what == "database":
            own.create()
        opened(own.url, f"{name}-other")  # makes the tables
        time.sleep(1.5)
        restore()

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 3 and not threads[0].ident:
            if what == "database":
                own.drop()
            else:
                engine = own.engine()
                TABLES.drop_all(engine)
                engine.dispose()
            threads[0].start()
        return loss(trial)

    threads = [threading.Timer(1.5, bring_back)]
    with caplog.at_level(logging.WARNING, "moeopt"):
        moeopt.optimize(study, objective, trials=6)
    threads[0].join()
    assert slots(study) == list(range(6))
    assert facts(study) == facts(opened(own.url, name))
    assert any("it was dropped or is being restored" in text for text in said(caplog))


@pytest.mark.parametrize("what", ["dropped", "made anew", "tables made anew"])
def test_a_database_that_does_not_come_back_is_one_error(own: Own, name: str, what: str) -> None:
    study = opened(own.url, name, patience=2)
    backend = genome.shared(study)[0]  # type: ignore[index]

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1 and what == "tables made anew":
            engine = own.engine()
            TABLES.drop_all(engine)
            TABLES.create_all(engine)
            engine.dispose()
        elif trial.number == 1:
            own.drop()
            own.create()
            if what == "made anew":
                opened(own.url, f"{name}-other")
        return loss(trial)

    wanted = "dropped or is being restored" if what == "dropped" else "the study is not in it any more"
    began = time.monotonic()
    with pytest.raises(StorageError, match=wanted) as error:
        moeopt.optimize(study, objective, trials=4)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began >= backend.waiting.patience
