"""Workers as actors of a local Ray cluster; one is killed, and Ray starts it again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import moeopt
from moeopt.errors import StudyError
from moeopt.study import finished, recipe
from moeopt.study.workers.on_ray import run_on_ray
from moeopt.tasks import Example, MultipleChoiceTask
from moeopt.trials import genome

ray = pytest.importorskip("ray")
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two cores, no GPU."""
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment},
        object_store_memory=100 << 20,
    )  # fmt: skip
    yield
    ray.shutdown()


def made(make_mixtral: Any, tokenizer: Any, folder: Path, trials: int, task: Any) -> optuna.Study:
    model = make_mixtral(layers=2, experts=4, hidden=16, intermediate=16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model, tokenizer = moeopt.load(folder / "model")
    objective = moeopt.Objective(model, tokenizer, task, moeopt.EEPSpace.of(model, keep=2), batch_tokens=64)
    study = moeopt.create_study("s", objective=objective, storage=f"sqlite:///{folder}/study.db")
    recipe.want(study, trials)
    return study


@pytest.mark.slow
def test_a_killed_actor_is_started_again_and_every_trial_is_run_once(
    cluster: None, make_mixtral: Any, tiny_tokenizer: Any, slow_task: str, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(slow_task)
    task = moeopt.tasks.get(f"{tmp_path}/slow.py:Slow")
    study = made(make_mixtral, tiny_tokenizer, tmp_path, 12, task)
    hold = tmp_path / "hold"
    hold.touch()
    killed: list[int] = []

    def kill_one() -> None:
        while not (held := list(tmp_path.glob("held.*"))):
            time.sleep(0.05)
        killed.append(int(held[0].suffix[1:]))
        os.kill(killed[0], signal.SIGKILL)
        hold.unlink()

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    run_on_ray(
        f"sqlite:///{tmp_path}/study.db", "s", workers=2, gpus_per_worker=0, model=str(tmp_path / "model"),
        device_map="cpu", task=task,
    )  # fmt: skip
    thread.join()
    trials = study.trials
    assert finished(study) == 12
    assert sum(trial.state.name == "COMPLETE" for trial in trials) == 12
    (dead,) = [trial for trial in trials if trial.state.name != "COMPLETE"]
    assert genome.origin(dead)["worker"]["pid"] == killed[0]
    (again,) = [trial for trial in trials if trial.system_attrs.get(genome.RETRIES)]
    assert again.system_attrs[genome.RETRIES] == [dead.number]


@pytest.mark.slow
def test_what_a_worker_raises_is_raised(cluster: None, make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    examples = [Example(str(i), f"{i} and 1 make", (f" {i + 1}", f" {i + 2}"), i % 2) for i in range(40)]
    made(make_mixtral, tiny_tokenizer, tmp_path, 2, MultipleChoiceTask("toy", examples))
    url, lines = f"sqlite:///{tmp_path}/study.db", []
    with pytest.raises(StudyError, match="give the checkpoint"):
        run_on_ray(url, "s", workers=1, gpus_per_worker=0, tell=lines.append)
    assert any("worker 1 failed" in line for line in lines)
    with pytest.raises(StudyError, match="no node of the Ray cluster has 2 GPUs, at most 0"):
        run_on_ray(url, "s", workers=1, gpus_per_worker=2)
    with pytest.raises(StudyError, match=r"whole number or below 1, got 1\.5"):
        run_on_ray(url, "s", workers=1, gpus_per_worker=1.5)
    with pytest.raises(StudyError, match="workers must be an integer of at least 1, got 0"):
        run_on_ray(url, "s", workers=0)
