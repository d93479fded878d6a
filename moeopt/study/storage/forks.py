"""A process that is forked from one with an open storage: connections, locks and trials there are the other's."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

from moeopt.errors import StorageError

_open: weakref.WeakSet[Any] = weakref.WeakSet()
_left: list[Any] = []
"""Pools of the process that this one was forked from: closing their connections would end that one's sessions."""


def follow(storage: Any) -> None:
    """Let a storage's `forked` be called in every process that is forked from this one."""
    _open.add(storage)


def connect_anew(storage: Any) -> None:
    """In a forked process: give an `RDBStorage` connections, sessions and, behind Optuna's cache, a lock of its own.

    SQLite keeps the locks of a process in its memory, which was copied: with one that another thread held then, the
    file cannot be used here, and whoever tries to is told so.
    """
    from sqlalchemy import event
    from sqlalchemy.orm import scoped_session, sessionmaker
    from sqlalchemy.pool import QueuePool

    engine = storage.engine
    if isinstance(engine.pool, QueuePool):  # any other is of a database in memory, which was copied
        if engine.name != "sqlite":
            _left.append(engine.pool)
        elif engine.pool.checkedout():
            _left.append(engine.pool)

            @event.listens_for(engine, "do_connect")
            def refuse(*_: Any) -> None:
                raise StorageError(
                    "this process was forked while another thread used the SQLite database, which nothing can open here"
                    " any more; start processes that use the study by 'spawn' or 'forkserver'"
                )

        engine.dispose(close=engine.pool not in _left)
    storage.scoped_session = scoped_session(sessionmaker(bind=engine))
    for holder in gc.get_referrers(storage):
        attributes = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        if {"_backend", "_studies", "_lock"} <= attributes.keys():  # Optuna's `_CachedStorage`
            attributes["_lock"] = threading.Lock()  # which a thread may have held that is not here


def _forked() -> None:
    for storage in [*_open]:
        storage.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
