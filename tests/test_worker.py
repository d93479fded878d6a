"""Workers as real processes: they rebuild everything from the study, share its trials, and survive one another."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import moeopt
from moeopt.cli import main
from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.study import finished, recipe, stalled
from moeopt.tasks import Example, MultipleChoiceTask
from moeopt.trials import genome

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Place:
    """A folder with a checkpoint (2 layers, 4 experts), and a task whose trials wait while there is a file `hold`."""

    folder: Path
    model: Any
    tokenizer: Any

    def objective(self, task: Any = None, **options: Any) -> moeopt.Objective:
        examples = [Example(str(i), f"{i} and 1 make", (f" {i + 1}", f" {i + 2}"), i % 2) for i in range(12)]
        chosen = MultipleChoiceTask("toy", examples) if task is None else task
        return moeopt.Objective(
            self.model, self.tokenizer, chosen, moeopt.EEPSpace.of(self.model, keep=2), limit=6, **options
        )

    def start(self, url: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A `moeopt` command on the storage at `url`, which comes by environment."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "moeopt", *arguments],
            cwd=self.folder,
            env={**os.environ, "MOEOPT_STORAGE": url, **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def worker(self, url: str, study: str, *more: str) -> subprocess.Popen[str]:
        return self.start(url, "worker", "--study", study, "--model", "model", "--device-map", "cpu", *more)


@pytest.fixture(scope="module")
def place(make_mixtral: Any, tiny_tokenizer: Any, slow_task: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("working")
    model = make_mixtral(layers=2, experts=4, hidden=16, intermediate=16)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "slow.py").write_text(slow_task)
    loaded, tokenizer = moeopt.load(folder / "model")
    return Place(folder, loaded, tokenizer)


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def storage(database: str, name: str) -> Iterator[str]:
    yield database
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name=name, storage=database)


def until(holds: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process said, once it ended with that code."""
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, err
    return out + err


def slow_study(place: Place, url: str, name: str, trials: int, **options: Any) -> optuna.Study:
    task = moeopt.tasks.get(f"{place.folder}/slow.py:Slow")
    study = moeopt.create_study(name, objective=place.objective(task), storage=url, **({"sampler": "random"} | options))
    recipe.want(study, trials)
    return study


