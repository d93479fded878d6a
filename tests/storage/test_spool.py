"""Results on the disk: whole or not there, of this study or left alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

import moeopt
from moeopt.study.storage import attributes, spool
from moeopt.study.storage.spool import Result
from moeopt.trials import genome
from moeopt.trials.process import this_worker

from .conftest import backend, loss, opened, slots

DEAD: dict[str, Any] = {**this_worker(), "pid": 2**22 - 1}


@pytest.fixture
def study(tmp_path: Path, name: str) -> optuna.Study:
    return opened(f"sqlite:///{tmp_path}/study.db", name)


def identity(study: optuna.Study) -> str:
    team = backend(study)
    return team.storage.identity(team.study_id)


def orphan(study: optuna.Study, **fields: Any) -> Result:
    """A running trial whose worker is dead, and what that kept."""
    trial = study.ask()
    backend(study).storage._owned.clear()
    origin = genome.origin(attributes.frozen_trial(trial))
    attributes.write(study, trial, {genome.ORIGIN: {**origin, "worker": DEAD}})
    plan = origin["plan"]
    return Result(**{"study": identity(study), "number": trial.number, "worker": DEAD, "plan": plan} | fields)


def test_a_kept_result_is_stored_and_removed(study: optuna.Study) -> None:
    result = orphan(study, state="COMPLETE", values=[0.5], attrs={genome.SCORES: {"of": "x"}}, user_attrs={"a": 1})
    result.save()
    assert stat.S_IMODE(os.stat(result.file).st_mode) == 0o600
    assert moeopt.study.reclaim(study) == []
    (trial,) = study.trials
    assert (trial.state, trial.value, trial.user_attrs) == (TrialState.COMPLETE, 0.5, {"a": 1})
    assert trial.system_attrs[genome.SCORES] == {"of": "x"}
    assert not result.file.exists()


def test_a_pruned_trial_gets_its_last_report(study: optuna.Study) -> None:
    result = orphan(study, state="PRUNED")
    team = backend(study)
    for step, value in ((1, 0.9), (2, 0.7)):
        team.storage.set_trial_intermediate_value(attributes.key(study.trials[0]), step, value)
    result.save()
    moeopt.study.reclaim(study)
    assert (study.trials[0].state, study.trials[0].value) == (TrialState.PRUNED, 0.7)


def test_a_living_worker_keeps_what_is_its_own(study: optuna.Study) -> None:
    result = orphan(study, worker=this_worker(), state="COMPLETE", values=[0.5])
    result.save()
    moeopt.study.reclaim(study)
    assert result.file.exists()


def test_what_a_container_kept_that_was_started_anew_is_stored_once_its_trial_was_taken_over(
    study: optuna.Study,
) -> None:
    result = orphan(study, worker={**DEAD, "namespace": 1}, state="COMPLETE", values=[0.5])
    result.save()
    noted = {**genome.origin(study.trials[0]), "worker": result.worker}
    attributes.write(study, study.trials[0], {genome.ORIGIN: noted})
    assert moeopt.study.reclaim(study) == []
    assert study.trials[0].state == TrialState.RUNNING
    team = backend(study)
    assert team.storage.take_over(team.study_id, attributes.key(study.trials[0]), "its worker was not heard of") == 1
    moeopt.study.reclaim(study)
    assert (study.trials[1].state, study.trials[1].value) == (TrialState.COMPLETE, 0.5)
    assert not result.file.exists()


def test_a_result_of_another_plan_or_of_a_trial_that_ended_is_dropped(study: optuna.Study) -> None:
    other = orphan(study, plan="f" * 32, state="COMPLETE", values=[0.5])
    other.save()
    assert moeopt.study.reclaim(study) == [0]
    moeopt.optimize(study, loss, n_trials=1)
    value = study.trials[1].value
    late = Result(identity(study), 0, DEAD, state="COMPLETE", values=[0.5])
    late.save()
    moeopt.study.reclaim(study)
    assert study.trials[1].value == value
    assert slots(study) == [0]
    assert not other.file.exists()
    assert not late.file.exists()


def test_a_study_of_the_same_name_is_another(study: optuna.Study, tmp_path: Path, name: str) -> None:
    twin = opened(f"sqlite:///{tmp_path}/twin.db", name)
    orphan(twin)
    result = orphan(study, state="COMPLETE", values=[0.5])
    result.save()
    assert moeopt.study.reclaim(twin) == [0]
    assert twin.trials[0].state == TrialState.FAIL
    assert result.file.exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@settings(max_examples=150, deadline=None)
@given(
    broken=st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.tuples(st.sampled_from(["study", "number", "worker", "plan", "state", "values", "attrs"]), json_values)
)
def test_a_file_that_is_none_of_ours_harms_nothing(broken: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(spool.VARIABLE, str(tmp_path_factory.mktemp("spool")))
        result = Result("a" * 32, 3, DEAD, "p", "COMPLETE", [1.0])
        result.save()
        if isinstance(broken, bytes):
            result.file.write_bytes(broken)
        else:
            content = json.loads(result.file.read_text()) | {broken[0]: broken[1]}
            result.file.write_text(json.dumps(content))
        for spooled in spool.results("a" * 32):
            assert spooled.study == "a" * 32
            assert spooled.file == result.file
            assert spooled.state in (None, *spool.STATES)
        assert [*spool.results("../" + "a" * 29)] == []


def test_a_folder_that_another_worker_removes_meanwhile_is_made_again(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = orphan(study, state="COMPLETE", values=[0.5])
    make, removed = Path.mkdir, []

    def and_gone(path: Path, *arguments: Any, **options: Any) -> None:
        make(path, *arguments, **options)
        if path == result.file.parent and len(removed) < 2:
            removed.append(path.rmdir())

    monkeypatch.setattr(Path, "mkdir", and_gone)
    result.save()
    assert len(removed) == 2
    assert result.file.exists()


def test_a_folder_that_cannot_be_written_is_said_and_the_search_goes_on(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(spool.VARIABLE, str(tmp_path / "file"))
    moeopt.optimize(study, loss, n_trials=2)
    assert slots(study) == [0, 1]
    assert "cannot keep the result of trial 0" in caplog.text
