"""Databases to break: a server of our own, a database of our own on any server, and a wire to it."""

from __future__ import annotations

import functools
import getpass
import socket
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from optuna.storages._rdb import models
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

TABLES: Any = models.BaseModel.metadata  # type: ignore[attr-defined]


class Cluster:
    """A PostgreSQL server of our own; PostgreSQL refuses to run as root, so root runs it as `postgres`."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "postgres"
        self.data.mkdir()
        self.user: list[str] = []
        if getpass.getuser() == "root":
            self.user = ["runuser", "-u", "postgres", "--"]
            folder.chmod(0o755)
            subprocess.run(["chown", "postgres", str(self.data)], check=True)
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        self.programs = str(installed[-1]) + "/" if installed else ""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._call("initdb", "-D", str(self.data), "-A", "trust", "-U", "postgres")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.data} -c listen_addresses=127.0.0.1"
        self._call("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.data / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self.data), "-w", "-m", "fast", "stop")

    def _call(self, program: str, *arguments: str) -> None:
        command = [*self.user, self.programs + program, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


class Wire:
    """A TCP proxy in front of a database server.

    It can be cut, lose the answer to the next COMMIT of something, and be `silent`: what is sent then gets lost, while
    connections stay and new ones are taken.
    """

    def __init__(self, host: str, port: int) -> None:
        self.server = (host, port)
        self.losing = self.silent = False
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in [*self._open]:
            self._close(end)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            self._open |= {client, server}
            lost = threading.Event()
            for source, target, asks in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._copy, args=(source, target, asks, lost), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, asks: bool, lost: threading.Event) -> None:
        wrote = False
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if asks:
                    wrote = wrote or b"INSERT" in data or b"UPDATE trials" in data
                    if self.losing and wrote and b"COMMIT" in data:
                        self.losing = False
                        lost.set()
                    wrote = wrote and b"COMMIT" not in data
                if not asks and lost.is_set():
                    break
                if not self.silent:
                    target.sendall(data)
        for end in (source, target):
            self._close(end)

    def _close(self, end: socket.socket) -> None:
        self._open.discard(end)
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


class Own:
    """A database of one's own on a server, or an SQLite file, to drop and to restore."""

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

        def write() -> None:
            with engine.begin() as connection:
                TABLES.drop_all(connection)
                TABLES.create_all(connection)
                for table in TABLES.sorted_tables:
                    if rows[table]:
                        connection.execute(table.insert(), [dict(row) for row in rows[table]])
                    key = next(iter(table.primary_key.columns)).name
                    if engine.name == "postgresql":
                        restart = f"SELECT setval(pg_get_serial_sequence('{table}', '{key}'), max({key})) FROM {table}"
                        connection.execute(text(restart))

        def restore() -> None:
            if engine.name == "mysql":
                time.sleep(2)  # no restore is as fast as its clock, which shows seconds
            for left in reversed(range(20)):
                try:
                    write()
                    break
                except OperationalError:  # a deadlock with a worker
                    if not left:
                        raise
            engine.dispose()

        return restore


def _copy(source: Path, target: Path) -> None:
    """Copy an SQLite database into another with SQLite's locks, which a process loses when it closes a file itself."""
    with closing(sqlite3.connect(source)) as origin, closing(sqlite3.connect(target)) as copy:
        origin.backup(copy)
