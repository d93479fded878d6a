"""Waiting for a database that went away, or that another worker locks: which errors mean that, when to try again."""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moeopt.errors import StorageError
from moeopt.study.storage import links
from moeopt.study.storage.failures import StudyIsGone
from moeopt.study.storage.urls import reason

T = TypeVar("T")
logger = logging.getLogger("moeopt.study.storage")

FIRST_DELAY, LONGEST_DELAY = 0.05, 5.0
"""Seconds between two tries, doubled from try to try."""
SLICE = 0.2
"""Seconds after which a wait sees `stopped`: a signal handler can set no event that the same thread waits for."""
SILENT = 1.0
"""Seconds of an outage that nobody is told of: deadlocks, a connection that the server closed."""
MYSQL = {
    1040, 1053, 1158, 1159, 1160, 1161, 1203, 1205, 1213, 1290, 1317, 1927, 2002, 2003, 2006, 2013, 2055, 3024, 4031,
}  # fmt: skip
"""Numbers of MySQL and MariaDB that will pass: too many connections, shutdown, KILL, network, lock waits."""
POSTGRES = ("08", "57", "53300", "40001", "40P01", "55P03", "25006", "25P02", "25P03", "25P04")
"""Beginnings of PostgreSQL's codes that will pass: connection, shutdown, cancel, too many clients, locks, standby,
transactions in which a statement failed before (Optuna then tries another one), and those that the server ended, as
their worker was frozen."""
GONE = (1046, 1049, 1146, 1412, 1932, "3D000", "42P01")
"""What says that tables or the whole database are not there, or others than before."""
GONE_WORDS = re.compile(
    r'database ".*" does not exist|no such table|unable to open database file'
    r"|could not open relation|cache lookup failed|cached plan must not change"
)
REFUSED = ("authentication failed", "does not exist", "no pg_hba.conf", "unsupported", "permission denied")
"""What a server says that is there, and will say again."""


def is_outage(error: BaseException | None) -> bool:
    """Whether a database error will pass: the server went away or is busy, rather than refuses what it is asked."""
    from sqlalchemy import exc

    cause = _said(error)
    if isinstance(cause, exc.DBAPIError):
        return cause.connection_invalidated or _passes(cause.orig)
    return cause is not None


def is_locked(error: BaseException | None) -> bool:
    """Whether a database error is that another session holds a lock, and did for as long as was waited for it."""
    cause = getattr(_said(error), "orig", None)
    if type(cause).__module__.split(".")[0] == "sqlite3":
        return _passes(cause)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return code == "55P03" or getattr(cause, "args", ())[:1] == (1205,)


def is_gone(error: BaseException | None) -> bool:
    """Whether tables that were there are not, or others are: the database was dropped, or is being restored."""
    cause = getattr(_said(error), "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    moved = getattr(cause, "sqlite_errorname", None) == "SQLITE_READONLY_DBMOVED"
    number = next(iter(getattr(cause, "args", ())), None)
    return moved or code in GONE or number in GONE or bool(GONE_WORDS.search(str(cause)))


def _said(error: BaseException | None) -> BaseException | None:
    """What SQLAlchemy raised, where an error comes of its database's or of a connection to it."""
    from sqlalchemy import exc

    kinds = (exc.DisconnectionError, exc.TimeoutError, exc.PendingRollbackError, exc.DBAPIError)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error


def _passes(error: BaseException | None) -> bool:
    kind, text = type(error).__name__, str(error).lower()
    if any(words in text for words in REFUSED):
        return False
    if type(error).__module__.split(".")[0] == "sqlite3":
        return kind == "OperationalError" and ("locked" in text or "busy" in text)
    number = error.args[0] if error is not None and error.args else None
    if isinstance(number, int):
        return number in MYSQL or (kind == "InterfaceError" and number == 0)
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if code is not None:
        return str(code).startswith(POSTGRES)
    return any(base.__name__ in ("OperationalError", "InterfaceError") for base in type(error).__mro__)


def holders(url: str | None) -> str:
    """Which other processes hold locks on an SQLite file, beginning with ", by"; empty where nothing tells."""
    import psutil
    from sqlalchemy.engine import make_url

    parsed = None if url is None else make_url(url)
    if parsed is None or parsed.get_backend_name() != "sqlite" or not parsed.database:
        return ""
    processes = []
    try:
        inode = f":{Path(parsed.database).stat().st_ino}"
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]  # Linux
        for pid in sorted({int(lock[4]) for lock in locks if lock[5].endswith(inode)} - {os.getpid()}):
            stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
            processes.append(f"process {pid}, which is stopped" if stopped else f"process {pid}")
    except (OSError, ValueError, IndexError, psutil.Error):
        pass
    return f", by {' and '.join(processes)}" if processes else ""