@pytest.mark.slow
def test_workers_give_the_trials_asked_for_exactly_though_one_is_killed_in_a_trial(
    place: Place, storage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers go on together on SQLite, and one on a server, where tests/storage lets several run together."""
    slow_study(place, storage, name, 15, sampler="eep", initial=3, prune_until=8)
    task = ["--task", "slow.py:Slow"]
    (place.folder / "hold").touch()
    first, *others = [place.worker(storage, name, *task) for _ in range(3 if storage.startswith("sqlite") else 2)]
    until(lambda: all((place.folder / f"held.{process.pid}").exists() for process in (first, *others)))
    first.kill()
    first.communicate()
    (place.folder / "hold").unlink()
    for process in others:
        assert "15 trials done" in ended(process)
    trials = moeopt.load_study(name, storage).trials
    (dead,) = [trial for trial in trials if trial.state.name == "FAIL"]
    assert genome.origin(dead)["worker"]["pid"] == first.pid
    done = [trial for trial in trials if trial is not dead]
    assert [trial.state.name for trial in done] == ["COMPLETE"] * 15
    assert len({genome.slot(trial, trials) for trial in done}) == 15
    (again,) = [trial for trial in done if trial.system_attrs.get(genome.RETRIES) == [dead.number]]
    assert (genome.read(again) == genome.read(dead)).all()
    objective = place.objective(moeopt.tasks.get(f"{place.folder}/slow.py:Slow"))
    for trial in done:
        assert trial.value == objective.evaluator.evaluate(objective.space.plan(trial)).loss
    model = ["--model", str(place.folder / "model"), "--device-map", "cpu", "--task", f"{place.folder}/slow.py:Slow"]
    assert main(["worker", "--storage", storage, "--study", name, *model]) == 0
    assert "15 trials done" in capsys.readouterr().err
    assert len(moeopt.load_study(name, storage).trials) == 16


def test_a_worker_ends_by_the_patience_that_the_study_was_searched_with(place: Place, sqlite: str, name: str) -> None:
    study = moeopt.create_study(name, objective=place.objective(), storage=sqlite, sampler="random")
    moeopt.optimize(study, place.objective(), n_trials=1, patience=2)
    moeopt.run_worker(sqlite, name, model=place.folder / "model", device_map="cpu", n_trials=60)
    assert stalled(study) == 2
    assert finished(study) < 60
    moeopt.optimize(study, place.objective(), n_trials=finished(study) + 1)
    assert recipe.patience_of(study) is None


@pytest.mark.slow
def test_sigterm_hands_the_trial_on_at_once(place: Place, sqlite: str, name: str) -> None:
    study = slow_study(place, sqlite, name, 2)
    (place.folder / "hold").touch()
    first = place.worker(sqlite, name, "--task", "slow.py:Slow")
    until(lambda: (place.folder / f"held.{first.pid}").exists())
    first.terminate()
    assert "Interrupted" in ended(first, 130)
    (place.folder / "hold").unlink()
    assert study.trials[0].user_attrs[genome.INTERRUPTED]
    with pytest.raises(StudyError, match=r"does not hold its task .*'slow' is code of its own, Slow"):
        moeopt.run_worker(sqlite, name, model=place.folder / "model", device_map="cpu")
    task = moeopt.tasks.get(f"{place.folder}/slow.py:Slow")
    moeopt.run_worker(sqlite, name, model=place.folder / "model", device_map="cpu", task=task)
    assert finished(study) == 2


def changed(place: Place, folder: Path, change: str, make_mixtral: Any) -> Path:
    tokenizer = place.tokenizer
    model = make_mixtral(layers=2, experts=5 if change == "experts" else 4, hidden=16, intermediate=16)
    if change == "weights":
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[0, 0, 0] += 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if change == "tokenizer":
        file = folder / "tokenizer.json"
        body = json.loads(file.read_text())
        vocabulary = body["model"]["vocab"]
        vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
        file.write_text(json.dumps(body))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [("experts", "4 experts|experts=4"), ("weights", r"model\.weights"), ("tokenizer", "other token sequences")],
)
def test_another_checkpoint_is_refused(
    change: str, message: str, place: Place, sqlite: str, name: str, tmp_path: Path, make_mixtral: Any
) -> None:
    study = moeopt.create_study(name, objective=place.objective(), storage=sqlite)
    with pytest.raises(StudyError, match="how many trials"):
        moeopt.run_worker(sqlite, name, model=place.folder / "model")
    recipe.want(study, 2)
    with pytest.raises(StudyError, match="give the checkpoint"):
        moeopt.run_worker(sqlite, name)
    with pytest.raises(StudyError, match=message):
        moeopt.run_worker(sqlite, name, model=changed(place, tmp_path / "other", change, make_mixtral))
    assert not study.trials


def test_an_error_of_the_code_fails_the_trial_and_ends_the_worker_in_one_line(
    place: Place, sqlite: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = moeopt.create_study(name, objective=place.objective(), storage=sqlite)
    recipe.want(study, 2)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(MultipleChoiceTask, "reduce", broken)
    arguments = ["worker", "--storage", sqlite, "--study", name, "--model", str(place.folder / "model"), "--quiet"]
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "Error" in line] == [
        "Error: a trial failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    ]
    (trial,) = study.trials
    assert trial.state.name == "FAIL"
    assert "illegal memory access" in trial.user_attrs["failure"]


def out_of_memory() -> None:
    torch.empty(1 << 60)


def no_number() -> None:
    raise NonFiniteLossError("the loss is not finite: the MoE output of layer 1 is not", layer=1)


@pytest.mark.parametrize(("fail", "reason"), [(out_of_memory, "allocate memory"), (no_number, "not finite")])
def test_memory_that_runs_out_and_losses_that_are_none_fail_the_trial_and_not_the_worker(
    fail: Callable[[], None], reason: str, place: Place, sqlite: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = moeopt.create_study(name, objective=place.objective(), storage=sqlite, sampler="random")
    recipe.want(study, 4)
    real, calls = MultipleChoiceTask.reduce, []

    def reduce(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # the first is of the full model
            fail()
        return real(*arguments)

    monkeypatch.setattr(MultipleChoiceTask, "reduce", reduce)
    assert main(["worker", "--storage", sqlite, "--study", name, "--model", str(place.folder / "model")]) == 0
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert reason in study.trials[1].user_attrs["failure"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "nothere"], "nothere"),
        (["--study", "s", "--data", "x.jsonl"], "--task"),
        (["--study", "s", "--model", "/no/where"], "/no/where"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, place: Place, sqlite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    moeopt.create_study("s", objective=place.objective(), storage=sqlite)
    assert main(["worker", "--storage", sqlite, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_launcher_s_local_rank_chooses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeopt.study.workers.fleet import cores
    from moeopt.study.workers.worker import local_device, threads

    for variable in ("LOCAL_RANK", "SLURM_LOCALID", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_device() is None
    monkeypatch.setenv("SLURM_LOCALID", "6")
    assert local_device() == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == "cuda:3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert threads("auto") == {}
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert threads("auto") == {"OMP_NUM_THREADS": str(max(1, cores() // 2))}
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert threads("cpu") == {}
