"""Faults, one after the other, under a team of workers: `many_workers.py --faults all`.

Four workers, trials of 0.1 s, 80 asked for, `--grace 10`; a fault lasts 10 s, on a server's link and lock 45 s, which
the servers shall end after 30. On two cores, busy with other work. Lost, double and wrong trials: none in any row.

| fault | SQLite: silence, recovery (s) | PostgreSQL 15 | MariaDB 10.11 |
|---|---|---|---|
| frozen lock holder | 10.1, 0.1 (ends with the fault) | 30.0, 29.4 | 30.2, 29.2 |
| silent link | - | 30.5, 20.5 | 30.6, 20.5 |
| killed connections | - | 2.0, 0.1 | 1.6, 0.1 |
| killed workers | 1.3, 7.2 | 3.0, 0.5 | 1.4, 1.3 |
| outage | 10.2, 0.1 | 10.3, 0.3 | 10.7, 0.6 |
| restore to an earlier state | 1.2, 1.2 | 3.2, 0.7 | 3.5, 0.9 |
| drop and create | 11.1, 1.1 | 12.9, 2.0 | 13.2, 0.3 |
| clock an hour ahead, behind | .5, .6 | .6, .5 | .2, .4 |
| forked workers | .7 | .4 | .5 |
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from servers import Own, Wire
from sqlalchemy import create_engine, func, literal, text
from sqlalchemy.engine import make_url

import moeopt
from moeopt.study.storage import rows
from moeopt.study.storage.resilient import ResilientStorage
from moeopt.study.storage.spool import VARIABLE
from moeopt.trials import genome

SERVERS = {
    "sqlite": "sqlite://",
    "postgres": os.environ.get("MOEOPT_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"),
    "mysql": os.environ.get("MOEOPT_TEST_MYSQL_URL", "mysql+pymysql://root@127.0.0.1:3306/mysql"),
}
FREEZE = "MOEOPT_BENCHMARK_FREEZE"
"""Names a file; who removes it is frozen in a transaction that holds the study's lock, and leaves its process id."""
SHORT, LONG = 10.0, 45.0
"""Seconds of a fault."""


@dataclass
class Scene:
    """A database and its workers; `url` goes over a wire that can be cut, where there is a server."""

    args: argparse.Namespace
    own: Own
    wire: Wire | None
    folder: Path
    role: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        if self.wire is None:
            return self.own.url
        parsed = make_url(self.own.url).set(host="127.0.0.1", port=self.wire.port)
        return parsed.render_as_string(hide_password=False)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def told(self) -> list[float]:
        """When each trial was told, `time.monotonic`, sorted."""
        return sorted(float(line) for line in self.log.read_text().split()) if self.log.exists() else []

    def hire(self, index: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("many_workers.py")), "--work", socket.gethostname()]
        options = {"storage": self.url, "trials": self.args.trials, "grace": self.args.grace, "log": self.log}
        options["seconds"] = self.args.seconds
        role = [] if not self.role else ["--role", self.role if index % 2 else ""]
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.workers.append(subprocess.Popen([*command, *given, *role]))

    def wait(self, share: float) -> None:
        """Until this share of the trials was told."""
        while len(self.told()) < share * self.args.trials:
            time.sleep(0.05)

    def end(self) -> None:
        for worker in self.workers:
            worker.wait()


def frozen(scene: Scene) -> float:
    """A worker is stopped within the transaction that holds the study's lock, and goes on later."""
    flag = scene.folder / "freeze"
    flag.touch()
    while not (pid := flag.with_suffix(".pid")).exists() or not pid.read_text():
        time.sleep(0.05)
    time.sleep(1.0)
    began = time.monotonic()
    time.sleep(SHORT if scene.wire is None else LONG)
    os.kill(int(pid.read_text()), signal.SIGCONT)
    return time.monotonic() if scene.wire is None else began


def silent(scene: Scene) -> float:
    """What is sent gets lost for a while, and connections stay as they are."""
    assert scene.wire is not None
    scene.wire.silent = True
    time.sleep(SHORT)
    scene.wire.silent = False
    return time.monotonic()


