"""What a trial costs apart from its forward passes, and how that grows with trials, numbers, layers and workers.

    python benchmarks/scaling.py [trials storages spaces patching workers reading] [--storage URL] [--sampler eep]

No model runs: the loss is a distance in the space, and the objective stores what `moeopt.Objective` stores, in one
transaction. A trial is timed inside `moeopt.optimize`, in three parts that add up to all it takes:

* ask: the end of `optimize` for the trial before, Optuna's new trial, the proposal and its storage;
* write: decoding the plan, looking for it among the finished trials, per-example scores and attributes;
* tell: Optuna's end of the trial.

"cpu" is this process's share of it, which a busy machine changes least; "commits" are transactions that write, each of
which waits for the disk. Histories are made by the sampler itself in memory and copied to the database; after
--patience seconds the rest is random trials ("own" counts the sampler's). "resume" is opening a study, which a new
process pays once, and "first ask" the replay after it; the others are medians of the trials that follow. "grows as" is
the exponent of the number of finished trials between two sizes: 1 is a scan of the history, 0 a cost that does not
grow. Studies in databases other than SQLite are deleted afterwards.

Goals at 2,048 numbers and 1,000 finished trials: 50 ms a trial for eep, 5% of a SmolMoE trial (165 ms) for the others.
On two cores with other jobs, SQLite on a disk that commits in 1 ms: eep 34 to 36 ms (31 of CPU), random 32,
local 37. A complete run (`--patience 20`) on two cores that three other jobs used, disk included, gave:

| sampler | ms a trial at 100, 1,000, 5,000 trials | of it CPU | share of a SmolMoE trial | grows as, last two sizes |
|---|---|---|---|---|
| eep | 81, 126, 102 | 35, 43, 50 | 2.5, 3.8, 3.1 % | -0.13 |
| random | 81, 81, 132 | 40, 41, 66 | 2.4, 2.5, 4.0 % | 0.30 |
| local | 80, 104, 163 | 40, 53, 85 | 2.4, 3.2, 4.9 % | 0.28 |
| sepcmaes | 88, 110, 70 | 42, 49, 58 | 2.7, 3.3, 2.1 % | -0.28 |
| blockcmaes | 81, 95, 137 | 40, 47, 64 | 2.4, 2.9, 4.2 % | 0.23 |
| nevergrad:DE | 138, 138, 76 | 45, 47, 61 | 4.2, 4.2, 2.3 % | -0.37 |
| tpe | 2,341, 12,998, 77,876 | 2,197, 12,275, 57,437 | 71, 394, 2,360 % | 1.11 (of CPU 0.96) |

So on a slow or busy disk eep misses 50 ms: five commits a trial are Optuna's new trial, the worker's name (so that a
trial whose worker dies while it proposes is found), the genotype, the scores, and Optuna's end of the trial. Layers 8
to 64, groups 1 to 32 and experts 8 to 128 move a trial of eep between 77 and 102 ms, one of sepcmaes between 87 and
147. Workers of eep on SQLite: 12, 16, 18 trials a second for 1, 2, 4 processes whose evaluation takes no time, 0.87,
1.73, 3.53 where it takes a second. Reading 5,000 trials takes 2.8 s, the best one 5 ms.

Storages (`storages --trials 10 400 2000 --patience 20`, random search, two cores beside other jobs): milliseconds a
trial (of it CPU) in 4 commits and some 65 statements, heartbeats and results kept for outages included:

| numbers | finished trials | SQLite | PostgreSQL 15 | MariaDB 10.11 |
|---|---|---|---|---|
| 32 | 10, 400, 2,000 | 32, 40, 47 (29, 36, 44) | 43, 153*, 172* (33, 55, 62) | 40, 52, 157* (33, 41, 58) |
| 256 | 10, 400, 2,000 | 28, 31, 45 (23, 25, 40) | 64, 71, 71 (41, 46, 49) | 97, 38, 45 (35, 30, 37) |
| 2,048 | 10, 400, 2,000 | 33, 32, 37 (29, 29, 33) | 42, 43, 60 (32, 33, 47) | 43, 45, 56 (34, 36, 46) |

* while other jobs took both cores. The numbers of a trial hardly count. A process that resumes 2,000 trials of 2,048
numbers opens the study in .03, .06 and .1 s, and its first trial, which reads them all, takes 1.5 s.

Not reached: tpe. Optuna's estimator evaluates 24 candidates against every finished trial for each of the 2,048 numbers,
49 million kernels a trial at 1,000 trials, and walks the trials in Python once a number. It is linear in trials; use it
for small spaces. nevergrad:DE asks again for every trial when a process resumes: 7 to 12 s for 1,000 trials, most of it
in its crossover.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
import torch
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt.report import terminal as console
from moeopt.samplers import SAMPLERS
from moeopt.spaces import EEPSpace, PruneSpace, Space
from moeopt.study import DESCRIPTION
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.genome import Vector

EXAMPLES = 64
BASE = EEPSpace(moeopt.ModelShape(layers=32, experts=8, k=2), keep=4)
"""2,048 numbers: 32 groups x 2 matrices x 4 x 8."""
SMOLMOE_TRIAL = 3300.0
"""Milliseconds of a trial on SmolMoE: 1,536 tokens, one thread."""
PARTS = ("first ask", "ask", "write", "tell", "a trial", "cpu")

Section = tuple[str, tuple[str, ...], Iterator[tuple[object, ...]]]
"""Title, columns and rows of a table."""


def main() -> None:
    args = arguments()
    _quiet()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        for name in args.sections or SECTIONS:
            title, columns, rows = SECTIONS[name](bench)
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
                table.add_row(*cells)
                Console(stderr=True, highlight=False).print("  ".join(cells), style="dim", soft_wrap=True)
            Console(width=150, highlight=False).print(table)


class Synthetic:
    """An objective without a model that stores what `moeopt.Objective` stores, 64 examples; it notes when it ran."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.target = space.sample(np.random.default_rng(7)).astype(np.float64) + 0.1
        self.begun: list[float] = []
        self.ended: list[float] = []

    def __call__(self, trial: optuna.Trial) -> float:
        self.begun.append(time.perf_counter())
        x, origin = self.space.vector(trial), genome.origin(attributes.frozen_trial(trial))
        fingerprint = self.space.decode(x).fingerprint
        same: int = sum(
            genome.origin(other).get("plan") == fingerprint for other in trial.study.get_trials(deepcopy=False)
        )
        attributes.write(trial.study, trial, *self.stored(trial.number, x, origin))
        self.ended.append(time.perf_counter())
        return self.loss(x) + 0.01 * (same > 1)

    def loss(self, x: Vector) -> float:
        return float(np.square(x - self.target).mean())

    def stored(self, number: int, x: Vector, origin: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """System and user attributes of a finished trial."""
        scores = np.random.default_rng(number).random(3 * EXAMPLES, dtype=np.float32)
        facts = {"accuracy": 0.5, "seconds": 3.3, "tokens": 1536, "layer_tokens": 49152, "drift": self.space.drift(x)}
        facts |= {key: origin[key] for key in ("operator", "phase", "parents") if origin.get(key)}
        return genome.pack(genome.SCORES, scores), facts

    def random(self, number: int) -> FrozenTrial:
        """A finished trial of dense matrices, as if a sampler had proposed it."""
        rng = np.random.default_rng([8, number])
        x = self.space.snap(self.space.sample(rng) + rng.normal(0, 0.065, self.space.size))
        origin = {"operator": "random", "slot": number, "parents": [], "notes": {}}
        origin["plan"] = self.space.decode(x).fingerprint
        attrs, facts = self.stored(number, x, origin)
        attrs |= {**genome.pack(genome.GENOME, x), genome.ORIGIN: origin}
        return optuna.trial.create_trial(value=self.loss(x), user_attrs=facts, system_attrs=attrs)


def opened(name: str, storage: Any, sampler: str, space: Space) -> optuna.Study:
    study = optuna.create_study(
        study_name=name,
        storage=moeopt.open_storage(storage) if isinstance(storage, str) else storage,
        sampler=moeopt.samplers.get(sampler, space, seed=0),
        load_if_exists=True,
    )
    if DESCRIPTION not in study.user_attrs:
        about = {
            "model": {"name_or_path": "none", "weights": "none"}, "task": {"name": "none", "fingerprint": "none"},
            "space": space.describe(), "sampler": {"name": sampler, "seed": 0},
        }  # fmt: skip
        study.set_user_attr(DESCRIPTION, about)
    return study


@dataclass
class Bench:
    """Where studies lie for a while, and the histories they are filled with."""

    folder: Path
    args: argparse.Namespace
    histories: dict[tuple[str, str], list[FrozenTrial]] = field(default_factory=dict)

    @property
    def urls(self) -> list[str]:
        given = (os.environ.get(f"MOEOPT_TEST_{name}_URL") for name in ("POSTGRES", "MYSQL"))
        return ["sqlite", *filter(None, given), *self.args.storage]

    @property
    def middle(self) -> int:
        return int(np.median(self.args.trials))

    def history(self, sampler: str, space: Space, count: int) -> list[FrozenTrial]:
        """So many finished trials of a sampler, the last of them random when it is slow."""
        key = sampler, json.dumps(space.describe())
        if len(self.histories.get(key, [])) < count:
            study, objective = opened("history", optuna.storages.InMemoryStorage(), sampler, space), Synthetic(space)
            until, told = time.monotonic() + self.args.patience, 0
            while told < count and time.monotonic() < until:
                trial = study.ask()
                study.tell(trial, objective(trial))
                told += 1
            random = [objective.random(number) for number in range(told, count)]
            self.histories[key] = [*study.get_trials(deepcopy=False), *random]
        return self.histories[key][:count]

    @contextmanager
    def study(self, url: str, sampler: str, space: Space, count: int) -> Iterator[tuple[str, str]]:
        """URL and name of a study that holds so many finished trials of a sampler."""
        history, name = self.history(sampler, space, count), f"scaling-{uuid.uuid4()}"
        file = self.folder / f"{name}.db"
        url = f"sqlite:///{file}" if url == "sqlite" else url
        opened(name, url, sampler, space)
        try:
            fill(url, name, history)
            yield url, name
        finally:
            optuna.delete_study(study_name=name, storage=url)
            file.unlink(missing_ok=True)


def fill(url: str, name: str, trials: list[FrozenTrial]) -> None:
    """Copy finished trials into an empty study, in one transaction: `study.add_trials` makes one of each."""
    engine, metadata = sqlalchemy.create_engine(url), sqlalchemy.MetaData()
    metadata.reflect(engine)
    tables = metadata.tables
    with engine.begin() as connection:
        study = connection.execute(tables["studies"].select().where(tables["studies"].c.study_name == name)).one()
        for number, trial in enumerate(trials):
            times = {"datetime_start": trial.datetime_start, "datetime_complete": trial.datetime_complete}
            facts = {"number": number, "study_id": study.study_id, "state": trial.state.name, **times}
            key = connection.execute(tables["trials"].insert().values(**facts)).inserted_primary_key
            assert key is not None
            json_of = optuna.distributions.distribution_to_json
            rows: dict[str, list[dict[str, Any]]] = {
                "trial_values": [{"objective": 0, "value": trial.value, "value_type": "FINITE"}],
                "trial_params": [
                    {
                        "param_name": k,
                        "param_value": d.to_internal_repr(trial.params[k]),
                        "distribution_json": json_of(d),
                    }
                    for k, d in trial.distributions.items()
                ],
            }
            for kind, attrs in (("user", trial.user_attrs), ("system", trial.system_attrs)):
                rows[f"trial_{kind}_attributes"] = [{"key": k, "value_json": json.dumps(v)} for k, v in attrs.items()]
            for table, values in rows.items():
                if values:
                    connection.execute(tables[table].insert(), [{"trial_id": key[0], **value} for value in values])
    engine.dispose()


@dataclass(frozen=True)
class Cost:
    """Milliseconds: `resume` and `first_ask` once, the others a trial; and SQL a trial."""

    resume: float
    first_ask: float
    ask: float
    write: float
    tell: float
    cpu: float
    commits: float
    statements: float

    @property
    def trial(self) -> float:
        return self.ask + self.write + self.tell

    @property
    def parts(self) -> list[int]:
        return [round(ms) for ms in (self.first_ask, self.ask, self.write, self.tell, self.trial, self.cpu)]


def measured(url: str, name: str, sampler: str, space: Space, args: argparse.Namespace) -> Cost:
    """The cost of further trials of a study, as a new process sees it."""
    objective, told, worked = Synthetic(space), [0.0], [0.0]

    def note(study: optuna.Study, trial: FrozenTrial) -> None:
        told.append(time.perf_counter())
        worked.append(time.process_time())
        if told[-1] - told[0] > args.patience and len(told) > 3:
            study.stop()

    started = time.perf_counter()
    study = opened(name, url, sampler, space)
    with Statements() as counted:
        told[0] = resumed = time.perf_counter()
        moeopt.optimize(study, objective, n_trials=moeopt.study.finished(study) + args.timed + 1, callbacks=[note])
    asks = np.subtract(objective.begun, told[:-1])
    times = asks, np.subtract(objective.ended, objective.begun), np.subtract(told[1:], objective.ended), np.diff(worked)
    parts = [1000 * float(np.median(part[1:])) for part in times]
    counts = (count / len(asks) for count in (counted.commits, counted.statements))
    return Cost(1000 * (resumed - started), 1000 * float(asks[0]), *parts, *counts)


class Statements:
    """Counts SQL statements, and transactions that wrote, of all engines while it is open."""

    def __init__(self) -> None:
        self.statements = self.commits = 0

    def _statement(self, connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        self.statements += 1
        connection.info["wrote"] = connection.info.get("wrote") or statement.split()[0] in ("INSERT", "UPDATE")

    def _commit(self, connection: Any) -> None:
        self.commits += bool(connection.info.pop("wrote", False))

    def __enter__(self) -> Statements:
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", self._statement)
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", self._commit)
        return self

    def __exit__(self, *exception: object) -> None:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", self._statement)
        sqlalchemy.event.remove(sqlalchemy.Engine, "commit", self._commit)


def trials(bench: Bench) -> Section:
    """Every sampler on SQLite, and EEP on every other database, by the number of finished trials."""
    names = bench.args.sampler or [{"nevergrad": "nevergrad:DE"}.get(s, s) for s in SAMPLERS if s != "cmaes"]
    columns = (
        "storage",
        "sampler",
        "trials",
        "own",
        "resume s",
        *PARTS,
        "commits",
        "statements",
        "of 3.3 s",
        "grows as",
    )

    def rows() -> Iterator[tuple[object, ...]]:
        for url, sampler in [("sqlite", name) for name in names] + [(url, "eep") for url in bench.urls[1:]]:
            before: tuple[int, float] | None = None
            bench.history(sampler, BASE, max(bench.args.trials))  # the shorter ones begin it
            for count in sorted(bench.args.trials):
                with bench.study(url, sampler, BASE, count) as (place, name):
                    cost = measured(place, name, sampler, BASE, bench.args)
                its_own = sum(genome.origin(t)["operator"] != "random" for t in bench.history(sampler, BASE, count))
                growth = "" if before is None else math.log(cost.trial / before[1]) / math.log(count / before[0])
                yield (
                    url.split(":")[0], sampler, count, its_own, cost.resume / 1000, *cost.parts, cost.commits,
                    cost.statements, f"{cost.trial / SMOLMOE_TRIAL:.1%}", growth and f"{growth:.2f}",
                )  # fmt: skip
                before = count, cost.trial

    commit = bare_commit(bench.folder)
    return f"{BASE.size} numbers; milliseconds (a bare commit of SQLite takes {commit:.1f})", columns, rows()


def bare_commit(folder: Path) -> float:
    """Milliseconds of a SQLite transaction of one row, which is what the disk takes."""
    with closing(sqlite3.connect(folder / "commit.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE rows (x)")
        times = [time.perf_counter()]
        for _ in range(30):
            connection.execute("INSERT INTO rows VALUES (1)")
            times.append(time.perf_counter())
    (folder / "commit.db").unlink()
    return 1000 * float(np.median(np.diff(times)))


def storages(bench: Bench) -> Section:
    """Random search in every database by the numbers of a trial and by finished trials."""

    def rows() -> Iterator[tuple[object, ...]]:
        for groups in (1, 4, 32):
            space = EEPSpace(moeopt.ModelShape(32, 8, k=2), keep=4 if groups > 1 else 2, groups=groups)
            for url in bench.urls:
                for count in sorted(bench.args.trials):
                    with bench.study(url, "random", space, count) as (place, name):
                        cost = measured(place, name, "random", space, bench.args)
                    kind = url.split(":")[0].split("+")[0]
                    yield kind, space.size, count, cost.resume / 1000, *cost.parts, cost.commits, cost.statements

    columns = ("storage", "numbers", "trials", "resume s", *PARTS, "commits", "statements")
    return f"milliseconds (a bare commit of SQLite takes {bare_commit(bench.folder):.1f})", columns, rows()


def spaces(bench: Bench) -> Section:
    """EEP by layers, groups and experts, one at a time, and CMA-ES on pruning scores."""

    def eep(layers: int, groups: int, experts: int, keep: int) -> Space:
        return EEPSpace(moeopt.ModelShape(layers, experts, k=2), keep=keep, groups=groups)

    cases: list[tuple[str, Space]] = [
        *(("eep", eep(layers, layers, 8, 4)) for layers in (8, 32, 64)),
        *(("eep", eep(32, groups, 8, 4)) for groups in (1, 4, 16)),
        *(("eep", eep(32, 4, experts, 8)) for experts in (16, 64, 128)),
        *(("sepcmaes", PruneSpace(moeopt.ModelShape(32, experts, k=2), keep=experts // 2)) for experts in (8, 64, 128)),
    ]

    def rows() -> Iterator[tuple[object, ...]]:
        for sampler, space in cases:
            with bench.study("sqlite", sampler, space, bench.middle) as (url, name):
                cost = measured(url, name, sampler, space, bench.args)
            shape = space.shape.layers, len(space.groups), f"{space.keep} of {space.shape.experts}"
            yield sampler, type(space).__name__, *shape, space.size, *cost.parts

    columns = ("sampler", "space", "layers", "groups", "r of n", "numbers", *PARTS)
    return f"{bench.middle} finished trials, SQLite; milliseconds", columns, rows()


def patching(bench: Bench) -> Section:
    """Decoding a genotype and entering and leaving `moeopt.patched`; merging itself is part of a forward pass."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def apply(model: Any, space: Space, x: Any) -> list[float]:
        times = [time.perf_counter()]
        plan = space.decode(x)
        times.append(time.perf_counter())
        with moeopt.patched(model, plan):
            pass
        return [*np.diff([*times, time.perf_counter()])]

    def rows() -> Iterator[tuple[object, ...]]:
        rng = np.random.default_rng(0)
        for layers, experts in ((8, 8), (32, 8), (64, 8), (32, 64), (32, 128)):
            config = MixtralConfig(
                vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
                num_key_value_heads=1, num_local_experts=experts, num_experts_per_tok=2,
            )  # fmt: skip
            model = MixtralForCausalLM(config).eval()
            space = EEPSpace.of(model, keep=experts // 2)
            pruned = [space.sample(rng) for _ in range(bench.args.timed)]
            first, *one_hot = [apply(model, space, x) for x in pruned]
            dense = [apply(model, space, x + rng.normal(0, 0.065, x.size)) for x in pruned]
            medians = np.concatenate([np.median(one_hot, axis=0), np.median(dense, axis=0)])
            yield layers, f"{space.keep} of {experts}", *(1000 * medians).tolist(), 1000 * first[1]

    columns = (
        "layers",
        "r of n",
        "decode one-hot",
        "enter + leave",
        "decode dense",
        "enter + leave",
        "first of a model",
    )
    return "a plan on a random Mixtral of hidden size 16, no forward; milliseconds", columns, rows()


def workers(bench: Bench) -> Section:
    """Processes on one study, with evaluations that take no time and such that sleep for a second."""

    def rows() -> Iterator[tuple[object, ...]]:
        context = multiprocessing.get_context("spawn")
        for url, seconds, count in [(u, s, n) for u in bench.urls for s in (0.0, 1.0) for n in (1, 2, 4)]:
            with bench.study(url, "eep", BASE, bench.middle) as study:
                queue, ready = context.Queue(), context.Barrier(count)
                arguments = (*study, seconds, bench.args.run, ready, queue)
                processes = [context.Process(target=work, args=arguments) for _ in range(count)]
                for process in processes:
                    process.start()
                done = [queue.get() for _ in processes]
                for process in processes:
                    process.join()
            yield url.split(":")[0], count, seconds, sum(done) / bench.args.run, f"{min(done) / max(1, *done):.0%}"

    columns = ("storage", "processes", "evaluation s", "trials a second", "slowest worker over fastest")
    return f"eep, {BASE.size} numbers, {bench.middle} finished trials, {os.cpu_count()} cores", columns, rows()


def work(url: str, name: str, seconds: float, duration: float, ready: Any, queue: Any) -> None:
    """One worker: counts its trials in `duration` seconds, from when all workers have read the study."""
    _quiet()
    study, objective, ended = opened(name, url, "eep", BASE), Synthetic(BASE), []

    def slow(trial: optuna.Trial) -> float:
        time.sleep(seconds)
        return objective(trial)

    ready.wait()
    until = time.monotonic() + duration
    moeopt.optimize(study, slow, timeout=duration, callbacks=[lambda *_: ended.append(time.monotonic() < until)])
    queue.put(sum(ended))


def reading(bench: Bench) -> Section:
    """What `moeopt show` and a dashboard do with a study."""

    def timed(url: str, name: str) -> list[float]:
        times = [time.perf_counter()]
        study = moeopt.load_study(name, url)
        for read in (
            lambda: study.get_trials(deepcopy=False),
            lambda: study.best_trial,
            lambda: console.study_record(study),
            lambda: moeopt.study.space_of(study).plan(study.best_trial),
        ):
            times.append(time.perf_counter())
            read()
        return [*1000 * np.diff([*times, time.perf_counter()])]

    def rows() -> Iterator[tuple[object, ...]]:
        for url in bench.urls:
            bench.history("random", BASE, max(bench.args.trials))
            for count in sorted(bench.args.trials):
                with bench.study(url, "random", BASE, count) as study:
                    yield url.split(":")[0], count, *map(round, timed(*study))

    columns = ("storage", "trials", "open", "read all trials", "best trial", "study_record", "plan of the best")
    return f"reading a study of {BASE.size} numbers; milliseconds", columns, rows()


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "trials": trials, "storages": storages, "spaces": spaces, "patching": patching, "workers": workers,
    "reading": reading,
}  # fmt: skip


def _quiet() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 5000], help="finished trials of a study")
    parser.add_argument("--timed", type=int, default=24, help="trials to time after them")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for a history, and for timed trials")
    parser.add_argument("--run", type=float, default=15.0, help="seconds of a run of workers")
    parser.add_argument("--sampler", action="append", default=[], help="by default all but full CMA-ES; nevergrad:DE")
    parser.add_argument("--storage", action="append", default=[], metavar="URL", help="a further database")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    main()
