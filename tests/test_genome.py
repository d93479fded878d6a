from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from databases import servers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from moeopt.errors import StorageError
from moeopt.study.storage import attributes
from moeopt.trials import genome

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(width=32)))
def test_pack_and_unpack(vector: np.ndarray) -> None:
    attrs = genome.pack("key", vector)
    unpacked = genome.unpack("key", attrs)
    assert unpacked is not None
    assert unpacked.dtype == np.float32
    assert unpacked.tobytes() == vector.tobytes()
    assert genome.unpack("other", attrs) is None


def test_long_vectors_come_in_chunks_that_fit_a_database() -> None:
    vector = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    attrs = genome.pack("key", vector)
    assert list(attrs) == [*(f"key.{i}" for i in range(1, len(attrs))), "key"]  # whole once the head is there
    assert len(attrs) > 3
    assert all(len(str(value)) < 65_533 for value in attrs.values())
    assert np.array_equal(genome.unpack("key", attrs), vector)
    del attrs["key.2"]
    with pytest.raises(StorageError, match="attribute 'key' is damaged or was written by a newer moeopt"):
        genome.unpack("key", attrs)


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"dtype": "<f8"},
        {"shape": [3]},
        {"shape": [-1]},
        {"shape": [1 << 40]},
        {"shape": []},
        {"shape": ["2"]},
        {"chunks": 2},
        {"chunks": 0},
        {"chunks": 1 << 40},
        {"z": "not base64!"},
        {"z": base64.b64encode(b"not zlib").decode()},
        {"z": packed(b"\0" * 7)},
        {"z": packed(b"\0" * 100_000_000)},
        {"z": None},
    ],
)
def test_damaged_attributes(change: dict[str, Any]) -> None:
    head = {"v": 1, "shape": [2], "dtype": "<f4", "z": packed(b"\0" * 8), "chunks": 1}
    assert genome.unpack("key", {"key": head}) is not None
    with pytest.raises(StorageError, match="'key' is damaged"):
        genome.unpack("key", {"key": head | change})
    for value in ("text", 3, [1, 2], None):
        with pytest.raises(StorageError):
            genome.unpack("key", {"key": value})


def test_reading_live_and_finished_trials() -> None:
    study = optuna.create_study()
    x = np.arange(5, dtype=np.float32)
    study.add_trial(genome.waiting(genome.pack(genome.GENOME, x) | {genome.ORIGIN: {"operator": "a"}}, {"why": "b"}))
    live = study.ask()
    attributes.write(study, live, {"more": 1})
    assert np.array_equal(genome.read(attributes.frozen_trial(live)), x)
    assert genome.origin(attributes.frozen_trial(live)) == {"operator": "a"}
    study.tell(live, 1.0)
    frozen = study.trials[0]
    assert np.array_equal(genome.read(frozen), x)
    assert frozen.system_attrs["more"] == 1
    assert frozen.user_attrs == {"why": "b"}
    other = study.ask()
    assert genome.read(attributes.frozen_trial(other)) is None
    assert genome.origin(attributes.frozen_trial(other)) == {}


def test_slots_do_not_count_retries() -> None:
    """Trials 1 and 4 die; 1 is retried as 3 and dies again, to be retried as 5, with its slot known or not."""
    for remember in (False, True):
        study = optuna.create_study()
        for number in range(8):
            trial = study.ask()
            assert trial.number == number
            frozen = study.trials[number]
            if remember:
                attributes.write(study, trial, {genome.ORIGIN: {"slot": genome.slot(frozen, study.trials)}})
            study.tell(trial, state=TrialState.FAIL)
            if number == 2:
                study.add_trial(genome.retry(study.trials[1]))
            if number == 4:
                study.add_trial(genome.retry(study.trials[3]))
        assert [genome.slot(trial, study.trials) for trial in study.trials] == [0, 1, 2, 1, 3, 1, 4, 5]
        assert study.trials[5].system_attrs[genome.RETRIES] == [1, 3]
        assert study.trials[5].system_attrs["failed_trial"] == 1


def test_a_retry_forgets_the_worker_only() -> None:
    origin = {"slot": 0, "operator": "merge", "worker": {"pid": 1}}
    study = optuna.create_study()
    study.add_trial(genome.waiting(genome.pack(genome.GENOME, np.ones(2, np.float32)) | {genome.ORIGIN: origin}, {}))
    retried = genome.retry(study.trials[0])
    assert retried.state == TrialState.WAITING
    assert genome.origin(retried) == {"slot": 0, "operator": "merge"}
    assert np.array_equal(genome.read(retried), np.ones(2))


@pytest.fixture(params=["memory", "journal", "sqlite", *servers()])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Every kind of Optuna storage; a database with the study ``write`` that is deleted afterwards."""
    if request.param == "memory":
        yield optuna.storages.InMemoryStorage()
    elif request.param == "journal":
        yield JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
    else:
        url = f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else request.param
        storage = optuna.storages.RDBStorage(url)
        yield storage
        optuna.delete_study(study_name="write", storage=storage)
        storage.engine.dispose()


def test_writing_gives_what_optuna_reads(storage: Any) -> None:
    study = optuna.create_study(storage=storage, study_name="write")
    live = study.ask()
    attrs, user = {"a": {"b": [1, None, "ü"]}, **genome.pack("x", np.ones(3, np.float32))}, {"c": 1.5, "d": "text"}
    params = {"f": (0.25, FloatDistribution(0, 1)), "i": (3, IntDistribution(0, 5))}
    attributes.write(study, live, attrs, user, params)
    attributes.write(study, live, {"a": 2}, {"c": [1]})
    assert attributes.frozen_trial(live).system_attrs == attrs | {"a": 2}
    assert (live.user_attrs, live.params) == (user | {"c": [1]}, {"f": 0.25, "i": 3})
    assert live.suggest_float("f", 0, 1) == 0.25
    live.suggest_float("own", 0, 1)
    study.tell(live, 1.0)
    trial = optuna.load_study(study_name="write", storage=storage).trials[0]
    assert (trial.system_attrs, trial.user_attrs) == (attrs | {"a": 2}, user | {"c": [1]})
    assert trial.params == {"f": 0.25, "i": 3, "own": live.params["own"]}
    assert trial.distributions == {"own": FloatDistribution(0, 1), "f": params["f"][1], "i": params["i"][1]}
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        attributes.write(study, live, {"late": 1})


def test_a_database_gets_one_transaction(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    live, engine, committed = study.ask(), study._storage._backend.engine, []
    sqlalchemy.event.listen(engine, "commit", committed.append)
    attributes.write(study, live, {"a": 1, "b": 2}, {"c": 3, "d": 4}, {"f": (0.25, FloatDistribution(0, 1))})
    assert len(committed) == 1
    with pytest.raises(TypeError):
        attributes.write(study, live, {"e": 5}, {"f": object()})
    assert "e" not in study.trials[0].system_attrs
