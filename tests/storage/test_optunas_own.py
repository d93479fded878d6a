"""Another Optuna than the one whose private parts are known: its own storage, after one warning."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import numpy as np
import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.storages._rdb import models

import moeopt
from moeopt import samplers
from moeopt.study.storage import attributes, internals, opening
from moeopt.trials import genome

from .conftest import SPACE, loss, opened, slots

MOVED = "optuna.storages._rdb.models_that_moved"
RENAMED = "_get_prepared_new_trial"


def forget() -> None:
    internals.missing.cache_clear()
    opening._tell_of_weaker_promises.cache_clear()


@pytest.fixture(params=["models moved", "method renamed", "another schema"])
def other_optuna(request: pytest.FixtureRequest) -> Iterator[str]:
    """An Optuna that has something otherwise: what is said of it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "models moved":
            patch.setattr(internals, "MODELS", MOVED)
            word = MOVED
        elif request.param == "method renamed":
            caller = RDBStorage._create_new_trial
            names = tuple("_prepared" if name == RENAMED else name for name in caller.__code__.co_names)
            code = caller.__code__.replace(co_names=names)
            calls_it = FunctionType(code, caller.__globals__, caller.__name__, caller.__defaults__, caller.__closure__)
            patch.setattr(RDBStorage, "_prepared", getattr(RDBStorage, RENAMED), raising=False)
            patch.setattr(RDBStorage, "_create_new_trial", calls_it)
            patch.delattr(RDBStorage, RENAMED)
            word = RENAMED
        else:
            patch.setattr(models, "SCHEMA_VERSION", 13)
            word = "version 13"
        forget()
        yield word
    forget()


def test_a_search_is_warned_of_once_and_resumes_exactly(other_optuna: str, tmp_path: Path, name: str) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        moeopt.optimize(opened(url, name, "eep"), loss, n_trials=4)
        study = opened(url, name, "eep")
        moeopt.optimize(study, loss, n_trials=9)
    (said,) = [text for each in warned if "Optuna's own" in (text := str(each.message))]
    assert other_optuna in said
    assert "several workers may run a few trials more than asked for" in said
    assert "an outage of the database is not waited for" in said
    assert attributes.team(study) is None
    whole = optuna.create_study(sampler=samplers.get("eep", SPACE, seed=0))
    whole.optimize(loss, n_trials=9)
    assert [trial.value for trial in study.trials] == [trial.value for trial in whole.trials]
    assert [{**genome.origin(t), "worker": 0} for t in study.trials] == [
        {**genome.origin(t), "worker": 0} for t in whole.trials
    ]


@pytest.mark.filterwarnings("ignore:.*storage is Optuna's own", "ignore:Heartbeat of storage")
def test_a_trial_whose_worker_is_silent_is_tried_again(other_optuna: str, tmp_path: Path, name: str) -> None:
    study = opened(f"sqlite:///{tmp_path}/study.db", name, grace_period=2)
    lost = study.ask()
    study._storage.record_heartbeat(lost._trial_id)  # type: ignore[attr-defined]
    time.sleep(3.2)
    moeopt.optimize(study, loss, n_trials=3)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert np.array_equal(genome.read(study.trials[0]), genome.read(study.trials[1]))  # type: ignore[arg-type]
    assert slots(study) == [0, 1, 2]


def test_a_cache_that_hides_the_storage_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert internals.missing.__wrapped__() is None
    monkeypatch.setattr(optuna.storages, "_CachedStorage", type("Other", (), {}))
    assert "_CachedStorage._backend" in str(internals.missing.__wrapped__())


def test_nothing_imports_the_models_where_they_moved(tmp_path: Path) -> None:
    code = f"""
import sys, warnings, optuna
warnings.simplefilter("ignore")
import moeopt
from moeopt.study.storage import internals
internals.MODELS = "{MOVED}"
space = moeopt.PruneSpace(moeopt.ModelShape(2, 4, k=2), keep=2)
sampler = moeopt.samplers.get("random", space, seed=0)
study = optuna.create_study(storage=moeopt.open_storage("sqlite:///{tmp_path}/a.db"), sampler=sampler)
moeopt.optimize(study, lambda trial: float(space.vector(trial).sum()), n_trials=2)
print(len(study.trials), "moeopt.study.storage.rows" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2 False\n", done.stderr
