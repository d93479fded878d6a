"""The demo on the shipped model, made short: what it shows is what an independent look at its output finds."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import moeopt
from moeopt.demo import DEFAULT_SKILL, MODEL, SKILLS
from moeopt.demo.result import FULL, MERGE, PRUNE, RANDOM, DemoResult, view
from moeopt.demo.run import run
from moeopt.demo.task import skill_task
from moeopt.errors import ExportError, StudyError, TaskError
from moeopt.exporting import why_not_stock
from moeopt.study import load_study, space_of

SHORT: dict[str, Any] = {"trials": 12, "initial": 4, "prune_until": 8, "examples": {"search": 6, "test": 10}}


def printed(result: DemoResult) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path]:
    out = tmp_path_factory.mktemp("demo")
    return run(out, svg=out / "demo.svg", **SHORT), out


def test_search_losses_are_those_of_the_study_and_test_losses_those_of_an_evaluator(
    done: tuple[DemoResult, Path],
) -> None:
    result, out = done
    study = load_study(f"{DEFAULT_SKILL}-8to4-seed0", f"sqlite:///{out / 'study.db'}")
    trials = study.get_trials()
    assert len(trials) == SHORT["trials"]
    assert [entry.search_loss for entry in result.random] == [trial.value for trial in trials[:4]]
    assert result.prune.search_loss == min(t.value for t in trials if t.user_attrs["phase"] == "prune")
    assert (result.merge or result.prune).search_loss == study.best_value
    model, tokenizer = moeopt.load(MODEL)
    evaluator = moeopt.Evaluator(model, tokenizer, skill_task(DEFAULT_SKILL), split="test", limit=10)
    for entry in (result.full, result.prune, result.random[0]):
        assert entry.test.loss == pytest.approx(evaluator.evaluate(entry.plan).loss, abs=1e-5)
    space = space_of(study)
    stock = [t for t in trials if why_not_stock(space.plan(t)) is None]
    assert result.exported_trial == min(stock, key=lambda t: (t.value, t.number)).number


def test_the_exported_checkpoint_has_the_size_and_the_score_that_are_shown(done: tuple[DemoResult, Path]) -> None:
    result, _ = done
    assert result.reloaded_loss == pytest.approx(result.exported_loss, abs=1e-5)
    assert result.exported_loss == pytest.approx(result.prune.test.loss, abs=1e-5)
    small = AutoModelForCausalLM.from_pretrained(result.exported)
    assert small.num_parameters() == result.prune.parameters
    assert AutoModelForCausalLM.from_pretrained(MODEL).num_parameters() == result.full.parameters
    stored = sum(file.stat().st_size for file in result.exported.glob("*.safetensors"))
    assert result.prune.bytes == pytest.approx(stored, rel=0.02)


def test_intervals_are_of_the_differences_that_they_are_named_after(done: tuple[DemoResult, Path]) -> None:
    result, _ = done
    mean = np.mean([entry.test.loss for entry in result.random])
    against_full, against_random = result.differences[PRUNE, FULL], result.differences[PRUNE, RANDOM]
    assert against_full.mean == pytest.approx(result.prune.test.loss - result.full.test.loss, abs=1e-5)
    assert against_random.mean == pytest.approx(result.prune.test.loss - mean, abs=1e-5)
    for interval in result.differences.values():
        assert interval.low <= interval.mean <= interval.high
    assert ((MERGE, PRUNE) in result.differences) == (result.merge is not None)


def test_the_view_shows_every_entry_and_says_when_merging_does_not_help(done: tuple[DemoResult, Path]) -> None:
    result, out = done
    text = printed(result)
    for entry in (result.full, result.prune):
        assert f"{entry.test.loss:.4f}" in text
        assert f"{entry.search_loss:.4f}" in text
    assert "4 random prunings" in text
    assert f"trial {result.exported_trial}" in text
    assert "<svg" in (out / "demo.svg").read_text()
    unmerged = {names: i for names, i in result.differences.items() if MERGE not in names}
    assert "before it merged" in printed(replace(result, merge=None, differences=unmerged))
    assert result.merge is not None
    worse = replace(result, merge=replace(result.merge, search_loss=result.prune.search_loss + 1))
    better = replace(result, merge=replace(result.merge, search_loss=result.prune.search_loss - 1))
    assert "No merged solution beat" in printed(worse)
    assert "No merged solution beat" not in printed(better)


def test_a_second_run_goes_on_where_the_first_stopped(done: tuple[DemoResult, Path], tmp_path: Path) -> None:
    whole, _ = done
    first = run(tmp_path, **{**SHORT, "trials": 7})
    assert first.merge is None
    again = run(tmp_path, **SHORT)
    assert (
        len(load_study(f"{DEFAULT_SKILL}-8to4-seed0", f"sqlite:///{tmp_path / 'study.db'}").trials) == SHORT["trials"]
    )
    assert again.prune.search_loss == whole.prune.search_loss
    assert (again.merge or again.prune).search_loss == (whole.merge or whole.prune).search_loss
    assert again.exported_trial == whole.exported_trial


def test_text_is_a_skill_too(tmp_path: Path) -> None:
    result = run(tmp_path, skill="text", trials=3, initial=2, prune_until=3, examples={"search": 2, "test": 2})
    assert 0 < result.full.test.loss < np.log(256)
    assert result.reloaded_loss == pytest.approx(result.exported_loss, abs=1e-5)


@pytest.mark.parametrize("skill", SKILLS)
def test_skill_tasks_have_disjoint_splits_of_the_skill(skill: str) -> None:
    task = skill_task(skill)
    prompts = {split: {(e.prompt, e.options) for e in task.examples(split)} for split in task.splits}
    assert set(prompts) == {"search", "dev", "test"}
    assert not prompts["search"] & prompts["test"]


def test_what_the_demo_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="did you mean 'caesar'"):
        run(tmp_path, skill="cesar", **SHORT)
    with pytest.raises(StudyError, match="at least 2"):
        run(tmp_path, **{**SHORT, "trials": 1})
    mine = tmp_path / f"{DEFAULT_SKILL}-4-experts" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    with pytest.raises(ExportError, match="not empty"):
        run(tmp_path, **SHORT)
    assert mine.read_text() == "keep me"
