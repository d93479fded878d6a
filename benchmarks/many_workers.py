"""Workers that are killed, and a database that is stopped, on one study: is every slot done exactly once?

    python benchmarks/many_workers.py [--trials 1000] [--workers 4] [--kills 20] [--storage URL]

An objective of 5 ms (a sleep; the loss is a distance in the space) is minimised by processes that run
`moeopt.optimize` with the random sampler. First without faults, then with: workers are killed with SIGKILL at random
points of the run and replaced at once, and the database is stopped twice for --outage seconds, with three of the kills
in each outage. Without --storage the benchmark makes a PostgreSQL cluster of its own in a temporary folder, and stops
that; a database given by its URL is not stopped. Half of the workers have host names of their own, so that their trials
are taken over by heartbeats alone, and what they kept is stored when the run ends; the others are seen to be dead.

Heartbeats every second; the grace period is --grace, 30 s, which exceeds the outage. Exits 1 unless every slot has
exactly one finished trial, every failed trial exactly one that repeats it, no plan was evaluated by two slots, the
values are those of the plans, and nothing is left running, waiting or on the disk.

On two idle cores; `--storage sqlite` and a MariaDB URL with `--grace 10`; `--clean-trials 100` or 200:

| storage | faults | trials | trials/s | killed | outages | failed and repeated | slots done once | all right |
|---|---|---|---|---|---|---|---|---|
| PostgreSQL 15 | none | 100 | 24.0 | 0 | 0 | 0 | 100 | yes |
| PostgreSQL 15 | kills, two outages of 20 s | 1,000 | 8.2 | 20 | 2 | 4 | 1,000 | yes |
| SQLite | none | 200 | 29.2 | 0 | 0 | 0 | 200 | yes |
| SQLite | kills | 1,000 | 20.8 | 20 | 0 | 7 | 1,000 | yes |
| MariaDB 10.11 | none | 200 | 28.6 | 0 | 0 | 0 | 200 | yes |
| MariaDB 10.11 | kills | 1,000 | 18.9 | 20 | 0 | 8 | 1,000 | yes |

A trial takes about 40 ms of CPU and 65 statements: two cores are what bounds the rates.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import worker_faults
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from servers import Cluster
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

import moeopt
from moeopt import samplers
from moeopt.study import finished
from moeopt.study.storage import attributes, open_storage
from moeopt.study.storage.spool import VARIABLE
from moeopt.trials import genome

SPACE = moeopt.PruneSpace(moeopt.ModelShape(8, 8, k=2), keep=4)
STUDY = "many"
KILLS_AN_OUTAGE = 3


def main() -> int:
    args = arguments()
    if args.work:
        work(args)
        return 0
    if args.faults:
        args.trials, args.seconds = args.trials or 80, args.seconds or 0.1
        return worker_faults.main(args, sys.modules[__name__])
    args.trials, args.seconds = args.trials or 1000, args.seconds or 0.005
    table = Table(title=f"trials of {1000 * args.seconds:.0f} ms, {args.workers} workers")
    columns = ("storage", "faults", "trials", "trials/s", "s", "killed", "outages", "failed", "slots", "right")
    for column in columns:
        table.add_column(column)
    good = True
    with tempfile.TemporaryDirectory() as folder, database(args, Path(folder)) as (url, server):
        os.environ[VARIABLE] = str(Path(folder) / "spool")
        for faults in (False, True):
            storage = f"{url}-{faults}.db" if url.startswith("sqlite") else url
            trials = args.trials if faults else args.clean_trials or args.trials
            run_of = argparse.Namespace(**{**vars(args), "trials": trials})
            row, problems = measured(run_of, storage, server, faults)
            table.add_row(storage.split(":")[0], *row, "yes" if not problems else "no")
            for problem in problems:
                Console().print(problem)
            good = good and not problems
    Console(width=120).print(table)
    return 0 if good else 1


def measured(args: argparse.Namespace, url: str, server: Cluster | None, faults: bool) -> tuple[list[str], list[str]]:
    """One run: a row of the table, and what is wrong."""
    study = opened(args, url)
    try:
        killed, outages = run(args, url, server, faults)
        trials = study.get_trials(deepcopy=False)
        first = min(t.datetime_start for t in trials if t.datetime_start)
        last = max(t.datetime_complete for t in trials if t.datetime_complete)
        seconds = (last - first).total_seconds()
        failed = sum(t.state == TrialState.FAIL for t in trials)
        moeopt.study.reclaim(study, other_hosts=True)  # stores what dead workers of other hosts kept, were it needed
        row = [
            "yes" if faults else "no", str(args.trials), f"{args.trials / seconds:.1f}", f"{seconds:.0f}",
            str(killed), str(outages), str(failed), str(finished(study)),
        ]  # fmt: skip
        return row, wrong(study, args.trials)
    finally:
        optuna.delete_study(study_name=STUDY, storage=opened(args, url)._storage)


def wrong(study: optuna.Study, slots: int) -> list[str]:
    """What is not as it should be, a line each."""
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    problems = []

    def expect(good: bool, problem: str) -> None:
        if not good:
            problems.append(problem)

    done = Counter(int(genome.origin(t).get("slot", -1)) for t in complete)
    expect(sorted(done) == list(range(slots)), f"finished slots are not 0 to {slots - 1}: {len(done)}")
    expect(max(done.values()) == 1, f"finished twice: {[s for s, n in done.items() if n > 1]}")
    states = Counter(t.state.name for t in trials)
    expect(set(states) <= {"COMPLETE", "FAIL"}, f"states at the end: {dict(states)}")
    repeats = Counter((t.system_attrs.get(genome.RETRIES) or [None])[-1] for t in trials)
    failed = [t for t in trials if t.state == TrialState.FAIL]
    expect(all(repeats[t.number] == 1 for t in failed), "a failed trial has not exactly one successor")
    expect(all(genome.FAILURE in t.user_attrs for t in failed), "a failed trial does not say why")
    expect(all(t.number not in repeats for t in complete), "a complete trial was repeated")
    expect(all(t.value == loss(genome.read(t)) for t in complete), "a value is not that of the trial's plan")
    expect(study.best_value == min(loss(genome.read(t)) for t in complete), "the best value is wrong")
    expect(all(t.user_attrs.get("note") == t.value for t in complete), "a trial lost its attribute")
    plans = Counter(genome.origin(t)["plan"] for t in complete)
    expect(max(plans.values()) == 1, f"{sum(n - 1 for n in plans.values())} plans were evaluated twice")
    kept = [*Path(os.environ[VARIABLE]).rglob("*.json")]
    expect(not kept, f"left on the disk: {[file.name for file in kept]}")
    return problems


def run(args: argparse.Namespace, url: str, server: Cluster | None, faults: bool) -> tuple[int, int]:
    """Run the workers to the end; how many were killed, and how often the database was stopped."""
    rng = random.Random(args.seed)
    outages = 2 if faults and server is not None else 0
    in_run = max(0, args.kills - KILLS_AN_OUTAGE * outages) if faults else 0
    kill_at = sorted(rng.randrange(1, int(0.95 * args.trials)) for _ in range(in_run))
    stop_at = [args.trials * (i + 1) // (outages + 1) for i in range(outages)]
    workers: list[subprocess.Popen[bytes]] = []
    made = killed = stopped = 0

    def hire() -> subprocess.Popen[bytes]:
        nonlocal made
        made += 1
        host = f"host-{made}" if made % 2 else socket.gethostname()
        command = [sys.executable, __file__, "--work", host, "--storage", url, "--trials", str(args.trials)]
        command += ["--grace", str(args.grace), "--seconds", str(args.seconds)]
        return subprocess.Popen(command)

    def kill() -> None:
        nonlocal killed
        alive = [i for i, worker in enumerate(workers) if worker.poll() is None]
        if alive:
            i = rng.choice(alive)
            workers[i].send_signal(signal.SIGKILL)
            workers[i].wait()
            workers[i] = hire()
            killed += 1

    try:
        workers.extend(hire() for _ in range(args.workers))
        engine = create_engine(url)
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
            done = complete(engine)
            while kill_at and done >= kill_at[0]:
                kill_at.pop(0)
                kill()
                time.sleep(rng.uniform(0.0, 0.5))
            if stop_at and done >= stop_at[0] and server is not None:
                stop_at.pop(0)
                stopped += 1
                server.stop()
                for _ in range(KILLS_AN_OUTAGE):
                    time.sleep(args.outage / KILLS_AN_OUTAGE)
                    kill()
                server.start()
        engine.dispose()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    return killed, stopped


def complete(engine: Any) -> int:
    """Complete trials of the study now; 0 while the database is busy."""
    query = "SELECT count(*) FROM trials JOIN studies USING (study_id) WHERE study_name = :name AND state = 'COMPLETE'"
    try:
        with engine.connect() as connection:
            return int(connection.execute(text(query), {"name": STUDY}).scalar())
    except SQLAlchemyError:
        return 0


def loss(x: Any) -> float:
    """Distance from the middle of the space."""
    return float(np.square(np.asarray(x, dtype=np.float64) - 0.5).sum())


def opened(args: argparse.Namespace, url: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url, heartbeat_interval=1, grace_period=args.grace, patience=120)
    sampler = samplers.get("random", SPACE, seed=0)
    return optuna.create_study(study_name=STUDY, storage=storage, sampler=sampler, load_if_exists=True)


def work(args: argparse.Namespace) -> None:
    """One worker process."""
    socket.gethostname = lambda: args.work
    if args.log:
        worker_faults.be(args.role)
    study = opened(args, args.storage)

    def objective(trial: optuna.Trial) -> float:
        time.sleep(args.seconds)
        value = loss(SPACE.vector(trial))
        attributes.write(study, trial, {}, {"note": value})
        return value

    def told(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if args.log:
            with open(args.log, "a") as log:  # one short line, which is appended whole
                log.write(f"{time.monotonic()}\n")

    if args.role == "forked":
        os.fork()
    moeopt.optimize(study, objective, n_trials=args.trials, callbacks=[told])


@contextmanager
def database(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Cluster | None]]:
    """The database's URL, and its server where that is ours to stop."""
    if args.storage == "sqlite":
        yield f"sqlite:///{folder}/study", None
        return
    if args.storage:
        yield args.storage, None
        return
    server = Cluster(folder)
    try:
        yield server.url, server
    finally:
        server.stop()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", metavar="URL", help="a database, or sqlite; by default a PostgreSQL of its own")
    parser.add_argument("--trials", type=int, help="1000; with --faults 80")
    parser.add_argument("--faults", choices=["all"], help="a table of faults, each under a team of its own")
    parser.add_argument("--fault", choices=[*worker_faults.FAULTS], help="of --faults all, this one only")
    parser.add_argument("--database", choices=[*worker_faults.SERVERS], help="of --faults all, on this one only")
    parser.add_argument("--clean-trials", type=int, help="trials of the run without faults; by default as many")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="of an evaluation: 0.005; with --faults 0.1")
    parser.add_argument("--outage", type=float, default=20.0, help="seconds")
    parser.add_argument("--grace", type=int, default=30, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    for hidden in ("--work", "--log", "--role"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
