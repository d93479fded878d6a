"""Optuna's SQL storage for databases that go away: every call waits, and one whose answer was lost is not done twice.

Everything here and in `resilient` that is private to Optuna is what its `_CachedStorage` and `Study.optimize` call on a
storage; `internals` checks that it is there.
"""

from __future__ import annotations

import functools
import uuid
import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from moeopt.study.storage import forks, links, rows
from moeopt.study.storage.failures import SetBack, StudyIsGone
from moeopt.study.storage.last_ends import LastEnds
from moeopt.study.storage.outages import Outages
from moeopt.study.storage.urls import hidden

if TYPE_CHECKING:
    from optuna.study import StudyDirection
    from sqlalchemy import Engine


def _repeated(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `RDBStorage` that may be done twice, waited for."""

    @functools.wraps(call)
    def waited_for(self: WaitingStorage, *arguments: Any, **options: Any) -> Any:
        return self.waiting(lambda: call(self, *arguments, **options))

    return waited_for


class WaitingStorage(RDBStorage):
    """An `RDBStorage` for the schema of Optuna 5 on SQLite, PostgreSQL, MySQL or MariaDB that waits for its database.

    Args:
        url, engine_kwargs: as for `RDBStorage`.
        heartbeat_interval, grace_period: as for `RDBStorage`, in seconds; without an interval no trial is stale.
        patience: seconds to wait for a database that went away.
    """

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any] | None = None,
        *,
        heartbeat_interval: int | None,
        grace_period: int | None,
        patience: float,
    ) -> None:
        self.patience = patience
        self._identities: dict[int, str] = {}
        self._tables: Any = None
        self._begin(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of heartbeats
            super().__init__(url, engine_kwargs, heartbeat_interval=heartbeat_interval, grace_period=grace_period)
        links.keep_file(self.engine)

    def _begin(self, url: str) -> None:
        """What a process has of its own; one that is forked begins anew."""
        self.waiting = Outages(hidden(url), self.patience, url, self._is_missing, lambda: self.engine.dispose())
        self._last_ends = LastEnds()

    @property
    def engine(self) -> Engine:
        engine: Engine = self.__dict__["engine"]
        return engine

    @engine.setter
    def engine(self, engine: Engine) -> None:  # which Optuna makes, and uses at once
        links.limit(engine)
        self.__dict__["engine"] = engine
        forks.follow(self)

    def forked(self) -> None:
        """Called in a process that was forked from the one that opened this storage."""
        self._begin(self.url)
        forks.connect_anew(self)

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that open such a storage again."""
        return {
            "heartbeat_interval": self.heartbeat_interval, "grace_period": self.grace_period, "patience": self.patience,
        }  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), self.url, self.engine_kwargs, **self.settings()), ()

    set_study_user_attr = _repeated(RDBStorage.set_study_user_attr)
    set_study_system_attr = _repeated(RDBStorage.set_study_system_attr)
    get_study_id_from_name = _repeated(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _repeated(RDBStorage.get_study_name_from_id)
    get_study_directions = _repeated(RDBStorage.get_study_directions)
    get_study_user_attrs = _repeated(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _repeated(RDBStorage.get_study_system_attrs)
    get_all_studies = _repeated(RDBStorage.get_all_studies)
    get_trial_param = _repeated(RDBStorage.get_trial_param)
    get_trial_user_attrs = _repeated(RDBStorage.get_trial_user_attrs)
    get_trial_system_attrs = _repeated(RDBStorage.get_trial_system_attrs)
    get_trial_id_from_study_id_trial_number = _repeated(RDBStorage.get_trial_id_from_study_id_trial_number)
    _get_best_trial_id = _repeated(RDBStorage._get_best_trial_id)

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
        wanted = included_trial_ids | (self._last_ends.trial_ids(study_id) if again else set())

        def read() -> list[FrozenTrial]:
            if trial_id_greater_than < 0 and self.engine.name != "sqlite":
                # All of a large study takes longer to build than the server leaves a transaction idle.
                self.scoped_session().connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            return RDBStorage._get_trials(self, study_id, states, wanted, trial_id_greater_than)

        trials = self.waiting(read)
        if states is None:
            lost = again and not wanted <= {trial._trial_id for trial in trials}
            if lost or not self._last_ends.agree(study_id, trials, with_last=again):
                raise self.set_back()
        return trials

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name

        def create() -> int:
            return RDBStorage.create_new_study(self, directions, name)

        def create_again() -> int:
            try:
                return create()
            except DuplicatedStudyError:
                study_id = RDBStorage.get_study_id_from_name(self, name)
                if RDBStorage.get_all_trials(self, study_id):
                    raise
                return study_id  # the first try made it, and the answer was lost

        return self.waiting(create, again=create_again)

    def delete_study(self, study_id: int) -> None:
        def delete_again() -> None:
            with suppress(KeyError):  # the first try deleted it
                RDBStorage.delete_study(self, study_id)

        self.waiting(lambda: RDBStorage.delete_study(self, study_id), again=delete_again)

    def study_names(self) -> list[str]:
        """Names of all studies; a damaged one does not hide the others, as Optuna reads the attributes of all."""
        return self.waiting(lambda: rows.study_names(self))

    def identity(self, study_id: int) -> str:
        """The random name by which results on a disk know a study."""
        if study_id not in self._identities:
            self._identities[study_id] = self.waiting(lambda: rows.identity(self, study_id))
            self._tables = self.waiting(lambda: rows.tables(self))
        return self._identities[study_id]

    def set_back(self) -> SetBack:
        """The error that the database was set back."""
        return SetBack()

    def _is_missing(self, shaken: bool) -> bool:
        """Whether a study is not there that this process knows, other than by being deleted.

        Args:
            shaken: a connection was lost since it was seen; else it was deleted, unless tables were made anew.
        """
        if not shaken and self._tables in (None, rows.tables(self)):
            return False
        try:
            with rows.transaction(self) as session:
                for study_id, identity in self._identities.items():
                    rows.check_there(session, study_id, identity)
        except StudyIsGone:
            return True
        return False
