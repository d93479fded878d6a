"""`moeopt search --workers N`: processes that end with their search, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import moeopt
from moeopt.study import finished
from moeopt.study.workers import fleet


@pytest.fixture
def folder(make_mixtral: Any, tiny_tokenizer: Any, slow_task: str, tmp_path: Path) -> Path:
    make_mixtral(layers=2, experts=4, hidden=16, intermediate=16).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "slow.py").write_text(slow_task)
    (tmp_path / "hold").touch()
    return tmp_path


def search(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A search whose trials are held; its full model, which would be held before any worker is started, is left out."""
    arguments = ["search", "model", "--task", "slow.py:Slow", "--study", "s", "--keep", "2", "--sampler", "random"]
    arguments += ["--warm-start", "none"]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "moeopt", *arguments, "--trials", "6", "--workers", "2", "--no-reference", *more],
        cwd=folder,
        env={**os.environ, "MOEOPT_STORAGE": "sqlite:///study.db"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(holds: Callable[[], Any], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def held(folder: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.glob("held.*")]


def study(folder: Path) -> Any:
    return moeopt.load_study("s", f"sqlite:///{folder}/study.db")


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_ctrl_c_ends_all_after_their_trials(folder: Path) -> None:
    process = search(folder)
    until(lambda: len(held(folder)) == 2)
    (child,) = set(held(folder)) - {process.pid}
    assert psutil.Process(child).parent() == psutil.Process(process.pid)
    os.kill(child, signal.SIGKILL)
    until(lambda: len(held(folder)) == 3)
    (other,) = set(held(folder)) - {process.pid, child}
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    (folder / "hold").unlink()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "worker 2 was killed by signal 9; started again (1 of 3 times)" in err
    assert "moeopt search model --task slow.py:Slow" in err
    assert not psutil.pid_exists(other)
    states = [trial.state.name for trial in study(folder).trials]
    assert states.count("COMPLETE") == 2
    assert "RUNNING" not in states


@pytest.mark.slow
def test_workers_end_when_their_search_is_killed(folder: Path) -> None:
    process = search(folder)
    until(lambda: len(held(folder)) == 2)
    (child,) = set(held(folder)) - {process.pid}
    process.kill()
    process.communicate()
    (folder / "hold").unlink()
    until(lambda: not psutil.pid_exists(child))
    assert finished(study(folder)) < 6


def test_no_password_is_in_the_list_of_processes_or_in_what_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, lines = "postgresql+psycopg://user:geheim@127.0.0.1:1/nothing", []
    arguments = ["--study", "s", "--model", str(tmp_path)]
    with fleet.Fleet([{}], arguments, url, lines.append) as team:
        (place,) = team._places
        assert "geheim" not in " ".join(psutil.Process(place.process.pid).cmdline())
        until(lambda: place.ended)
    (line,) = lines
    assert line.startswith("worker 2 ended with exit code 2: Error:")
    assert line.endswith("; the others go on")
    assert "geheim" not in line


def test_devices_and_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert fleet.shared(2, "auto") == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert fleet.shared(5, "auto")[4] == {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-ab,2,1")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in fleet.shared(3, "auto")] == ["7", "GPU-ab", "2,1"]
    assert fleet.shared(2, "cuda:0") == [{}, {}]
    monkeypatch.setattr(fleet, "cores", lambda: 8)
    assert fleet.shared(3, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert fleet.shared(3, "cpu") == [{}] * 3


def test_a_database_in_memory_has_no_room_for_workers(folder: Path) -> None:
    refused = subprocess.run(
        [
            sys.executable, "-P", "-m", "moeopt", "search", "model", "--task", "slow.py:Slow", "--study", "s", "--keep",
            "2", "--workers", "2", "--storage", "sqlite://",
        ],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert json.dumps(refused.stderr).count("Error: ") == 1
    assert "memory" in refused.stderr
