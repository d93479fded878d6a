"""The demo on the shipped model, made short: what it shows is what an independent look at its output finds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import moeopt
from moeopt.cli import main
from moeopt.demo import DEFAULT_SKILL, MODEL, SKILLS
from moeopt.demo.result import FULL, RANDOM, DemoResult, view
from moeopt.demo.run import run
from moeopt.demo.task import skill_task
from moeopt.errors import ExportError, StudyError, TaskError
from moeopt.study import load_study
from moeopt.tasks.base import SPLITS

SHORT: dict[str, Any] = {"trials": 8, "examples": {"search": 6, "test": 10}}
STUDY = f"{DEFAULT_SKILL}-8to2-guided-seed0"


def printed(result: DemoResult) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path]:
    out = tmp_path_factory.mktemp("demo")
    return run(out, svg=out / "demo.svg", **SHORT), out


@pytest.mark.slow
def test_search_losses_are_those_of_the_study_and_test_losses_those_of_an_evaluator(
    done: tuple[DemoResult, Path],
) -> None:
    result, out = done
    study = load_study(STUDY, f"sqlite:///{out / 'study.db'}")
    trials = study.get_trials()
    assert len(trials) == SHORT["trials"]
    assert [(entry.name, entry.search_loss) for entry in result.one_shot] == [
        (trial.user_attrs["method"], trial.value) for trial in trials[:2]
    ]
    assert result.search.search_loss == study.best_value
    assert result.search.name.endswith(f"(trial {study.best_trial.number})")
    model, tokenizer = moeopt.load(MODEL)
    task, entries = (
        skill_task(DEFAULT_SKILL),
        (result.full, result.search, result.random[0], *result.one_shot, *result.refits),
    )
    search, test = (moeopt.Evaluator(model, tokenizer, task, split=s, limit=n) for s, n in SHORT["examples"].items())
    for entry in entries:
        assert entry.search_loss == pytest.approx(search.evaluate(entry.plan).loss, abs=1e-5)
        assert entry.test.loss == pytest.approx(test.evaluate(entry.plan).loss, abs=1e-5)
    assert len({entry.plan.fingerprint for entry in result.random if entry.plan is not None}) == len(result.random)


@pytest.mark.slow
def test_the_exported_checkpoint_has_the_size_and_the_score_that_are_shown(done: tuple[DemoResult, Path]) -> None:
    result, _ = done
    assert result.reloaded_loss == pytest.approx(result.refits[-1].test.loss, abs=1e-3)  # stored in bfloat16
    assert [entry.name for entry in result.refits] == [f"{e.name} + refit" for e in (*result.one_shot, result.search)]
    assert "down projections are fitted" in (result.exported / "README.md").read_text()
    small = AutoModelForCausalLM.from_pretrained(result.exported)
    assert small.num_parameters() == result.search.parameters
    assert AutoModelForCausalLM.from_pretrained(MODEL).num_parameters() == result.full.parameters
    stored = sum(file.stat().st_size for file in result.exported.glob("model*.safetensors"))
    assert result.search.bytes == pytest.approx(stored, rel=0.02)


@pytest.mark.slow
def test_intervals_are_of_the_differences_that_they_are_named_after(done: tuple[DemoResult, Path]) -> None:
    result, _ = done
    losses = {FULL: result.full.test.loss, RANDOM: np.mean([entry.test.loss for entry in result.random])}
    losses |= {entry.name: entry.test.loss for entry in (*result.one_shot, result.search, *result.refits[:-1])}
    assert set(result.differences) == {*losses}
    for name, interval in result.differences.items():
        assert interval.mean == pytest.approx(result.refits[-1].test.loss - losses[name], abs=1e-5)
        assert interval.low <= interval.mean <= interval.high


@pytest.mark.slow
def test_the_view_shows_every_entry(done: tuple[DemoResult, Path]) -> None:
    result, out = done
    text = printed(result)
    for entry in (result.full, result.search, *result.one_shot, *result.refits):
        assert f"{entry.test.loss:.4f}" in text
        assert f"{entry.search_loss:.4f}" in text
    assert "20 random prunings" in text
    assert "<svg" in (out / "demo.svg").read_text()


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_stopped(done: tuple[DemoResult, Path], tmp_path: Path) -> None:
    whole, _ = done
    run(tmp_path, **{**SHORT, "trials": 5})
    again = run(tmp_path, **SHORT)
    assert len(load_study(STUDY, f"sqlite:///{tmp_path / 'study.db'}").trials) == SHORT["trials"]
    assert again.search.search_loss == whole.search.search_loss
    assert again.search.name == whole.search.name
    assert again.refits[-1].plan == whole.refits[-1].plan


@pytest.mark.slow
def test_text_is_a_skill_too(tmp_path: Path) -> None:
    result = run(tmp_path, skill="text", trials=4, examples={"search": 4, "test": 2})
    assert 0 < result.full.test.loss < np.log(256)
    assert result.reloaded_loss == pytest.approx(result.refits[-1].test.loss, abs=1e-3)  # stored in bfloat16


def test_what_the_demo_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="did you mean 'caesar'"):
        run(tmp_path, skill="cesar", **SHORT)
    with pytest.raises(StudyError, match="at least 3"):
        run(tmp_path, **{**SHORT, "trials": 2})
    mine = tmp_path / f"{DEFAULT_SKILL}-2-experts" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    with pytest.raises(ExportError, match="not empty"):
        run(tmp_path, **SHORT)
    assert mine.read_text() == "keep me"


def test_a_copy_is_the_model_and_tasks_of_what_it_was_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tour"
    assert main(["demo", "--copy", str(out)]) == 0
    assert {file.name: file.read_bytes() for file in (out / "model").iterdir()} == {
        file.name: file.read_bytes() for file in MODEL.iterdir()
    }
    assert {file.stem for file in out.iterdir()} == {"model", *SKILLS}
    for skill, kind, data in (("caesar", "multiple_choice", "caesar.jsonl"), ("text", "text", "text")):
        task, shipped = moeopt.tasks.get(kind, out / data), skill_task(skill)
        held_out = {(example.prompt, example.options) for split in SPLITS for example in shipped.examples(split)}
        copied = [(example.prompt, example.options) for split in SPLITS for example in task.examples(split)]
        assert held_out.issuperset(copied), skill
        assert len(copied) == (18 if skill == "text" else 900)
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"moeopt search {out / 'model'} --task multiple_choice --data {out}/caesar.jsonl" in command
    assert main(["demo", "--copy", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
