"""Opening a storage by its URL, with what can be wrong said before any work."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback

from moeopt.errors import MoeoptError, StorageError, got
from moeopt.study.storage import internals, links
from moeopt.study.storage.outages import Outages
from moeopt.study.storage.urls import hidden, readable_errors, reason

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine import URL

PATIENCE = 600.0
"""Seconds to wait for a database that went away."""
CREATING = 5
"""Tries to create the tables, which other workers may create at the same time."""


def open_storage(
    url: str,
    *,
    create: bool = True,
    heartbeat_interval: int | None = 60,
    grace_period: int = 180,
    patience: float | None = None,
    retries: int = 3,
) -> BaseStorage:
    """An Optuna storage for an SQLAlchemy URL, checked: reachable, writable, and Optuna's own or empty.

    On SQLite, PostgreSQL, MySQL and MariaDB it is a `ResilientStorage`: workers may be killed, and the database may go
    away for as long as `patience`. Any other database gets Optuna's own `RDBStorage` with its heartbeats and retries,
    and so does an Optuna whose private parts are not as in Optuna 5.0.

    Args:
        create: whether a missing SQLite file may be created.
        heartbeat_interval: seconds between two signs of life of a running trial; None: none are given.
        grace_period: seconds without one after which a trial's worker counts as dead, and the trial is tried again.
            Choose it longer than an outage that you expect.
        patience: seconds to wait for a database that went away, also now. None: PATIENCE once it is open, while a
            database that cannot be reached now is an error at once.
        retries: how often a trial whose worker died is tried again; then it has failed, with the reason as its user
            attribute ``failure``.

    Warns:
        UserWarning: once, when it is Optuna's own: what is weaker then.

    Raises:
        StorageError: saying which of these fails. Passwords never appear in it.
    """
    _check(heartbeat_interval, grace_period, patience, retries)
    parsed = _parsed(url)
    backend = parsed.get_backend_name()
    if not create and is_new(url):
        raise StorageError(f"no database at {hidden(url)}")
    beats: dict[str, Any] = {
        "heartbeat_interval": None if in_memory(url) else heartbeat_interval,
        "grace_period": grace_period,
    }
    lacking = internals.missing() if backend in internals.DIALECTS else f"the database is {backend}"

    def opened() -> BaseStorage:
        _check_database(parsed, url)
        options = links.options(parsed)
        if lacking is not None:
            return _optunas_own(lacking, url, options, beats, retries)
        from moeopt.study.storage.resilient import ResilientStorage

        return ResilientStorage(
            url, options, **beats, patience=PATIENCE if patience is None else patience, retries=retries
        )

    with readable_errors(url):
        try:
            if patience is None:
                return _with_tables(opened)
            return Outages(hidden(url), patience, url)(lambda: _with_tables(opened))
        except (TypeError, ValueError, LookupError) as error:  # a driver's, of an option in the URL
            if isinstance(error, MoeoptError):
                raise
            raise StorageError(f"cannot use the storage {hidden(url)}: {reason(error, url)}") from None


def _optunas_own(lacking: str, url: str, options: dict[str, Any], beats: dict[str, Any], retries: int) -> BaseStorage:
    """Optuna's storage with heartbeats and retries, where what a `ResilientStorage` builds on is missing."""
    _tell_of_weaker_promises(lacking)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        retry = RetryHeartbeatStaleTrialCallback(max_retry=retries)
        engine = {**options, "pool_pre_ping": True}
        return RDBStorage(url, engine_kwargs=engine, heartbeat_stale_trial_callback=retry, **beats)


@cache
def _tell_of_weaker_promises(lacking: str) -> None:
    warnings.warn(
        f"{lacking}, so that the storage is Optuna's own. Trials of dead workers are tried again, but several workers "
        "may run a few trials more than asked for, and one plan twice; and an outage of the database is not waited "
        "for: it ends the worker, and the trial that ran is run again",
        stacklevel=4,
    )


def study_names(storage: BaseStorage) -> list[str]:
    """Names of all studies of a storage; in one of moeopt's, a damaged study does not hide the others."""
    database = getattr(storage, "_backend", storage)
    names = getattr(database, "study_names", None)
    return optuna.study.get_all_study_names(storage) if names is None else names()  # type: ignore[no-any-return]


