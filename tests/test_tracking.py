"""Trials in MLflow and TensorBoard: each once, of every worker, whatever becomes of the search or the tracker.

W&B's package is not among those that CI installs; it was run by hand, offline, with wandb 0.31.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moeopt
from moeopt.cli import main
from moeopt.errors import StudyError
from moeopt.study import Tracking, trackers, tracking
from moeopt.study.storage import attributes
from moeopt.tasks import Example, MultipleChoiceTask

optuna.logging.set_verbosity(optuna.logging.ERROR)

TASK = MultipleChoiceTask("odd", search=[Example(str(i), f"is {i} odd?", ("n", "y"), i % 2) for i in range(12)])


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take it seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in trackers.QUICK:
        monkeypatch.setenv(name, "0")  # no retries; restored afterwards
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs(uri: str) -> tuple[Any, dict[int, Any], MlflowClient]:
    """The one run of a study, and those of its trials by number, each of which is there once."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("moeopt")
    assert experiment is not None
    every = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = (run for run in every if trackers.TAG in run.data.tags)
    children = [run for run in every if run.data.tags.get(trackers.PARENT) == parent.info.run_id]
    assert len(children) == len(every) - 1
    by_number = {int(run.data.tags[trackers.TRIAL]): run for run in children}
    assert len(by_number) == len(children)
    return parent, by_number, client


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads of the one run in a folder."""
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def plain(study: optuna.Study, trials: int, callback: Any, value: Callable[[int], float] = float) -> None:
    study.optimize(lambda trial: value(trial.number), n_trials=trials, callbacks=[callback])


def test_what_is_sent(mlflow: str, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.PruneSpace.of(tiny_model, keep=2)
    objective = moeopt.Objective(tiny_model, tiny_tokenizer, TASK, space, constraints=["active <= 1.5"])
    study = moeopt.create_study("a/b c", objective=objective, storage="sqlite:///s.db", sampler="random", seed=3)
    with Tracking("mlflow", f"tensorboard={tmp_path / 'tb'}") as tracked:
        moeopt.optimize(study, objective, n_trials=3, callbacks=[tracked])
        study.enqueue_trial({})
        study.optimize(lambda trial: math.nan, n_trials=1, callbacks=[tracked])
    parent, children, client = runs(mlflow)
    assert parent.info.run_name == "a/b c"
    assert parent.info.status == "FINISHED"
    about = parent.data.params
    assert about["task"] == "odd"
    assert about["seed"] == "3"
    assert about["optimiser"] == "random"
    assert about["full_model.layer_tokens"] == str(objective.reference(study).layer_tokens)
    assert (
        not {name for run in (parent, *children.values()) for name in run.data.params} & study.trials[0].params.keys()
    )
    for trial in study.trials[:3]:
        metrics, words = children[trial.number].data.metrics, children[trial.number].data.tags
        assert metrics["loss"] == trial.value
        for name in ("accuracy", "layer_tokens", "spent", "active"):
            assert metrics[name] == trial.user_attrs[name]
        assert metrics["constraint/active_at_most_1.5"] == 0.5
        assert "best_loss" not in metrics  # none keeps the constraint
        assert (words["state"], words["operator"]) == ("complete", trial.user_attrs["operator"])
    assert (children[3].info.status, children[3].data.tags["state"]) == ("FAILED", "failed")
    assert "loss" not in children[3].data.metrics
    history = client.get_metric_history(parent.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(t.number, t.value) for t in study.trials[:3]]
    assert scalars(tmp_path / "tb")["loss"] == [(t.number, pytest.approx(t.value)) for t in study.trials[:3]]


def test_several_objectives_and_pruned_trials(mlflow: str, tmp_path: Path) -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.set_metric_names(["loss", "metric:a b"])
    with Tracking("mlflow") as tracked:
        study.optimize(lambda trial: (1.0, 2.0), n_trials=1, callbacks=[tracked])
        one = optuna.create_study(direction="maximize")  # another study is another run

        def raced(trial: optuna.Trial) -> float:
            if trial.number == 1:
                trial.set_user_attr("estimate", 7.0)
                raise optuna.TrialPruned
            return -abs(trial.number - 2.0)

        one.optimize(raced, n_trials=4, callbacks=[tracked])
    client = MlflowClient(tracking_uri=mlflow)
    every = client.search_runs([client.get_experiment_by_name("moeopt").experiment_id])
    told = {run.info.run_name: run for run in every if trackers.TAG in run.data.tags}
    first, second = told[study.study_name], told[one.study_name]
    assert first.data.metrics == {"loss": 1.0, "metric.a_b": 2.0}
    best = client.get_metric_history(second.info.run_id, "best_loss")
    assert [(each.step, each.value) for each in best] == [(0, -2.0), (1, -2.0), (2, 0.0), (3, 0.0)]
    (estimate,) = client.get_metric_history(second.info.run_id, "estimate")
    assert (estimate.step, estimate.value) == (1, 7.0)


def test_a_failing_tracker_is_told_once_and_gets_what_it_missed(
    mlflow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PAUSE", -1e9)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter22@127.0.0.1:9")
    told: list[str] = []
    study = optuna.create_study(storage="sqlite:///s.db", study_name="s")
    with Tracking("mlflow", "tensorboard", tell=told.append) as tracked:
        plain(study, 4, tracked)
    assert len(study.trials) == 4
    assert len(told) == 2
    assert told[0].startswith("mlflow failed, and is tried again later; the search goes on: ")
    assert told[1] == "mlflow lacks 4 trials, which it gets when the search goes on"
    assert "hunter22" not in str(told)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    with Tracking("mlflow", "tensorboard", tell=told.append) as tracked:
        plain(study, 2, tracked)
    assert len(told) == 2
    assert runs(mlflow)[1].keys() == {*range(6)}
    assert scalars(tmp_path / "runs")["loss"] == [(i, i) for i in range(6)]


def test_a_pause_follows_a_failure(mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search is not held up by a server that is down, trial after trial."""
    tries: list[int] = []

    def down(self: Any, *given: Any) -> set[int]:
        tries.append(1)
        raise ConnectionError("down")

    monkeypatch.setattr(trackers.MLflow, "open", down)
    with Tracking("mlflow", tell=lambda text: None) as tracked:
        plain(optuna.create_study(), 20, tracked)
        assert len(tries) == 1
    assert len(tries) == 2  # the last one, at the end


