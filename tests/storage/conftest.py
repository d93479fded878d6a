"""Databases, a wire to them that can be cut, and workers as processes."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from databases import servers
from sqlalchemy.engine import make_url

import moeopt
from benchmarks.servers import Wire
from moeopt import samplers
from moeopt.study.storage import attributes, open_storage
from moeopt.trials import genome

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = moeopt.PruneSpace(moeopt.ModelShape(4, 6, k=2), keep=3)


def loss(trial: optuna.trial.BaseTrial) -> float:
    return float(((SPACE.vector(trial) - 0.25) ** 2).sum())


def backend(study: optuna.Study) -> attributes.Team:
    """The study's storage of moeopt's, and its key there."""
    team = attributes.team(study)
    assert team is not None
    return team


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the storage logged."""
    return [record.getMessage() for record in caplog.records if record.name == "moeopt.study.storage"]


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEOPT_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def url(database: str, name: str) -> Iterator[str]:
    yield database
    with suppress(KeyError):
        optuna.delete_study(study_name=name, storage=database)


@pytest.fixture(params=servers())
def direct(request: pytest.FixtureRequest, name: str) -> Iterator[str]:
    """A server's URL, past the wire."""
    yield request.param
    with suppress(KeyError):
        optuna.delete_study(study_name=name, storage=request.param)


@pytest.fixture
def wire(direct: str) -> Iterator[Wire]:
    parsed = make_url(direct)
    assert parsed.port is not None
    wire = Wire(parsed.host or "127.0.0.1", parsed.port)
    yield wire
    with suppress(OSError):
        wire.cut()


@pytest.fixture
def wired(direct: str, wire: Wire) -> str:
    """The server's URL over the wire."""
    return make_url(direct).set(host="127.0.0.1", port=wire.port).render_as_string(hide_password=False)


def opened(url: str, name: str, sampler: Any = "random", **options: Any) -> optuna.Study:
    """The study, with a storage of its own that waits for a minute."""
    settings = {"heartbeat_interval": 1, "grace_period": 60, "patience": 60} | options
    chosen = samplers.get(sampler, SPACE, seed=0) if isinstance(sampler, str) else sampler
    return optuna.create_study(
        study_name=name, storage=open_storage(url, **settings), sampler=chosen, load_if_exists=True
    )


def processes(count: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start workers, which must open storages of their own: forks of a process without threads, not of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moeopt.study", "moeopt.study.storage", "moeopt.samplers"])
    given = dict(os.environ), work, arguments
    started = [context.Process(target=_run, args=given, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    return started


def _run(environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)


def slots(study: optuna.Study) -> list[int]:
    """Slots of the complete trials, sorted."""
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(genome.origin(trial)["slot"] for trial in done)


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition that must come about."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about within a minute")
