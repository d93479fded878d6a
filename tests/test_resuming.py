"""Every way to resume that moeopt prints or notes, run as it is said: by a shell, from another folder, by Python.

A shell takes every command apart. What it then calls runs in this process where one of its own is not the point.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna_dashboard import get_note

import moeopt
from moeopt.cli import main
from moeopt.evaluation import Evaluator
from moeopt.plan import Plan
from moeopt.report.dashboard import Refresh, Refresher
from moeopt.study.storage import open_storage
from moeopt.trials import genome

ROOT = Path(moeopt.__file__).parent.parent
LAYERS, EXPERTS, TRIALS = 3, 6, 7


@pytest.fixture(scope="module")
def folder(make_mixtral: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, rows and a plan, under names that a shell would take apart."""
    place = tmp_path_factory.mktemp("it's a place")
    make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16).save_pretrained(place / "a model")
    tiny_tokenizer.save_pretrained(place / "a model")
    rows = [{"prompt": f"{i} and 1 make", "options": [str(i + 1), str(i + 2)], "answer": i % 2} for i in range(60)]
    (place / "the $rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Plan.one_hot([[1, 3, 5]] * LAYERS, experts=EXPERTS, k=2).save(place / "a plan.safetensors")
    for name, does in (
        ("alone", f'exec {shlex.quote(sys.executable)} -P -m moeopt "$@"'),
        ("here", 'printf "%s\\0" "$PWD" "${MOEOPT_STORAGE-}" "$@" > "$CALL"'),
    ):
        (place / name).mkdir()
        (place / name / "moeopt").write_text(f"#!/bin/sh\n{does}\n")
        (place / name / "moeopt").chmod(0o755)
    return place


def run(command: str, folder: Path, cwd: Path, alone: bool = False, **env: str) -> None:
    """A command as a user pastes it into a shell, with nothing of this process's environment that names a storage.

    What it calls runs in a process of its own (`alone`), or is called here in the folder and with the storage that the
    shell gives it.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "MOEOPT_STORAGE"}
    path = f"{folder / ('alone' if alone else 'here')}:{os.environ['PATH']}"
    call = cwd.parent / "call"
    full = {**inherited, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CALL": str(call), **env}
    done = subprocess.run(["sh", "-c", command], cwd=cwd, env=full, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if alone:
        return
    there, storage, *arguments = call.read_text().split("\0")[:-1]
    call.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(there)
        patch.delenv("MOEOPT_STORAGE", raising=False)
        if storage:
            patch.setenv("MOEOPT_STORAGE", storage)
        assert main(arguments) == 0, command


def by_slot(url: str, name: str) -> dict[int, Any]:
    """Loss, operator and genotype of every trial with a loss, by its place in the sequence of proposals."""
    trials = optuna.load_study(study_name=name, storage=url).get_trials()
    done = [trial for trial in trials if trial.value is not None]
    return {
        genome.slot(t, trials): (t.value, t.user_attrs.get("operator"), np.asarray(genome.read(t)).tobytes())
        for t in done
    }


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, presses Ctrl-C in its third trial, and gives the command that it prints to go on with."""
    whole = moeopt.Objective.__call__

    def run_until(*arguments: str, code: int = 130) -> str:
        calls = 0

        def dying(self: moeopt.Objective, trial: Any) -> float:
            nonlocal calls
            calls += 1
            if calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return whole(self, trial)

        monkeypatch.setattr(moeopt.Objective, "__call__", dying)
        capfd.readouterr()
        assert main(list(arguments)) == code
        monkeypatch.setattr(moeopt.Objective, "__call__", whole)
        *_, before, last = capfd.readouterr().err.splitlines()
        assert before.endswith(("To resume:", "To go on:", "(***: what is secret)"))
        return last.strip()

    return run_until


def noted(url: str, name: str) -> str:
    """What the note of a study says how to resume it: the code in its first block."""
    storage = open_storage(url)
    Refresher(optuna.storages.get_storage(storage), url).refresh()
    text = get_note(optuna.load_study(study_name=name, storage=storage))
    block = re.search(r"### How to resume\n\n.*?(?P<fence>```+)\w+\n(.*?)\n(?P=fence)", text, re.DOTALL)
    assert block is not None, text
    return block[2]


GOAL = ["--task", "multiple_choice", "--data", "the $rows.jsonl", "--trials", str(TRIALS)]
SEARCHES: dict[str, list[str]] = {
    "eep, its options": ["--keep", "3", "--limit", "4", "--sampler-option", "initial=3", "--sampler-option",
                         "prune_until=5", "--seed", "3"],
    "eep, as many trials say": ["--keep", "3", "--limit", "4", "--task-option", "delimiter= = "],
    "local, raced": ["--keep", "3", "--limit", "24", "--rungs", "2", "--sampler", "local", "--sampler-option",
                     "widths=[1, 2]", "--no-resume"],
    "warm starts": ["--keep", "3", "--limit", "4", "--warm-start", "frequency", "--warm-start", "a plan.safetensors",
                    "--sampler", "random"],
    "active experts": ["--limit", "4", "--space", "active", "--around", "a plan.safetensors", "--active", "1-2",
                       "--skip", "0.5", "--active-groups", "0-0,1-2", "--active-weight", "0.1", "--sampler", "cmaes"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_printed_and_what_is_noted_resume(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., str]
) -> None:
    monkeypatch.chdir(folder)
    study = f"a 'study' of {name}"
    search = ["search", "a model", *GOAL, *SEARCHES[name], "--study", study]
    whole, part = (f"sqlite:///{tmp_path}/{which} it.db" for which in ("all of", "part of"))
    assert main([*search, "--storage", whole]) == 0
    expected = by_slot(whole, study)
    assert len(expected) == TRIALS
    if name == "warm starts":  # the storage comes by environment, in a folder of its own
        monkeypatch.setenv("MOEOPT_STORAGE", part)
        printed, env = interrupted(*search), {"MOEOPT_STORAGE": part}
    else:
        printed, env = interrupted(*search, "--storage", part), {}
    assert 0 < len(by_slot(part, study)) < TRIALS
    resume = noted(part, study)
    monkeypatch.delenv("MOEOPT_STORAGE", raising=False)
    file = Path(part.removeprefix("sqlite:///"))
    shutil.copy(file, tmp_path / "kept.db")
    for command, cwd, more in ((printed, folder, env), (resume, tmp_path, {})):
        shutil.copy(tmp_path / "kept.db", file)
        run(command, folder, cwd, alone=command == printed and name == "eep, its options", **more)
        resumed = by_slot(part, study)
        if "local" in name:  # which goes by measured costs, and a new process has no hidden states to reuse
            assert resumed.keys() == expected.keys()
            assert {operator for _, operator, _ in resumed.values()} <= {"enqueued", "swap", "route", "remap"}
        else:
            assert resumed == expected
        assert not list(folder.glob("*.db"))


@pytest.mark.slow
def test_a_relative_storage_and_what_a_search_prints_at_its_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "a model", tmp_path / "a model")
    shutil.copy(folder / "the $rows.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    search = ["search", "a model", *GOAL, "--keep", "3", "--limit", "4", "--space", "prune", "--sampler", "random"]
    assert main([*search, "--storage", "sqlite:///here.db", "--study", "-x y"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  moeopt")]
    assert [line.split()[1] for line in lines] == ["show", "export"]
    for line in lines:
        run(line, folder, tmp_path)
    assert (tmp_path / "OUT_DIR" / "config.json").is_file()
    again = noted("sqlite:///here.db", "-x y")
    (tmp_path / "elsewhere").mkdir()
    run(f"{again} --trials {TRIALS + 2}", folder, tmp_path / "elsewhere")
    assert len(by_slot("sqlite:///here.db", "-x y")) == TRIALS + 2
    assert noted("sqlite:///here.db", "-x y").endswith(f"--trials {TRIALS + 2}")


def test_what_is_secret_is_put_in_by_hand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., str]
) -> None:
    monkeypatch.chdir(folder)
    url = f"sqlite:///{tmp_path}/x.db?password=geheim"
    search = ["search", "a model", *GOAL, "--keep", "3", "--limit", "4", "--sampler", "random", "--study", "s"]
    printed = interrupted(*search, "--storage", url)
    resume = noted(url, "s")
    for command in (printed, resume):
        assert "geheim" not in command
        assert command.count("***") == 1
    run(resume.replace("***", "geheim"), folder, tmp_path)
    assert len(by_slot(url, "s")) == TRIALS


@pytest.mark.slow
def test_a_worker_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., str]
) -> None:
    monkeypatch.chdir(folder)
    url = f"sqlite:///{tmp_path}/x.db"
    search = ["search", "a model", *GOAL, "--keep", "3", "--limit", "4", "--study", "s", "--storage", url]
    interrupted(*search)
    monkeypatch.setenv("MOEOPT_STORAGE", url)
    printed = interrupted("worker", "--study", "s", "--model", "a model", code=0)
    assert len(by_slot(url, "s")) == 6
    run(printed, folder, folder, alone=True, MOEOPT_STORAGE=url)
    assert len(by_slot(url, "s")) == TRIALS


