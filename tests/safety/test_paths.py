"""Paths in a study are never followed: whatever a process opens is seen by Python's audit hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest

import moeopt
from moeopt.cli import arguments
from moeopt.results.selection import SELECTION
from moeopt.trials import genome
from moeopt.trials.description import DESCRIPTION

WATCHED = """
import json, os, sys
canary = os.environ["CANARY"]
def hook(event, args):
    if event.startswith(("open", "os.", "subprocess.", "shutil.", "glob.", "socket.", "pathlib.", "ctypes.dlopen")):
        if any(canary in str(arg) for arg in args):
            os.write(2, f"FOLLOWED {event} {args}\\n".encode())
            os._exit(99)
sys.addaudithook(hook)
from moeopt.cli import main
for words in json.loads(sys.argv[1]):
    print("CODE", main(words), flush=True)
"""
"""Runs commands, one after the other, and says what each ended with; at the first path that it watches, it ends."""


def watched(canary: Path, commands: list[list[str]], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCHED, json.dumps(commands)]
    environment = os.environ | {"CANARY": str(canary)}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_the_watch_sees_what_is_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "plan.pth").write_bytes(b"x")
    done = watched(canary, [["plan", "none"], ["plan", str(canary / "plan.pth"), "--layers", "2"], ["show"]], tmp_path)
    assert done.returncode == 99
    assert "FOLLOWED" in done.stderr
    assert done.stdout.split() == ["CODE", "2"]


@pytest.mark.slow
def test_no_command_follows_a_path_of_a_study(tmp_path: Path) -> None:
    canary, work = tmp_path / "canary", tmp_path / "work"
    canary.mkdir()
    work.mkdir()
    os.mkfifo(canary / "fifo")  # who opens it to read waits for ever
    (canary / "config.json").write_text("{}")
    shape = arguments.quick_shape(str(moeopt.demo.MODEL))
    assert shape is not None
    hostile.SPACES["demo"] = lambda: moeopt.PruneSpace(shape, keep=4)
    url = f"sqlite:///{work}/s.db"
    study = hostile.honest(url, space="demo")
    del hostile.SPACES["demo"]

    def places(value: Any, at: tuple[Any, ...]) -> Any:
        return str(canary / ("fifo" if len(at) % 2 else "config.json"))

    description = study.user_attrs[DESCRIPTION]
    description |= {key: str(canary / "fifo") for key in ("data", "plan", "path", "include_path", "source")}
    for at in hostile.paths(description):
        value = description
        for key in at:
            value = value[key]
        if isinstance(value, str) and at[0] in ("model", "task", "sampler", "pruner", "version"):
            description = hostile.replaced(description, at, places(value, at))
    description["task"] |= {"data": str(canary / "fifo"), "code": f"{canary}/task.py:task deadbeef"}
    hostile.set_study_attribute(work / "s.db", DESCRIPTION, description)
    record = json.loads(json.dumps(hostile.RECORD))
    record["sentences"] = record["warnings"] = [str(canary / "fifo")]
    hostile.set_study_attribute(work / "s.db", SELECTION, record)
    for key in (genome.ORIGIN,):
        text = json.dumps({"slot": 0, "operator": str(canary / "fifo"), "notes": {"file": str(canary / "fifo")}})
        statement = "UPDATE trial_system_attributes SET value_json = ? WHERE key = ? AND trial_id = 1"
        hostile.execute(work / "s.db", statement, text, key)
    place = ["--storage", url]
    before = sorted(work.rglob("*"))
    model = str(moeopt.demo.MODEL)
    commands: list[tuple[list[str], int]] = [
        (["show", *place], 0),
        (["show", "s", *place], 0),
        (["show", "s", "--json", *place], 0),
        (["plan", "--study", "s", *place], 0),
        (["worker", "--study", "s", *place], 2),
        (["verify", "no-such-folder"], 2),
        (["export", model, str(tmp_path / "out"), "--study", "s", "--trial", "selected", *place], 0),
    ]
    done = watched(canary, [words for words, _ in commands], work)
    assert "FOLLOWED" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE ")]
    assert codes == [code for _, code in commands], done.stderr
    assert sorted(work.rglob("*")) == before
    assert sorted(path.name for path in canary.iterdir()) == ["config.json", "fifo"]