class Outages:
    """Repeats calls while a database is away, with exponential backoff and jitter.

    Args:
        place: names the storage, without its password.
        url: whose secrets are left out of what it says.
        patience: seconds to wait for it; then StorageError, at once from every call until one succeeds.
        missing: of a database that was there: whether a study is missing that was in it, and may be on its way back;
            called with `shaken`. Given this, tables that are gone are waited for, too.
        renew: called where connections may be to what is gone.

    Attributes:
        deadline: `time.monotonic` after which nothing is waited for; None: none.
        stopped: nothing is waited for, as Ctrl-C was pressed.
        shaken: a connection was lost since the study was last seen.
        returned: `time.monotonic` when the last outage ended that was told of.
    """

    def __init__(
        self,
        place: str,
        patience: float,
        url: str | None = None,
        missing: Callable[[bool], bool] | None = None,
        renew: Callable[[], Any] | None = None,
    ) -> None:
        self.place, self.patience, self._url = place, patience, url
        self.deadline: float | None = None
        self.returned = float("-inf")
        self._since: float | None = None
        self._told = self._gave_up = False
        self.stopped = self.shaken = False
        self._missing, self._renew = missing, renew
        self._lock = threading.Lock()

    def __call__(
        self, call: Callable[[], T], failed: Callable[[], Any] | None = None, again: Callable[[], T] | None = None
    ) -> T:
        """What `call` returns, repeated while the database is away.

        Args:
            failed: called once, when the first try failed.
            again: what is called in place of `call` then, as the first try may have been done; None: the same.

        Raises:
            StorageError: when patience or deadline ended, `stopped` was set, or the database says what will not pass,
                such as that the disk is full.
        """
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import DBAPIError

        tries = 0
        while True:
            began = time.monotonic()
            try:
                result = call() if again is None or tries == 0 else again()
            except Exception as error:
                passes = is_outage(error) or self._may_return(error)
                if not passes and not isinstance(error, (DBAPIError, StorageInternalError)):
                    raise
                if tries == 0 and failed is not None:
                    failed()
                if not passes:
                    said = reason(error, self._url)
                    raise StorageError(f"cannot use the storage {self.place}: {said}") from None
                self._wait(error, tries, began)
                tries += 1
            else:
                self._answered()
                return result

    def note(self, error: BaseException) -> None:
        """Note an error, of whoever may not wait: what is missing from now on may be on its way back."""
        self.shaken = self.shaken or is_gone(error) or (is_outage(error) and not is_locked(error))

    def _may_return(self, error: Exception) -> bool:
        """Whether it is a part of the database that is not there, and may be restored."""
        if self._missing is None or self._renew is None:
            return False
        if is_gone(error):
            self._renew()
            return True
        try:
            return isinstance(error, (KeyError, StudyIsGone)) and self._missing(self.shaken)
        except Exception as other:
            return is_outage(other) or is_gone(other)

    def _wait(self, error: Exception, tries: int, began: float) -> None:
        now = time.monotonic()
        self.note(error)
        now_is, was = ("is locked", "was locked") if is_locked(error) else ("does not answer", "did not answer")
        with self._lock:
            if self._since is None:
                self._since = began if now - began >= links.LOCK / 2 else now  # what it waited for itself counts, too
            waited = now - self._since
            late = self.deadline is not None and now >= self.deadline
            if waited >= self.patience or late or self._gave_up or self.stopped:
                self._gave_up = True
                raise StorageError(f"{self.place} {was} for {waited:.0f} s: {self._why(error)}") from None
            if waited >= SILENT and not self._told:
                self._told = True
                told = "%s %s (%s); waiting up to %.0f s"
                logger.warning(told, self.place, now_is, self._why(error), self.patience)
        delay = min(FIRST_DELAY * 2**tries, LONGEST_DELAY) * random.uniform(0.5, 1.0)
        left = self.patience - waited if self.deadline is None else min(self.patience - waited, self.deadline - now)
        until = now + min(delay, left)
        while not self.stopped and time.monotonic() < until:
            time.sleep(max(0.0, min(SLICE, until - time.monotonic())))

    def _why(self, error: Exception) -> str:
        """What the database said, and who locks it, where that can be told."""
        if is_locked(error):
            return reason(error, self._url) + holders(self._url)
        if is_gone(error):
            return f"{reason(error, self._url)}; it was dropped or is being restored"
        if not is_outage(error):
            return "the study is not in it any more; it was dropped, or restored to a time before the study"
        return reason(error, self._url)

    def _answered(self) -> None:
        if self._since is None and not self._gave_up:
            return
        with self._lock:
            if self._told and self._since is not None:
                self.returned = time.monotonic()
                logger.warning("%s answers again, after %.0f s", self.place, self.returned - self._since)
            self._since, self._told, self._gave_up = None, False, False