def connections(scene: Scene) -> float:
    """All connections are ended by the server, ten times."""
    parsed = make_url(scene.own.url)
    engine = create_engine(parsed, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for _ in range(10):
            if parsed.get_backend_name() == "postgresql":
                others = "datname = current_database() AND pid <> pg_backend_pid()"
                connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
            else:
                others = "db = DATABASE() AND id <> CONNECTION_ID()"
                for (key,) in connection.execute(text(f"SELECT id FROM information_schema.processlist WHERE {others}")):
                    with suppress(Exception):  # it has ended
                        connection.execute(text(f"KILL {key}"))
            time.sleep(0.3)
    engine.dispose()
    return time.monotonic()


def killed(scene: Scene) -> float:
    """Three workers of four are killed, and replaced."""
    for i in range(3):
        scene.workers[i].kill()
        scene.workers[i].wait()
        scene.hire(i)
        time.sleep(1.0)
    return time.monotonic()


def outage(scene: Scene) -> float:
    """The server is away; an SQLite file is locked by another process."""
    if scene.wire is not None:
        scene.wire.cut()
        time.sleep(SHORT)
        scene.wire.mend()
    else:
        with closing(sqlite3.connect(str(scene.own.file), timeout=60, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(SHORT)
            connection.execute("ROLLBACK")
    return time.monotonic()


def restored(scene: Scene) -> float:
    """The database is restored to what it was a third of the trials ago."""
    restore = scene.own.backup()
    scene.wait(0.6)
    restore()
    return time.monotonic()


def dropped(scene: Scene) -> float:
    """The database is dropped, created again, and restored to what it was."""
    restore = scene.own.backup()
    scene.own.drop()
    time.sleep(SHORT / 2)
    scene.own.create()
    time.sleep(SHORT / 2)
    restore()
    return time.monotonic()


def nothing(scene: Scene) -> float:
    """The workers themselves are what is wrong (`be`)."""
    return time.monotonic()


FAULTS: dict[str, Callable[[Scene], float]] = {
    "frozen lock holder": frozen,
    "silent link": silent,
    "killed connections": connections,
    "killed workers": killed,
    "outage": outage,
    "restore": restored,
    "drop and create": dropped,
    "clock an hour ahead": nothing,
    "clock an hour behind": nothing,
    "forked workers": nothing,
}
"""Each returns the `time.monotonic` from which recovery counts, to the next trial that is told: the end of the fault,
but where a server shall end it the beginning, when the others have told what they ran."""
ROLES = {"clock an hour ahead": "ahead", "clock an hour behind": "behind", "forked workers": "forked"}
OF_SERVERS = ("silent link", "killed connections")


def be(role: str) -> None:
    """Prepare a worker process for what is to be wrong with it."""
    call = ResilientStorage._get_prepared_new_trial
    flag = Path(os.environ[FREEZE])

    def freezes(*arguments: Any) -> Any:
        result = call(*arguments)
        with suppress(FileNotFoundError):
            flag.unlink()
            flag.with_suffix(".pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(ResilientStorage, "_get_prepared_new_trial", freezes)  # noqa: B010
    if role in ("ahead", "behind"):
        off = timedelta(hours=1 if role == "ahead" else -1)
        clock = SimpleNamespace(count=func.count, current_timestamp=lambda: literal(datetime.now() + off))
        setattr(rows, "func", clock)  # noqa: B010


def judged(study: optuna.Study, slots: int, loss: Callable[[Any], float]) -> list[str]:
    """Slots lost and done twice, trials whose value is wrong, and how many were run again."""
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    times = Counter(genome.origin(t).get("slot") for t in done)
    lost = sum(times[slot] == 0 for slot in range(slots)) + sum(not t.state.is_finished() for t in trials)
    double = sum(n - 1 for n in times.values()) + sum(slot not in range(slots) for slot in times)
    wrong = sum(t.value != loss(genome.read(t)) or t.user_attrs.get("note") != t.value for t in done)
    return [str(lost), str(double), str(wrong), str(sum(t.state == TrialState.FAIL for t in trials))]


def row(args: argparse.Namespace, fault: str, database: str, many: Any) -> list[str]:
    """One fault on one database."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ[VARIABLE], os.environ[FREEZE] = str(folder / "spool"), str(folder / "freeze")
        base = Own(SERVERS[database], folder)
        server = make_url(base.url)
        wire = None if database == "sqlite" else Wire(server.host or "127.0.0.1", server.port or 0)
        scene = Scene(args, base, wire, folder, ROLES.get(fault, ""))
        try:
            many.opened(args, base.url)
            for i in range(args.workers):
                scene.hire(i)
            scene.wait(0.25)
            start = FAULTS[fault](scene)
            scene.end()
            told = scene.told()
            study = many.opened(args, base.url)
            moeopt.study.reclaim(study, other_hosts=True)
            counts = judged(study, args.trials, many.loss)
            codes = Counter(worker.returncode for worker in scene.workers if worker.returncode not in (0, -9))
            silence = max(b - a for a, b in pairwise(told))
            after = [time for time in told if time >= start]
            recovery = "-" if fault in ROLES or not after else f"{after[0] - start:.1f}"
            load = f"{args.workers} x {args.seconds:g} s"
            return [
                fault,
                database,
                load,
                str(args.trials),
                *counts,
                f"{silence:.1f}",
                recovery,
                str(dict(codes) or ""),
            ]
        finally:
            for worker in scene.workers:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
            if wire is not None:
                wire.cut()
            base.drop()


def main(args: argparse.Namespace, many: Any) -> int:
    """Print a row a fault and database; 1 where anything was lost, double or wrong, or a worker failed."""
    table = Table()
    columns = (
        "fault",
        "database",
        "load",
        "asked",
        "lost",
        "double",
        "wrong",
        "again",
        "silence s",
        "recovery s",
        "exits",
    )
    for column in columns:
        table.add_column(column)
    good = True
    for database in [args.database] if args.database else SERVERS:
        for fault in FAULTS if args.fault is None else [args.fault]:
            if database == "sqlite" and fault in OF_SERVERS:
                continue
            cells = row(args, fault, database, many)
            table.add_row(*cells)
            good = good and cells[4:7] == ["0"] * 3 and not cells[-1]
            Console(width=140).print(*cells, sep=" | ")
    Console(width=140).print(table)
    return 0 if good else 1