def test_select_and_compare_methods_say_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    goal = ["a model", "--task", "multiple_choice", "--data", "the $rows.jsonl"]
    where = ["--study", "s", "--storage", f"sqlite:///{tmp_path}/x.db"]
    assert main(["search", *goal, "--keep", "3", "--limit", "4", "--trials", "4", "--sampler", "random", *where]) == 0
    for command in (
        ["select", *goal, *where, "--top", "2", "--dev-limit", "4", "--test-limit", "4"],
        ["compare-methods", *goal, "--keep", "3", "--limit", "4", "--test-limit", "4", "--methods", "frequency",
         "--draws", "1", "--out", str(tmp_path / "an out")],
    ):  # fmt: skip
        race = Evaluator.race

        def stopped(*given: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(Evaluator, "race", stopped)
        capfd.readouterr()
        assert main(command) == 130
        monkeypatch.setattr(Evaluator, "race", race)
        run(capfd.readouterr().err.splitlines()[-1], folder, folder)


# What the pages say -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_of_the_pages_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their `moeopt search` and `moeopt worker`, on a model and a task that are here: again and again on one study."""
    text = "".join((ROOT / "docs" / "how-to" / page).read_text() for page in ("search.md", "workers.md"))
    blocks = re.findall(r"```console unrun\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    wanted = [line.partition(" #")[0] for line in lines if re.match(r"moeopt (search|worker) ", line)]
    search = next(line for line in wanted if "--storage" in line and " search " in line)
    worker = next(line for line in wanted if line.startswith("moeopt worker --study boolq-8to4"))
    url = f"sqlite:///{tmp_path}/moeopt.db"
    for old, new in {
        "mistralai/Mixtral-8x7B-Instruct-v0.1": "'a model'", "--task boolq": "--task multiple_choice --data '{rows}'",
        "--keep 4": "--keep 3", "--groups 4": "--groups 2", "--trials 150": "--trials {trials} --limit 4",
        "sqlite:///moeopt.db": url, "--device-map auto": "--device-map cpu",
    }.items():  # fmt: skip
        assert old in search
        search = search.replace(old, new)
    for trials in (3, 5):
        run(search.format(rows="the $rows.jsonl", trials=trials), folder, folder)
        assert len(by_slot(url, "boolq-8to4")) == trials
    for line in (f"export MOEOPT_STORAGE={url}; {worker} --trials 6",):
        run(line.replace("/models/mixtral", "'a model'"), folder, folder)
    assert len(by_slot(url, "boolq-8to4")) == 6


# What a note says to Python -----------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "eep": {"sampler": "eep", "initial": 2, "prune_until": 4, "band": 0.1},
    "local": {"sampler": "local", "widths": [1, 2], "moves": ["swap"]},
    "cmaes": {"sampler": "sepcmaes", "sigma": 0.2, "population_size": 3},
    "tpe": {"sampler": "tpe", "n_startup_trials": 2, "multivariate": True},
    "nevergrad": {"sampler": "nevergrad:DE", "budget": 20},
    "raced": {"sampler": "random", "redraw": 0, "pruner": "racing"},
    "an object": {"sampler": optuna.samplers.TPESampler(n_startup_trials=2)},
    "another start": {"sampler": "blockcmaes", "start": "plan"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_python_of_a_note_resumes(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = moeopt.load(folder / "a model")
    task = moeopt.tasks.get("multiple_choice", data=str(folder / "the $rows.jsonl"))
    space = moeopt.PruneSpace.of(model, keep=3)
    limit = {"limit": 16, "rungs": 2} if name == "raced" else {"limit": 4}
    objective = moeopt.Objective(model, tokenizer, task, space, **limit)
    options = dict(OPTIONS[name])
    if "start" in options:
        options["start"] = Plan.load(folder / "a plan.safetensors")
    made = dict(objective=objective, seed=3, **options)
    whole = moeopt.create_study("s", storage=f"sqlite:///{tmp_path}/whole.db", **made)
    moeopt.optimize(whole, objective, n_trials=6)
    monkeypatch.chdir(tmp_path)
    study = moeopt.create_study("s", storage="sqlite:///x.db", **made)
    moeopt.optimize(study, objective, n_trials=4)
    moeopt.study.recipe.want(study, 6)
    Refresh(every=0.0)(study)
    text = get_note(study)
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(code[1], {"moeopt": moeopt, "objective": objective, "sampler": OPTIONS["an object"]["sampler"]})
    assert by_slot(f"sqlite:///{tmp_path}/x.db", "s") == by_slot(f"sqlite:///{tmp_path}/whole.db", "s")
    assert not list(Path().iterdir())
