"""Connections on which nothing waits for ever: for a lock, for a server that is gone, for a worker that was frozen.

A worker that is frozen, or whose host is gone, within a transaction keeps its locks until the server ends that; one
whose server is gone hears of it by the network, or, where that still answers for it, after a time without a word.
What ends so is an outage: it is waited for, and nothing is done twice. A URL's own parameters are left as they are.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine import URL

LOCK = 10
"""Seconds that a statement waits for a lock."""
IDLE = 30
"""Seconds after which the server ends the transaction of a worker that asks for nothing more."""
SILENCE = 60
"""Seconds without a word of a server that was asked for something."""
_NETWORK = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}  # fmt: skip
_SILENCE = {"connect_timeout": 10, "read_timeout": SILENCE, "write_timeout": SILENCE}
ARGUMENTS: dict[str, dict[str, int]] = {
    "psycopg": _NETWORK,
    "psycopg2": _NETWORK,
    "pg8000": {"timeout": SILENCE},
    "pymysql": _SILENCE,
    "mysqldb": _SILENCE,
    "mariadbconnector": _SILENCE,
    "mysqlconnector": {"connection_timeout": 10, "read_timeout": SILENCE, "write_timeout": SILENCE},
    "pysqlite": {"timeout": LOCK},
}
"""What each driver takes by which a connection to a host that vanished ends within a minute or so."""


def options(url: URL) -> dict[str, Any]:
    """Arguments of `create_engine` for a URL."""
    driver = url.get_driver_name()
    given = {name: value for name, value in ARGUMENTS.get(driver, {}).items() if name not in url.query}
    if driver == "mysqlconnector":
        takes = import_module("mysql.connector.constants").DEFAULT_CONFIGURATION
        given = {name: value for name, value in given.items() if name in takes}  # which it is since 9.2
    return {"pool_pre_ping": False, "connect_args": given}  # a closed connection is tried again


def limit(engine: Engine) -> None:
    """Let connections of an engine that are still to be made wait for nothing longer than LOCK, IDLE and SILENCE."""
    from sqlalchemy import event

    statement = _limits(engine)
    if statement is None:
        return

    @event.listens_for(engine, "connect")
    def ask(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # PostgreSQL takes settings back that a transaction made which is rolled back

    if engine.driver == "psycopg":

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: Any, arguments: Any, given: Any) -> Any:
            return _listening().connect(*arguments, **given)


def keep_file(engine: Engine) -> None:
    """Let later connections to an SQLite file fail where it is not there any more, rather than make an empty one."""
    from sqlalchemy import event

    file = engine.url.database
    if engine.name != "sqlite" or file in (None, "", ":memory:") or str(file).startswith("file:"):
        return

    @event.listens_for(engine, "do_connect")
    def look(*_: Any) -> None:
        if not Path(str(file)).exists():
            raise sqlite3.OperationalError("unable to open database file: it is not there")


def _limits(engine: Engine) -> str | None:
    """The statement that limits a session; what the server or the role limits already stays."""
    if engine.name == "postgresql":
        return (
            f"SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN '{LOCK}s' ELSE '{IDLE}s' END, false)"
            " FROM pg_settings"
            " WHERE name IN ('lock_timeout', 'idle_in_transaction_session_timeout') AND setting = '0'"
        )
    if engine.name not in ("mysql", "mariadb"):
        return None
    named = str(engine.url.query)
    locks = [name for name in ("innodb_lock_wait_timeout", "lock_wait_timeout") if name not in named]
    sets = [f"{name} = LEAST(@@{name}, {LOCK})" for name in locks]
    if "idle_transaction_timeout" not in named and "wait_timeout" not in named.replace("lock_wait_timeout", ""):
        # MariaDB runs the first comment alone. MySQL, which runs the second, ends idle connections, too.
        idle = "@@idle_transaction_timeout"
        sets.append(
            f"/*M! idle_transaction_timeout = IF({idle}, {idle}, {IDLE}) */"
            f" /*!50700 wait_timeout = LEAST(@@wait_timeout, {IDLE}) */"
        )
    return f"SET SESSION {', '.join(sets)}" if sets else None


@cache
def _listening() -> Any:
    """psycopg's connection, which has no read timeout, with one."""
    psycopg: Any = import_module("psycopg")

    class Listening(psycopg.Connection):  # type: ignore[misc]
        def wait(self, steps: Any, *arguments: Any, **options: Any) -> Any:
            return super().wait(self._heard(steps), *arguments, **options)

        def _heard(self, steps: Any) -> Generator[Any, Any, Any]:
            """A call's steps: each asks to wait for the socket, and is told each 0.1 s whether it is ready."""
            ready, heard = None, time.monotonic()
            try:
                while True:
                    ready = yield steps.send(ready)
                    if ready:
                        heard = time.monotonic()
                    elif time.monotonic() - heard > SILENCE:
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"the server said nothing for {SILENCE} s")
            except StopIteration as end:
                return end.value

    return Listening
