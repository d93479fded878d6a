"""A database that is dropped, made anew, or restored to an earlier state while workers search."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from databases import diagonal
from optuna.trial import TrialState

import moeopt
from benchmarks.servers import TABLES, Own
from moeopt.errors import StorageError
from moeopt.study.storage import attributes
from moeopt.trials import genome

from .conftest import backend, loss, opened, said, slots


@pytest.fixture
def server(database: str, tmp_path: Path) -> Iterator[Own]:
    made = Own(database, tmp_path)
    yield made
    made.drop()


def facts(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.value, t.datetime_complete) for t in study.trials]


@pytest.mark.slow
def test_a_worker_goes_on_from_the_state_that_was_restored(
    server: Own, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Others run more trials meanwhile than were lost, none, and fewer; each time a worker that saw no restore yet."""
    moeopt.optimize(opened(server.url, name), loss, n_trials=2)
    restore = server.backup()
    for lost, others, trials in ((2, 3, 6), (5, 0, 4), (3, 1, 4)):
        mine = opened(server.url, name)
        moeopt.optimize(mine, loss, n_trials=2 + lost)
        restore()
        if others:
            moeopt.optimize(opened(server.url, name), lambda trial: loss(trial) + 100, n_trials=2 + others)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "moeopt"):
            moeopt.optimize(mine, loss, n_trials=trials)
        assert slots(mine) == list(range(trials))
        assert facts(mine) == facts(opened(server.url, name))
        assert [trial.value >= 100 for trial in mine.trials] == [2 <= i < 2 + others for i in range(trials)]
        assert len([text for text in said(caplog) if "set back to an earlier state" in text]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database", "others", "step"),
    diagonal(["none", "running", "complete"], ["attribute", "report", "value"]),
    indirect=["database"],
)
def test_a_trial_that_has_the_number_of_another_one_now_is_not_written_to(
    server: Own, name: str, others: str, step: str
) -> None:
    mine, other = opened(server.url, name), opened(server.url, name)
    moeopt.optimize(mine, loss, n_trials=2)
    restore = server.backup()
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
                attributes.write(mine, trial, {}, {"note": "mine"})
            if step == "report":
                trial.report(1.0, 0)
        elif len(calls) > 3:
            tell()
        return loss(trial)

    moeopt.optimize(mine, objective, n_trials=6)
    assert facts(mine) == facts(opened(server.url, name))
    assert slots(mine) == list(range(6))
    assert [trial.value >= 100 for trial in mine.trials] == [others != "none" and i in (2, 3, 4) for i in range(6)]
    assert not any("note" in trial.user_attrs or trial.intermediate_values for trial in mine.trials)
    assert calls == [2, 3, 4, *([5] if others != "none" else [2, 3, 4, 5])]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["proposed", "told"])
def test_a_trial_that_is_gone_between_two_steps_of_optuna_s_is_run_again(
    server: Own, name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is asked whether its plan is taken; and after it was told, when it is read once more."""
    mine = opened(server.url, name)
    moeopt.optimize(mine, loss, n_trials=2)
    restores = [server.backup()]
    storage = backend(mine).storage
    call = "write_trial" if step == "proposed" else "_end"
    original = getattr(storage, call)

    def restored(*arguments: Any, **options: Any) -> Any:
        if step == "proposed" and restores and arguments[4] is not None:
            restores.pop()()
        done = original(*arguments, **options)
        if step == "told" and restores:
            restores.pop()()
        return done

    monkeypatch.setattr(storage, call, restored)
    moeopt.optimize(mine, loss, n_trials=4)
    assert not restores
    assert slots(mine) == list(range(4))
    assert facts(mine) == facts(opened(server.url, name))


@pytest.mark.slow
def test_a_trial_that_ran_when_the_backup_was_made_is_done_once(server: Own, name: str) -> None:
    mine = opened(server.url, name, grace_period=2)
    backups: list[Callable[[], None]] = []

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1 and not backups:
            backups.append(server.backup())
        if trial.number == 3 and len(backups) == 1:
            backups.append(backups[0])
            backups[0]()
        return loss(trial)

    moeopt.optimize(mine, objective, n_trials=5)
    trials = opened(server.url, name).trials
    assert slots(mine) == list(range(5))
    assert [trial.state for trial in trials if trial.number != 1] == [TrialState.COMPLETE] * (len(trials) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["proposal", "attribute", "report"])
def test_a_trial_that_lost_what_was_written_to_it_is_run_again(server: Own, name: str, lost: str) -> None:
    mine = opened(server.url, name)
    backups: list[Callable[[], None]] = []
    proposes = mine.sampler.before_trial

    def before_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == 1:
            backups.append(server.backup())
        proposes(study, trial)

    def objective(trial: optuna.Trial) -> float:
        first = trial.number == 1
        if lost == "report":
            trial.report(1.0, 0)
        if first and lost != "proposal":
            backups.append(server.backup())
        attributes.write(mine, trial, {}, {"note": trial.number})
        trial.report(2.0, 1)
        if first:
            backups[-1]()
        return loss(trial)

    if lost == "proposal":
        mine.sampler.before_trial = before_trial  # type: ignore[method-assign]
    moeopt.optimize(mine, objective, n_trials=3)
    assert slots(mine) == list(range(3))
    for trial in opened(server.url, name).trials:
        if trial.state == TrialState.COMPLETE:
            assert trial.value == float(((genome.read(trial) - 0.25) ** 2).sum())  # type: ignore[operator]
            assert trial.user_attrs["note"] == trial.number
            assert trial.intermediate_values[1] == 2.0
    assert [trial.state for trial in mine.trials].count(TrialState.FAIL) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tables", "database"])
def test_a_database_that_was_dropped_is_waited_for_until_it_is_back(
    server: Own, name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    study = opened(server.url, name)
    moeopt.optimize(study, loss, n_trials=2)
    restore = server.backup()

    def bring_back() -> None:
        if what == "database":
            server.create()
        opened(server.url, f"{name}-other")  # makes the tables
        time.sleep(1.5)
        restore()

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2 and not threads[0].ident:
            if what == "database":
                server.drop()
            else:
                engine = server.engine()
                TABLES.drop_all(engine)
                engine.dispose()
            threads[0].start()
        return loss(trial)

    threads = [threading.Timer(1.0, bring_back)]
    with caplog.at_level(logging.WARNING, "moeopt"):
        moeopt.optimize(study, objective, n_trials=4)
    threads[0].join()
    assert slots(study) == list(range(4))
    assert facts(study) == facts(opened(server.url, name))
    assert any("it was dropped" in text for text in said(caplog))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dropped", "made anew", "tables made anew"])
def test_a_database_that_does_not_come_back_is_one_error(server: Own, name: str, what: str) -> None:
    study = opened(server.url, name, patience=1)
    storage = backend(study).storage

    def objective(trial: optuna.Trial) -> float:
        engine = server.engine()
        if trial.number == 1 and engine.name == "mysql":
            time.sleep(1.1)  # it knows by the second when its tables were made
        if trial.number == 1 and what == "tables made anew":
            TABLES.drop_all(engine)
            TABLES.create_all(engine)
        elif trial.number == 1:
            server.drop()
            server.create()
            if what == "made anew":
                opened(server.url, f"{name}-other")
        engine.dispose()
        return loss(trial)

    wanted = "dropped or is being restored" if what == "dropped" else "the study is not in it any more"
    began = time.monotonic()
    with pytest.raises(StorageError, match=wanted) as error:
        moeopt.optimize(study, objective, n_trials=4)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began >= storage.waiting.patience
