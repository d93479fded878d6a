"""Optuna's SQL storage for workers that die and databases that go away.

* A call waits while the database is away (`Waiting`), and one whose answer was lost is not done twice.
* What is evaluated is kept on the local disk until it is stored (`Result`).
* A trial gets its first heartbeat with its claim, and one thread beats for all trials that this process runs, also for
  those of `study.ask`. A dead worker's trial is failed and repeated in one transaction (`rows.take_over`).
* A trial that was taken over while its worker lived stays running for that worker until it tells; then its result goes
  to the trial that repeats it, unless that has ended.

Everything here that is private to Optuna is what its `_CachedStorage` and `Study.optimize` call on a storage.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import get_all_study_names
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import StorageError
from moeopt.study.storage import forks, links, presence, rows, spool, transaction
from moeopt.study.storage.outages import LONGEST_DELAY, Waiting
from moeopt.study.storage.spool import Result
from moeopt.study.storage.staleness import Watch, beat
from moeopt.study.storage.urls import hidden
from moeopt.trials import genome, process

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import StudyDirection
    from sqlalchemy import Engine

logger = logging.getLogger("moeopt.study.storage")

REPEATED = (
    "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name", "get_study_name_from_id",
    "get_study_directions", "get_study_user_attrs", "get_study_system_attrs", "get_all_studies", "get_trial_param",
    "get_trial_user_attrs", "get_trial_system_attrs", "get_trial_id_from_study_id_trial_number", "_get_best_trial_id",
)  # fmt: skip
"""Calls that may be done twice."""


@dataclass
class _Owned:
    """A trial that this process runs, the thread that asked for it, and names of what is written of it, by kind."""

    study_id: int
    thread: int
    result: Result
    written: dict[str, set[Any]]


class ResilientStorage(RDBStorage):
    """An `RDBStorage` for the schema of Optuna 5 on SQLite, PostgreSQL, MySQL or MariaDB.

    Args:
        url, engine_kwargs: as for `RDBStorage`.
        heartbeat_interval, grace_period: as for `RDBStorage`, in seconds; without an interval no trial is stale.
        patience: seconds to wait for a database that went away.
        retries: how often a trial whose worker died is tried again.
    """

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any] | None = None,
        *,
        heartbeat_interval: int | None,
        grace_period: int | None,
        patience: float,
        retries: int,
    ) -> None:
        self._patience, self.retries = patience, retries
        self._begin(url)
        super().__init__(url, engine_kwargs, heartbeat_interval=heartbeat_interval, grace_period=grace_period)
        links.keep_file(self.engine)

    def _begin(self, url: str) -> None:
        missing, renew = functools.partial(presence.is_missing, self), lambda: self.engine.dispose()
        self.waiting = Waiting(hidden(url), self._patience, url, missing, renew)
        self._owned: dict[int, _Owned] = {}
        self._inherited: dict[int, int] = {}
        self._ended: set[int] = set()
        self._identities: dict[int, str] = {}
        self._made: Any = None
        self._ends = presence.Ends()
        self._watches: dict[int, Watch] = {}
        self._local = threading.local()
        self._beating: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        engine: Engine = self.__dict__["engine"]
        return engine

    @engine.setter
    def engine(self, engine: Engine) -> None:  # which Optuna makes, and uses at once, also of a pickle
        links.limit(engine)
        self.__dict__["engine"] = engine
        forks.follow(self)

    def forked(self) -> None:
        """In a process that was forked from the one that opened this storage; that one's trials are not this one's."""
        inherited = {trial_id: owned.result.number for trial_id, owned in self._owned.items()} | self._inherited
        identities, made = self._identities, self._made
        self._begin(self.url)
        self._identities, self._made, self._inherited = identities, made, inherited
        forks.connect_anew(self)

    def __getstate__(self) -> dict[Any, Any]:
        begun = (
            "waiting", "_owned", "_inherited", "_ended", "_identities", "_made", "_ends", "_watches", "_local",
            "_beating", "_lock",
        )  # fmt: skip
        return {name: value for name, value in super().__getstate__().items() if name not in begun}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self._patience = state["_patience"]
        self._begin(state["url"])
        super().__setstate__(state)
        links.keep_file(self.engine)

    # Studies.

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """What Optuna has cached is right unless the database was set back, which undid what happened last: that is
        looked at, too.

        Raises:
            SetBack: when trials that were to be read, or the last that ended, are not there any more, or not as then.
        """
        again = trial_id_greater_than >= 0 and states is None
        wanted = included_trial_ids | (self._ends.of(study_id) if again else set())

        def read() -> list[FrozenTrial]:
            if trial_id_greater_than < 0 and self.engine.name != "sqlite":
                # All of a large study takes longer to build than the server leaves a transaction idle.
                self.scoped_session().connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            return RDBStorage._get_trials(self, study_id, states, wanted, trial_id_greater_than)

        trials = self.waiting(read)
        if states is None:
            lost = again and not wanted <= {trial._trial_id for trial in trials}
            if lost or not self._ends.agree(study_id, trials, with_last=again):
                raise presence.set_back(self)
        return trials

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name
        tries: list[None] = []

        def create() -> int:
            tries.append(None)
            try:
                return RDBStorage.create_new_study(self, directions, name)
            except DuplicatedStudyError:
                study_id = RDBStorage.get_study_id_from_name(self, name)
                if len(tries) == 1 or RDBStorage.get_all_trials(self, study_id):
                    raise
                return study_id  # the first try made it, and the answer was lost

        return self.waiting(create)

    def delete_study(self, study_id: int) -> None:
        tries: list[None] = []

        def delete() -> None:
            tries.append(None)
            try:
                RDBStorage.delete_study(self, study_id)
            except KeyError:
                if len(tries) == 1:
                    raise

        self.waiting(delete)

    def identity(self, study_id: int) -> str:
        """The random name by which results on a disk know a study."""
        if study_id not in self._identities:
            self._identities[study_id] = self.waiting(lambda: rows.identity(self, study_id))
            self._made = self.waiting(lambda: rows.made(self))
        return self._identities[study_id]

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
        if slots is None:
            return None
        return slots + len(self.run_here(study_id))

    def run_here(self, study_id: int) -> dict[int, Result]:
        """What is known of the trials that this thread runs."""
        here = threading.get_ident()
        trials = [*self._owned.items()]
        return {key: owned.result for key, owned in trials if owned.thread == here and owned.study_id == study_id}

    def claimable(self, study_id: int) -> bool:
        """Whether there is a trial to start: a slot that was not yet, or one to be repeated."""
        slots = self._slots(study_id)
        return self.waiting(lambda: rows.claimable(self, study_id, slots))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        study = study_id, self.identity(study_id)
        claim, slots = uuid.uuid4().hex, self._slots(study_id)
        tries: list[None] = []

        def create() -> FrozenTrial:
            tries.append(None)
            return rows.create(self, study, template_trial, claim, slots, again=len(tries) > 1)

        trial = self.waiting(create)
        if trial.state == TrialState.RUNNING:
            self._own(study_id, trial)
        return trial

    def create_once(self, study_id: int, template: FrozenTrial, user_attrs: Mapping[str, Any]) -> bool:
        """`rows.create_once`, waited for."""
        study = study_id, self.identity(study_id)
        return self.waiting(lambda: rows.create_once(self, study, template, user_attrs))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state.is_finished():
            return self._end(trial_id, state, None if values is None else [float(value) for value in values])
        if state != TrialState.RUNNING:
            return self.waiting(lambda: RDBStorage.set_trial_state_values(self, trial_id, state, values))
        study_id = self.waiting(lambda: rows.study_of(self, trial_id))
        study = study_id, self.identity(study_id)
        claim, slots = uuid.uuid4().hex, self._slots(study_id)
        trial = self.waiting(lambda: rows.start(self, study, trial_id, claim, slots))
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
        self,
        trial_id: int,
        attrs: Mapping[str, Any],
        user_attrs: Mapping[str, Any],
        params: Mapping[str, tuple[Any, BaseDistribution]],
        unless: transaction.Taken | None = None,
    ) -> bool:
        """`transaction.write`, waited for; False where `unless` kept it from writing."""
        since = self._owned[trial_id].result.since if trial_id in self._owned else None
        write = functools.partial(transaction.write, self, trial_id, attrs, user_attrs, params, unless, since)
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
        self,
        trial_id: int,
        call: Callable[[], Any],
        attrs: Mapping[str, Any],
        user_attrs: Mapping[str, Any],
        **others: Iterable[Any],
    ) -> Any:
        """A write to a trial that this process runs is kept while the database is away, and once it was taken over."""
        owned = self._owned.get(trial_id)
        if owned is None:
            return self.waiting(call)
        result, kept = owned.result, False

        def keep() -> None:
            nonlocal kept
            kept = True
            result.attrs.update(attrs)
            result.user_attrs.update(user_attrs)
            result.save()

        try:
            done = self.waiting(call, keep)
        except UpdateFinishedTrialError:
            keep()
            return None
        except KeyError:
            presence.check_there(self, owned.study_id)
            raise presence.set_back(self) from None
        except StorageError:
            result.user_attrs[genome.INTERRUPTED] = True  # it is not the trial that failed
            result.save()
            raise
        if done is not False:
            for kind, names in {"attrs": attrs, "user_attrs": user_attrs, **others}.items():
                owned.written.setdefault(kind, set()).update(names)
        if kept:
            for known, written in ((result.attrs, attrs), (result.user_attrs, user_attrs)):
                for key in written:
                    known.pop(key, None)
            result.remove()
        return done

    def hold(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Keep a trial's result on the disk until it is told: the process may be killed before."""
        if owned := self._owned.get(trial_id):
            owned.result.state = state.name
            owned.result.values = None if values is None else [float(value) for value in values]
            owned.result.save()

    def _end(self, trial_id: int, state: TrialState, values: list[float] | None) -> bool:
        owned = self._owned.get(trial_id)
        if trial_id in self._inherited:
            number = self._inherited[trial_id]
            raise StorageError(f"trial {number} is ended by the process that runs it, not by one forked from that")
        if owned is None:
            return self.waiting(lambda: RDBStorage.set_trial_state_values(self, trial_id, state, values))
        result = owned.result
        if state != TrialState.FAIL:
            result.user_attrs.pop(genome.INTERRUPTED, None)
        end = functools.partial(rows.end, self, owned.study_id, trial_id, result, state, values, owned.written)
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
                raise presence.set_back(self) from None
            raise

    def _build_frozen_trial_from_trial_model(self, trial: Any) -> FrozenTrial:
        frozen = super()._build_frozen_trial_from_trial_model(trial)
        owned = self._owned.get(frozen._trial_id)
        if owned is not None and not owned.result.is_of(trial._datetime_start_utc):
            raise presence.set_back(self)
        if owned is not None and frozen.state.is_finished():
            frozen.state, frozen.values, frozen.datetime_complete = TrialState.RUNNING, None, None
        return frozen

    # Dead workers.

    def record_heartbeat(self, trial_id: int) -> None:
        if trial_id not in self._owned:
            self.waiting(lambda: RDBStorage.record_heartbeat(self, trial_id))

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Take over what is stale; there is nothing left to do for Optuna's `fail_stale_trials`."""
        self.recover(study_id)
        self.take_over_stale(study_id)
        return []

    def take_over_stale(self, study_id: int) -> None:
        """Take over the running trials that were seen without a heartbeat for longer than the grace period."""
        if self.heartbeat_interval is None:
            return
        self.waiting(lambda: self.look(study_id))
        grace = 2 * self.heartbeat_interval if self.grace_period is None else self.grace_period
        if time.monotonic() - self.waiting.returned < 2 * self.heartbeat_interval + LONGEST_DELAY:
            return  # after an outage, others shall be heard of first
        for trial_id, heard in self._watches[study_id].silent(grace).items():
            if trial_id not in self._owned:
                self.take_over(study_id, trial_id, f"its worker was not heard of for {grace} s", heard)

    def look(self, study_id: int) -> None:
        """Note the heartbeats of a study's running trials."""
        assert self.heartbeat_interval is not None
        watch = self._watches.setdefault(study_id, Watch(2 * self.heartbeat_interval))
        watch.look(rows.heartbeats(self, study_id))

    def take_over(self, study_id: int, trial_id: int, failure: str, heard: datetime | None = None) -> int | None:
        """`rows.take_over`, waited for."""
        call = functools.partial(rows.take_over, self, study_id, trial_id, failure, retries=self.retries, heard=heard)
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
        return self.waiting(lambda: rows.deliver(self, study_id, result))


def study_names(storage: BaseStorage) -> list[str]:
    """Names of all studies of a storage. In a `ResilientStorage`, also one behind Optuna's cache, a damaged study does
    not hide the others: Optuna reads the attributes of all to tell their names.
    """
    database = getattr(storage, "_backend", storage)
    if not isinstance(database, ResilientStorage):
        return get_all_study_names(storage)
    return database.waiting(lambda: rows.study_names(database))


def _repeated(name: str) -> Callable[..., Any]:
    call = getattr(RDBStorage, name)

    @functools.wraps(call)
    def waited_for(self: ResilientStorage, *arguments: Any, **options: Any) -> Any:
        return self.waiting(lambda: call(self, *arguments, **options))

    return waited_for


for _name in REPEATED:
    setattr(ResilientStorage, _name, _repeated(_name))