def check_storage(storage: object) -> None:
    """Raise StorageError for what is neither a text nor an Optuna storage."""
    if isinstance(storage, os.PathLike):
        raise StorageError(f"a storage is named by its URL, 'sqlite:///{os.fspath(storage)!s}', got {storage!r}")
    if not isinstance(storage, (str, BaseStorage)):
        raise StorageError(
            f"storage must be an SQLAlchemy URL such as sqlite:///moeopt.db, or an Optuna storage, got {got(storage)}"
        )


def in_memory(url: str) -> bool:
    """Whether a URL names a database in memory, which ends with its process."""
    parsed = _parsed(url)
    name = parsed.database or ""
    memory = name in ("", ":memory:", "file:") or name.startswith("file::memory:")
    return parsed.get_backend_name() == "sqlite" and (memory or parsed.query.get("mode") == "memory")


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database; None for another database, or one in memory.

    Raises:
        StorageError: when it is no URL.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite" or in_memory(url):
        return None
    return Path(re.sub(r"^file:(//(localhost)?(?=/))?", "", str(parsed.database)))


def is_new(url: str) -> bool:
    """Whether a URL names an SQLite file that is not there yet; it is not made, but its folder is checked.

    Raises:
        StorageError: when it is no URL, or the folder does not exist or cannot be written.
    """
    file = sqlite_file(url)
    if file is None:
        return False
    if not file.parent.is_dir():
        raise StorageError(f"the folder of {hidden(url)} does not exist: {str(file.parent)!r}")
    if file.exists():
        return False
    if not os.access(file.parent, os.W_OK):
        raise StorageError(f"the folder of {hidden(url)} cannot be written: {str(file.parent)!r}")
    return True


def _parsed(url: str) -> URL:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        parsed = make_url(url)
        parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise StorageError(
            "storage must be an SQLAlchemy URL such as sqlite:///moeopt.db or postgresql+psycopg://user@host/name, "
            f"got {hidden(url)!r}"
        ) from None
    return parsed


def _check(heartbeat_interval: Any, grace_period: Any, patience: Any, retries: Any) -> None:
    counts = {"grace_period": (grace_period, 1), "retries": (retries, 0)}
    if heartbeat_interval is not None:
        counts["heartbeat_interval"] = (heartbeat_interval, 1)
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise StorageError(f"{name} must be an integer of at least {least}, got {value!r}")
    if heartbeat_interval is not None and grace_period <= heartbeat_interval:
        raise StorageError(
            f"grace_period must be longer than heartbeat_interval, {heartbeat_interval} s, got {grace_period} s"
        )
    if patience is not None and not 0 <= patience < float("inf"):
        raise StorageError(f"patience must be a number of seconds of at least 0, got {patience!r}")


def _with_tables(opened: Callable[[], BaseStorage]) -> BaseStorage:
    """The storage, also where other workers create its tables at the same time."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(CREATING):
        try:
            return opened()
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            text = str(error.orig).lower()
            if attempt == CREATING - 1 or not ("already exists" in text or "duplicate" in text):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def _check_database(parsed: URL, url: str) -> None:
    """Raise StorageError unless the database is Optuna's or empty, and a SQLite file can be written."""
    from sqlalchemy import create_engine, inspect

    sqlite = parsed.get_backend_name() == "sqlite"
    engine = create_engine(parsed, **links.options(parsed))
    links.limit(engine)
    try:
        tables = set(inspect(engine).get_table_names())
        ours = {"studies", "trials", "version_info"} <= tables or tables <= internals.TABLES
        if not ours and (sqlite or {"studies", "trials"} & tables):
            raise StorageError(f"{hidden(url)} is a database of something else: it has tables {sorted(tables)[:5]}")
        if sqlite:
            _check_writable(engine)
    finally:
        engine.dispose()


def _check_writable(engine: Engine) -> None:
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        raw.isolation_level = None
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("CREATE TABLE moeopt_write_check (x)")
        raw.execute("ROLLBACK")