KILLED = """
    import os, sys, optuna
    from moeopt.study import Tracking, trackers
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="s", storage="sqlite:///s.db", load_if_exists=True)
    kind, call, after = sys.argv[1:]
    owner = {"mlflow": "mlflow.MlflowClient", "tensorboard": "torch.utils.tensorboard.SummaryWriter"}[kind]
    module, name = owner.rsplit(".", 1)
    cls = getattr(__import__(module, fromlist=[name]), name)
    real, calls = getattr(cls, call), []
    def deadly(self, *given, **named):
        if len(study.trials) == 3 and study.trials[2].state.is_finished():
            calls.append(1)
            if len(calls) > int(after):
                os.kill(os.getpid(), 9)
        return real(self, *given, **named)
    setattr(cls, call, deadly)
    study.optimize(lambda trial: float(trial.number), n_trials=5, callbacks=[Tracking(kind)])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "call", "after"), [("mlflow", "log_batch", 1), ("tensorboard", "flush", 0)])
def test_a_search_killed_while_it_sends_goes_on_in_the_same_run(
    mlflow: str, tmp_path: Path, kind: str, call: str, after: int
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), kind, call, str(after)]
    path = os.pathsep.join([str(Path(moeopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow, "PYTHONPATH": path}
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    assert len(study.trials) == 3
    time.sleep(1.1)  # files of TensorBoard are read in order of the seconds in their names
    with Tracking(kind if kind == "tensorboard" else f"mlflow={mlflow}") as tracked:
        plain(study, 2, tracked)
    if kind == "tensorboard":
        assert scalars(tmp_path / "runs")["loss"] == [(i, i) for i in range(5)]
        return
    parent, children, client = runs(mlflow)
    assert children.keys() == {*range(5)}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert all(run.data.metrics["loss"] == number for number, run in children.items())
    history = client.get_metric_history(parent.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(i, i) for i in range(5)]


def test_trials_of_other_workers_are_sent_in_order(mlflow: str) -> None:
    """One that still runs elsewhere holds back those after it, until it ends, or until the search does."""
    study = optuna.create_study(storage="sqlite:///s.db", study_name="s")
    tracked = Tracking("mlflow")
    tracked.begin(study)
    other, mine = study.ask(), study.ask()
    study.tell(mine, 1.0)
    tracked(study, study.trials[1])
    assert runs(mlflow)[1].keys() == set()
    study.tell(other, 0.0)
    forever = study.ask()
    plain(study, 1, tracked)
    assert runs(mlflow)[1].keys() == {0, 1}
    tracked.close()
    assert runs(mlflow)[1].keys() == {0, 1, 3}
    study.tell(forever, 2.0)
    with tracked:
        assert tracked.begin(study)[0].startswith(f"mlflow: {mlflow}, run ")
    assert runs(mlflow)[1].keys() == {0, 1, 2, 3}
    assert attributes.study_attributes(study)[tracking.ATTRIBUTE]["sent"] == {f"mlflow: {mlflow}": "0-3"}


def test_a_folder_that_is_gone_is_filled_again(tmp_path: Path) -> None:
    study = optuna.create_study()
    for folder in ("one", "two", "one"):
        with Tracking(f"tensorboard={tmp_path / folder}") as tracked:
            plain(study, 1, tracked)
    shutil.rmtree(tmp_path / "two")
    with Tracking(f"tensorboard={tmp_path / 'two'}") as tracked:
        tracked.begin(study)
    assert scalars(tmp_path / "one")["loss"] == scalars(tmp_path / "two")["loss"] == [(i, i) for i in range(3)]


def test_an_error_waits_for_no_tracker(tmp_path: Path) -> None:
    study, tracked = optuna.create_study(), Tracking(f"tensorboard={tmp_path}")

    def failing() -> None:
        with tracked:
            tracked.begin(study)
            study.add_trial(optuna.trial.create_trial(value=1.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert attributes.study_attributes(study)[tracking.ATTRIBUTE]["sent"] == {}
    with tracked:
        tracked.begin(study)
    assert scalars(tmp_path)["loss"] == [(0, 1.0)]


def test_what_is_no_tracker_is_refused_before_long_work(
    refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "no-such-file.jsonl"
    command = ["search", str(moeopt.demo.MODEL), "--task", "multiple_choice", "--data", str(data), "--keep", "4"]
    command += ["--study", "s", "--track"]
    assert "got 'mlfow'; did you mean 'mlflow'?" in refused([*command, "mlfow"])
    assert "named twice" in refused([*command, "tensorboard,mlflow", "--track", "mlflow=x"])
    assert "got 'mlflow='" in refused([*command, "mlflow="])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert "pip install 'moeopt[tracking]'" in refused([*command, "wandb"])


@pytest.mark.parametrize("noted", [7, {"id": "x", "sent": {}}, {"id": "0" * 16, "sent": {"mlflow: y": 3}}])
def test_what_a_study_notes_is_checked(noted: Any, tmp_path: Path) -> None:
    study = optuna.create_study()
    attributes.write_study(study, {tracking.ATTRIBUTE: noted})
    with pytest.raises(StudyError, match="moeopt:tracking"):
        Tracking(f"tensorboard={tmp_path}").begin(study)


def test_the_search_sends_what_workers_ran(mlflow: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also that of a worker elsewhere, and after the last trial."""
    assert main(["demo", "--copy", "tour"]) == 0
    storage = ["--study", "s", "--storage", "sqlite:///s.db"]
    command = ["search", "tour/model", "--task", "multiple_choice", "--data", "tour/caesar.jsonl", "--limit", "8"]
    command += ["--keep", "4", "--space", "prune", "--warm-start", "none", "--no-held", *storage]
    command += ["--track", "mlflow,tensorboard=http://me:hunter22@host"]
    assert main([*command, "--trials", "3"]) == 0
    assert "mlflow: sqlite:///" in capsys.readouterr().err
    assert main(["worker", "--model", "tour/model", "--trials", "5", *storage]) == 0
    assert runs(mlflow)[1].keys() == {0, 1, 2}
    assert main([*command, "--trials", "5"]) == 0
    parent, children, _ = runs(mlflow)
    assert children.keys() == {*range(5)}
    study = moeopt.load_study("s", "sqlite:///s.db")
    assert {trial.value for trial in study.trials} == {run.data.metrics["loss"] for run in children.values()}
    assert parent.data.params["command"] == study.user_attrs["command"].replace("--trials 5", "--trials 3")
    assert "me:***@host" in study.user_attrs["command"]
