"""Workers as processes on one study: exact slots, one successor for each that dies, no plan twice."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from databases import diagonal
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages._rdb import models
from optuna.trial import TrialState

import moeopt
from moeopt import samplers
from moeopt.errors import StorageError
from moeopt.study.storage import attributes, open_storage, staleness
from moeopt.study.storage.spool import Result
from moeopt.study.storage.staleness import Watch
from moeopt.study.warm_starts import enqueue_new
from moeopt.trials import genome

from .conftest import SPACE, backend, loss, opened, processes, slots, until

TINY = moeopt.PruneSpace(moeopt.ModelShape(1, 6, k=2), keep=3)  # of 20 plans


def works(url: str, name: str, trials: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = opened(url, name)

    def objective(trial: optuna.Trial) -> float:
        time.sleep(0.02)
        return loss(trial)

    moeopt.optimize(study, objective, n_trials=trials)


@pytest.mark.slow
def test_killed_workers_leave_every_slot_done_once(url: str, name: str) -> None:
    opened(url, name)
    team, rng = processes(3, works, url, name, 16), random.Random(0)
    study = opened(url, name)
    for share in (4, 9):
        until(lambda share=share: len(slots(study)) >= share)
        victim = rng.randrange(3)
        team[victim].kill()
        team[victim].join()
        team[victim] = processes(1, works, url, name, 16)[0]
    for process in team:
        process.join()
        assert process.exitcode == 0
    trials = study.get_trials(deepcopy=False)
    assert slots(study) == list(range(16))
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    repeats = Counter(t.system_attrs[genome.RETRIES][-1] for t in trials if genome.RETRIES in t.system_attrs)
    assert repeats == Counter(t.number for t in trials if t.state == TrialState.FAIL)


def takes_over(url: str, name: str, delay: float) -> None:
    study = opened(url, name, grace_period=2)
    staleness.clock = map(float, itertools.count()).__next__  # a second from look to look
    if delay:
        signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM ends the process wherever it is
    for _ in range(10):
        optuna.storages.fail_stale_trials(study)


@pytest.mark.slow
def test_a_stale_trial_has_one_successor_whoever_looks_and_dies(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(url, name)
    asked = [study.ask().number for _ in range(8)]
    storage, _ = backend(study)
    storage._owned.clear()  # as if this process were dead
    monkeypatch.setattr(staleness, "clock", staleness.clock)
    rng = random.Random(1)
    for process in processes(2, takes_over, url, name, 0.05) + [
        p for _ in range(3) for p in processes(1, takes_over, url, name, rng.uniform(0.05, 0.4))
    ]:
        process.join()
    takes_over(url, name, 0)
    trials = study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["FAIL"] * 8 + ["WAITING"] * 8
    assert sorted(t.system_attrs[genome.RETRIES][0] for t in trials[8:]) == asked
    for dead in trials[:8]:
        (again,) = [t for t in trials if t.system_attrs.get(genome.RETRIES) == [dead.number]]
        assert np.array_equal(genome.read(dead), genome.read(again))  # type: ignore[arg-type]
        assert "not heard of for 2 s" in dead.user_attrs["failure"]


def starts_warm(url: str, name: str) -> None:
    plans = [(None, SPACE.decode(np.random.default_rng(i).random(SPACE.size, np.float32))) for i in range(3)]
    named = [("naee", plans[0][1]), ("reap", plans[0][1])]
    enqueue_new(opened(url, name), SPACE, [*plans, *named], [])


@pytest.mark.slow
def test_workers_that_begin_together_queue_warm_starts_once(url: str, name: str) -> None:
    study = opened(url, name)
    for process in processes(3, starts_warm, url, name):
        process.join()
        assert process.exitcode == 0
    trials = study.get_trials(deepcopy=False)
    assert sorted(str(t.user_attrs.get(genome.METHOD)) for t in trials) == ["None", "None", "None", "naee", "reap"]
    assert len({t.user_attrs[genome.WARM_START] for t in trials}) == 3
    assert [t.state for t in trials] == [TrialState.WAITING] * 5


def test_what_was_kept_of_a_trial_is_stored_while_its_worker_writes_the_same(url: str, name: str) -> None:
    study = opened(url, name)
    trial = study.ask()
    storage, study_id = backend(study)
    result = Result(storage.identity(study_id), trial.number, {"pid": 1}, user_attrs={"key": "kept"})
    written = {"trial_id": trial._trial_id, "key": "key", "value_json": '"written"'}
    with ThreadPoolExecutor() as pool, storage.engine.begin() as connection:
        if storage.engine.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        trials = models.TrialModel.__table__
        connection.execute(trials.select().where(trials.c.trial_id == trial._trial_id).with_for_update())
        connection.execute(models.TrialUserAttributeModel.__table__.insert(), written)
        delivered = pool.submit(storage._deliver, study_id, result)
        time.sleep(0.5)
        connection.commit()
        assert delivered.result() == trial.number
    assert study.trials[0].user_attrs == {"key": "kept"}


def dies(url: str, name: str) -> None:
    moeopt.optimize(opened(url, name), lambda trial: os.kill(os.getpid(), signal.SIGKILL) or 0.0, n_trials=1)


@pytest.mark.slow
def test_a_trial_is_retried_so_often_and_then_failed_with_the_reason(url: str, name: str) -> None:
    opened(url, name)
    for _ in range(3):
        (process,) = processes(1, dies, url, name)
        process.join()
    study = opened(url, name, retries=2)
    assert moeopt.study.reclaim(study) == []
    assert [t.state.name for t in study.trials] == ["FAIL"] * 3
    assert study.trials[0].user_attrs["failure"] == "its worker died"
    assert study.trials[2].user_attrs["failure"] == "its worker died; not tried again, as 3 workers died with it"
    assert moeopt.study.finished(study) == 1
    assert moeopt.study.reclaim(study) == []
    moeopt.optimize(study, loss, n_trials=2)
    assert slots(study) == [1]


@pytest.mark.slow
def test_ctrl_c_does_not_count_as_a_death(url: str, name: str) -> None:
    def interrupted(trial: optuna.Trial) -> float:
        trial.set_user_attr(genome.INTERRUPTED, True)
        raise KeyboardInterrupt

    for _ in range(4):  # one more than a worker may die of a trial
        with pytest.raises(KeyboardInterrupt):
            moeopt.optimize(opened(url, name), interrupted, n_trials=1)
    study = opened(url, name)
    moeopt.optimize(study, loss, n_trials=1)
    assert slots(study) == [0]
    assert len(study.trials) == 5


def last_one(url: str, name: str, ready: str) -> None:
    def objective(trial: optuna.Trial) -> float:
        Path(ready).touch()
        time.sleep(600)
        return 0.0

    moeopt.optimize(opened(url, name), objective, n_trials=2)


@pytest.mark.slow
def test_a_worker_waits_for_the_last_trial_of_one_that_dies(url: str, name: str, tmp_path: Path) -> None:
    study = opened(url, name)
    moeopt.optimize(study, loss, n_trials=1)
    (other,) = processes(1, last_one, url, name, str(tmp_path / "ready"))
    until((tmp_path / "ready").exists)
    (waiting,) = processes(1, works, url, name, 2)
    time.sleep(1.0)
    assert waiting.is_alive()
    assert len(study.get_trials(deepcopy=False)) == 2  # and starts none too many
    other.kill()
    other.join()
    waiting.join()
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert slots(study) == [0, 1]


@pytest.mark.slow
def test_waiting_for_others_ends_with_the_time_and_with_ctrl_c(url: str, name: str, tmp_path: Path) -> None:
    study = opened(url, name)
    (other,) = processes(1, last_one, url, name, str(tmp_path / "ready"))
    until((tmp_path / "ready").exists)
    moeopt.optimize(study, loss, n_trials=2, timeout=0.5)
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        moeopt.optimize(study, loss, n_trials=2)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, outer)
    assert slots(study) == [1]
    other.kill()
    other.join()


def test_a_trial_that_was_asked_for_and_left_does_not_block_its_own_process(url: str, name: str) -> None:
    study = opened(url, name)
    study.ask()
    moeopt.optimize(study, loss, n_trials=2)
    assert len(slots(study)) == 2


@pytest.mark.slow
def test_enqueued_trials_count_as_slots_and_none_is_one_too_many(url: str, name: str) -> None:
    study = opened(url, name)
    for _ in range(3):
        moeopt.enqueue(study, SPACE, SPACE.decode(SPACE.sample(np.random.default_rng())))
    moeopt.optimize(study, loss, n_trials=2)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "WAITING"]
    moeopt.optimize(study, loss, n_trials=5)
    assert slots(study) == list(range(5))


@pytest.mark.slow
def test_heartbeats_of_a_trial_go_on_until_it_is_told(url: str, name: str) -> None:
    study, other = opened(url, name), opened(url, name, grace_period=3)
    trial = study.ask()
    for _ in range(8):
        time.sleep(0.5)
        optuna.storages.fail_stale_trials(other)
    assert other.trials[0].state == TrialState.RUNNING
    study.tell(trial, 1.0)
    assert other.trials[0].value == 1.0


@given(st.lists(st.tuples(st.floats(0, 500), st.booleans()), max_size=30), st.integers(1, 300))
def test_only_what_was_seen_unchanged_for_long_enough_is_silent(looks: list[tuple[float, bool]], grace: int) -> None:
    now, gap = 0.0, 120.0
    beat, counted = datetime(2000, 1, 1), 0.0
    watch = Watch(gap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staleness, "clock", lambda: now)
        watch.look({1: beat})
        for seconds, beats in looks:
            now += seconds
            counted = 0.0 if beats else counted + min(seconds, gap)
            beat -= timedelta(hours=beats)  # whichever way a clock is set
            watch.look({1: beat, 2: datetime.now()})
            if abs(counted - grace) > 1e-6:
                assert (watch.silent(grace) == {1: beat}) == (counted > grace)
        watch.look({})
        assert watch.silent(0) == {}


def draws(url: str, name: str, trials: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = opened(url, name, samplers.get("random", TINY, seed=0, redraw=400))
    moeopt.optimize(study, lambda trial: float(TINY.vector(trial).sum()), n_trials=trials)


@pytest.mark.slow
def test_no_two_workers_try_the_same_plan(url: str, name: str) -> None:
    opened(url, name)
    for process in processes(3, draws, url, name, 17):
        process.join()
        assert process.exitcode == 0
    assert max(Counter(genome.origin(t)["plan"] for t in opened(url, name).trials).values()) == 1


@pytest.mark.slow
def test_a_plan_is_taken_that_another_worker_wrote_while_this_one_waited(url: str, name: str) -> None:
    study = opened(url, name)
    mine, other = study.ask(), study.ask()
    storage, _ = backend(study)
    plan = {genome.ORIGIN: {**genome.origin(attributes.frozen_trial(other)), "plan": "p"}}
    unless = attributes.taken(study, "p", [t for t in study.trials if t.number != other.number])
    with ThreadPoolExecutor() as pool, storage.engine.connect() as connection:
        if storage.engine.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        studies = models.StudyModel.__table__
        connection.execute(studies.select().where(studies.c.study_id == study._study_id).with_for_update())
        writing = pool.submit(attributes.write, study, mine, plan, unless=unless)
        time.sleep(0.3)  # it waits for the lock
        attrs = models.TrialSystemAttributeModel.__table__
        row = attrs.c.trial_id == other._trial_id, attrs.c.key == genome.ORIGIN
        connection.execute(attrs.update().where(*row).values(value_json=json.dumps(plan[genome.ORIGIN])))
        connection.commit()
        assert writing.result() is False


@pytest.mark.slow
def test_a_plan_that_another_worker_took_meanwhile_is_drawn_again(url: str, name: str) -> None:
    mine, other = opened(url, name, "local"), opened(url, name)
    mine.optimize(loss, n_trials=2)
    new_plan, taken = mine.sampler._new_plan, []  # type: ignore[attr-defined]

    def slow(history: Any, slot: int) -> Any:
        """Another worker proposes the same before this one stores it, once."""
        proposal = new_plan(history, slot)
        if not taken:
            x = SPACE.snap(proposal.x)
            moeopt.enqueue(other, SPACE, SPACE.decode(x))
            taken.append(other.ask())
        return proposal

    mine.sampler._new_plan = slow  # type: ignore[attr-defined]
    trial = mine.ask()
    assert trial.number < taken[0].number
    plans = {genome.origin(attributes.frozen_trial(each))["plan"] for each in (trial, taken[0])}
    assert len(plans) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database", "again", "at"), diagonal(["deleted", "made anew"], ["evaluating", "between"]), indirect=["database"]
)
def test_a_worker_of_a_deleted_study_ends_and_leaves_the_next_one_alone(
    url: str, name: str, spool: Path, at: str, again: str
) -> None:
    study = opened(url, name)
    made: list[optuna.Study] = []

    def delete() -> None:
        storage = open_storage(url)
        optuna.delete_study(study_name=name, storage=storage)
        if again == "made anew":
            made.append(opened(url, name))
            for _ in range(3):
                made[0].ask()

    def objective(trial: optuna.Trial) -> float:
        if at == "evaluating" and trial.number == 1:
            delete()
        return loss(trial)

    def then(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if at == "between" and trial.number == 1:
            delete()

    with pytest.raises(StorageError, match="the study was deleted while it was searched"):
        moeopt.optimize(study, objective, n_trials=9, callbacks=[then])
    for new in made:
        assert [trial.state for trial in new.trials] == [TrialState.RUNNING] * 3
    assert not [*spool.rglob("*.json")]
