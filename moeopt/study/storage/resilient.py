"""The storage of a team of workers, any of which may die.

* What is evaluated is kept on the local disk until it is stored (`Result`).
* A trial gets its first heartbeat with its claim, and one thread beats for all trials that this process runs, also for
  those of `study.ask`. A dead worker's trial is failed and repeated in one transaction (`ends.take_over`).
* A trial that was taken over while its worker lived stays running for that worker until it tells; then its result goes
  to the trial that repeats it, unless that has ended.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import StorageError
from moeopt.study.storage import claims, ends, rows, spool
from moeopt.study.storage.failures import SetBack, StudyIsGone
from moeopt.study.storage.outages import LONGEST_DELAY
from moeopt.study.storage.spool import Result
from moeopt.study.storage.staleness import Watch, beat
from moeopt.study.storage.waiting import WaitingStorage
from moeopt.study.storage.writes import Attrs, Params, Taken
from moeopt.trials import genome, process

logger = logging.getLogger("moeopt.study.storage")


@dataclass
class _Owned:
    """A trial that this process runs, the thread that asked for it, and names of what is written of it, by kind."""

    study_id: int
    thread: int
    result: Result
    written: dict[str, set[Any]]


class ResilientStorage(WaitingStorage):
    """A `WaitingStorage` whose trials are claimed, kept and taken over.

    Args:
        url, engine_kwargs, heartbeat_interval, grace_period, patience: as for `WaitingStorage`.
        retries: how often a trial whose worker died is tried again.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any] | None = None, *, retries: int, **settings: Any) -> None:
        self.retries = retries
        self._owned: dict[int, _Owned] = {}
        self._inherited: dict[int, int] = {}
        super().__init__(url, engine_kwargs, **settings)

    def _begin(self, url: str) -> None:
        super()._begin(url)
        self._inherited |= {trial_id: owned.result.number for trial_id, owned in self._owned.items()}
        self._owned = {}
        self._ended: set[int] = set()
        self._watches: dict[int, Watch] = {}
        self._local = threading.local()
        self._beating: threading.Thread | None = None
        self._lock = threading.Lock()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "retries": self.retries}

    # Claims.

    @contextmanager
    def slots(self, number: int | None) -> Iterator[None]:
        """Within it this thread starts a trial only while fewer slots than `number` were started, else NoSlotLeft.

        Trials that this thread asked for and left are not counted.
        """
        self._local.slots = number
        try:
            yield
        finally:
            self._local.slots = None

    def _slots(self, study_id: int) -> int | None:
        slots: int | None = getattr(self._local, "slots", None)
        return None if slots is None else slots + len(self.run_here(study_id))

    def run_here(self, study_id: int) -> dict[int, Result]:
        """What is known of the trials that this thread runs."""
        here, trials = threading.get_ident(), [*self._owned.items()]
        return {key: owned.result for key, owned in trials if owned.thread == here and owned.study_id == study_id}

    def claimable(self, study_id: int) -> bool:
        """Whether there is a trial to start: a slot that was not yet, or one to be repeated."""
        return self.waiting(lambda: claims.claimable(self, study_id, self._slots(study_id)))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        study = study_id, self.identity(study_id)
        create = functools.partial(claims.create, self, study, template_trial, uuid.uuid4().hex, self._slots(study_id))
        trial = self.waiting(functools.partial(create, again=False), again=functools.partial(create, again=True))
        if trial.state == TrialState.RUNNING:
            self._own(study_id, trial)
        return trial

    def create_once(self, study_id: int, template: FrozenTrial, user_attrs: Attrs) -> bool:
        """`claims.create_once`, waited for."""
        study = study_id, self.identity(study_id)
        return self.waiting(lambda: claims.create_once(self, study, template, user_attrs))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state.is_finished():
            return self._end(trial_id, state, None if values is None else [float(value) for value in values])
        if state != TrialState.RUNNING:
            return self.waiting(lambda: RDBStorage.set_trial_state_values(self, trial_id, state, values))
        study_id = self.waiting(lambda: rows.study_of(self, trial_id))
        study = study_id, self.identity(study_id)
        claim, slots = uuid.uuid4().hex, self._slots(study_id)
        trial = self.waiting(lambda: claims.start(self, study, trial_id, claim, slots))
        if trial is None:
            return False
        self._own(study_id, trial)
        return True

    def _own(self, study_id: int, trial: FrozenTrial) -> None:
        plan = genome.origin(trial).get("plan")
        local = trial.datetime_start
        started = None if local is None else local.astimezone(UTC).replace(tzinfo=None).isoformat()
        identity = self.identity(study_id)
        result = Result(identity, trial.number, process.this_worker(), plan, started=started)
        written = {"attrs": {*trial.system_attrs}, "user_attrs": {*trial.user_attrs}, "params": {*trial.params}}
        self.waiting.shaken = False  # the study is there
        with self._lock:
            self._owned[trial._trial_id] = _Owned(study_id, threading.get_ident(), result, written)
            if self.heartbeat_interval is not None and (self._beating is None or not self._beating.is_alive()):
                arguments = (weakref.ref(self), float(self.heartbeat_interval))
                self._beating = threading.Thread(target=beat, args=arguments, daemon=True, name="moeopt heartbeats")
                self._beating.start()

    # What a trial writes.

    def write_trial(
        self, trial_id: int, attrs: Attrs, user_attrs: Attrs, params: Params, unless: Taken | None = None
    ) -> bool:
        """`rows.write`, waited for; False where `unless` kept it from writing."""
        since = self._owned[trial_id].result.since if trial_id in self._owned else None
        write = functools.partial(rows.write, self, trial_id, attrs, user_attrs, params, unless, since)
        if self._write(trial_id, write, attrs, user_attrs, params=params) is False:
            return False
        origin = attrs.get(genome.ORIGIN)
        if isinstance(origin, dict) and trial_id in self._owned:
            self._owned[trial_id].result.plan = origin.get("plan")
        return True

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.write_trial(trial_id, {}, {key: value}, {})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.write_trial(trial_id, {key: value}, {}, {})

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        write = RDBStorage.set_trial_intermediate_value
        self._write_by_optuna(write, trial_id, step, intermediate_value, steps=[step])

    def _set_trial_param(self, trial_id: int, param_name: str, *arguments: Any) -> None:
        self._write_by_optuna(RDBStorage._set_trial_param, trial_id, param_name, *arguments, params=[param_name])

    def _write_by_optuna(
        self, write: Callable[..., Any], trial_id: int, *arguments: Any, **written: Iterable[Any]
    ) -> None:
        def call() -> None:
            owned = self._owned.get(trial_id)
            if owned is not None and not rows.still_there(self, {trial_id: owned.result}):
                raise KeyError(trial_id)
            write(self, trial_id, *arguments)

        self._write(trial_id, call, {}, {}, **written)

    def _write(
        self, trial_id: int, call: Callable[[], Any], attrs: Attrs, user_attrs: Attrs, **others: Iterable[Any]
    ) -> Any:
        """A write to a trial that this process runs is kept while the database is away, and once it was taken over."""
        owned = self._owned.get(trial_id)
        if owned is None:
            return self.waiting(call)
        result, on_disk = owned.result, False

        def keep() -> None:
            nonlocal on_disk
            on_disk = True
            result.attrs.update(attrs)
            result.user_attrs.update(user_attrs)
            result.save()

        try:
            done = self.waiting(call, keep)
        except UpdateFinishedTrialError:
            keep()
            return None
        except KeyError:
            self.check_there(owned.study_id)
            raise self.set_back() from None
        except StorageError:
            result.user_attrs[genome.INTERRUPTED] = True  # it is not the trial that failed
            result.save()
            raise
        if done is not False:
            for kind, names in {"attrs": attrs, "user_attrs": user_attrs, **others}.items():
                owned.written.setdefault(kind, set()).update(names)
        if on_disk:
            for pending, stored in ((result.attrs, attrs), (result.user_attrs, user_attrs)):
                for key in stored:
                    pending.pop(key, None)
            result.remove()
        return done

    def hold(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Keep a trial's result on the disk until it is told: the process may be killed before."""
        if owned := self._owned.get(trial_id):
            owned.result.state = state.name
            owned.result.values = None if values is None else [float(value) for value in values]
            owned.result.save()

    def _end(self, trial_id: int, state: TrialState, values: list[float] | None) -> bool:
        if trial_id in self._inherited:
            number = self._inherited[trial_id]
            raise StorageError(f"trial {number} is ended by the process that runs it, not by one forked from that")
        owned = self._owned.get(trial_id)
        if owned is None:
            return self.waiting(lambda: RDBStorage.set_trial_state_values(self, trial_id, state, values))
        result = owned.result
        if state != TrialState.FAIL:
            result.user_attrs.pop(genome.INTERRUPTED, None)
        end = functools.partial(ends.end, self, owned.study_id, trial_id, result, state, values, owned.written)
        if not self.waiting(end, lambda: self.hold(trial_id, state, values)):
            result.state, result.values = state.name, values
            taker = self._deliver(owned.study_id, result)
            where = "was not needed" if taker is None else f"went to trial {taker}, which repeats it"
            logger.warning("trial %d was taken over while its worker was away; its result %s", result.number, where)
        result.remove()
        del self._owned[trial_id]
        self._ended.add(trial_id)
        return True

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As of `RDBStorage`; Optuna reads a trial once more when it has ended it.

        Raises:
            SetBack: when the trial is one that this process ended, and is not there any more.
        """
        try:
            return self.waiting(lambda: RDBStorage.get_trial(self, trial_id))
        except KeyError:
            if trial_id in self._ended:
                raise self.set_back() from None
            raise

    def _build_frozen_trial_from_trial_model(self, trial: Any) -> FrozenTrial:
        frozen = super()._build_frozen_trial_from_trial_model(trial)
        owned = self._owned.get(frozen._trial_id)
        if owned is not None and not owned.result.is_of(trial._datetime_start_utc):
            raise self.set_back()
        if owned is not None and frozen.state.is_finished():
            frozen.state, frozen.values, frozen.datetime_complete = TrialState.RUNNING, None, None
        return frozen

    # Dead workers.

    def record_heartbeat(self, trial_id: int) -> None:
        if trial_id not in self._owned:
            self.waiting(lambda: RDBStorage.record_heartbeat(self, trial_id))

    def beat(self) -> None:
        """Beat for the trials that this process runs, and look at others' beats; not waited for."""
        if owned := {**self._owned}:
            rows.beat(self, [*owned])
            for study_id in {trial.study_id for trial in owned.values()}:
                self._look(study_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Take over what is stale; there is nothing left to do for Optuna's `fail_stale_trials`."""
        self.recover(study_id)
        self.take_over_stale(study_id)
        return []

    def take_over_stale(self, study_id: int) -> None:
        """Take over the running trials that were seen without a heartbeat for longer than the grace period."""
        if self.heartbeat_interval is None:
            return
        self.waiting(lambda: self._look(study_id))
        grace = 2 * self.heartbeat_interval if self.grace_period is None else self.grace_period
        if time.monotonic() - self.waiting.returned < 2 * self.heartbeat_interval + LONGEST_DELAY:
            return  # after an outage, others shall be heard of first
        for trial_id, heard in self._watches[study_id].silent(grace).items():
            if trial_id not in self._owned:
                self.take_over(study_id, trial_id, f"its worker was not heard of for {grace} s", heard)

    def _look(self, study_id: int) -> None:
        """Note the heartbeats of a study's running trials."""
        assert self.heartbeat_interval is not None
        watch = self._watches.setdefault(study_id, Watch(2 * self.heartbeat_interval))
        watch.look(rows.heartbeats(self, study_id))

    def take_over(self, study_id: int, trial_id: int, failure: str, heard: datetime | None = None) -> int | None:
        """`ends.take_over`, waited for."""
        call = functools.partial(ends.take_over, self, study_id, trial_id, failure, retries=self.retries, heard=heard)
        return self.waiting(call)

    def recover(self, study_id: int, other_hosts: bool = False) -> None:
        """Store what dead workers of this host, or also of others, kept of a study on this disk.

        An evaluated trial that was taken over is none of its worker's any more, wherever that is.
        """

        def is_left(result: Result) -> bool:
            return process.is_dead(result.worker, other_hosts) or (
                result.state is not None
                and len(self.waiting(lambda: rows.repeating(self, study_id, result.number))) > 1
            )

        for result in spool.results(self.identity(study_id)):
            if is_left(result):
                number = self._deliver(study_id, result)
                result.remove()
                if number is not None:
                    logger.warning("stored in trial %d what a dead worker had kept of trial %d", number, result.number)

    def _deliver(self, study_id: int, result: Result) -> int | None:
        return self.waiting(lambda: ends.deliver(self, study_id, result))

    # A database that was set back, or a study that was deleted.

    def set_back(self) -> SetBack:
        """The error; a trial that Optuna ends because of it is to be run again."""
        for owned in [*self._owned.values()]:
            owned.result.user_attrs[genome.INTERRUPTED] = True
        return SetBack()

    def check_there(self, study_id: int) -> None:
        """Raise StudyIsGone when a study was deleted since this process knows it; nothing of it is kept on the disk.

        Raise SetBack when a trial is not there that this thread runs.
        """
        if study_id not in self._identities:
            return

        def check() -> None:
            with rows.transaction(self) as session:
                rows.check_there(session, study_id, self._identities[study_id])

        try:
            self.waiting(check)
        except StudyIsGone:
            for owned in [*self._owned.values()]:
                if owned.study_id == study_id:
                    owned.result.remove()
            raise
        mine = self.run_here(study_id)
        if self.waiting(lambda: rows.still_there(self, mine)) != mine.keys():
            raise self.set_back()

    def start_over(self, study: optuna.Study) -> None:
        """After the database was set back: read a study anew, queue what this thread runs, forget what is not there."""
        logger.warning("%s was set back to an earlier state; the search goes on from there", self.waiting.place)
        study._storage = optuna.storages.get_storage(self)  # whose cache holds nothing yet
        mine = self.run_here(study._study_id)
        there = self.waiting(lambda: rows.still_there(self, mine))
        for trial_id, result in mine.items():
            self._owned.pop(trial_id, None)
            result.remove()
            if trial_id in there:
                self.take_over(study._study_id, trial_id, "the database was set back while it ran")
