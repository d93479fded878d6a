"""Refits where users meet them: the command, at the end of searches and selections, and in comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moeopt
from moeopt.cli import main
from moeopt.demo import MODEL
from moeopt.evaluation import Evaluator
from moeopt.methods import Calibration, refitting
from moeopt.plan import Plan
from moeopt.report.selection import refit_lines
from moeopt.results.method_comparison import compare
from moeopt.results.selection import judged_refit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of the shipped model's task, a pruning, and studies.db with the study `s`."""
    folder = tmp_path_factory.mktemp("refits")
    rows = moeopt.demo.rows("caesar", "search", 120)
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Plan.one_hot([[0, 1]] * 6, experts=8, k=2).save(folder / "pruned.safetensors")
    assert main(["search", str(MODEL), *goal(folder), "--keep", "2", "--space", "prune", *SEARCH, *study(folder)]) == 0
    return folder


SEARCH = ["--sampler", "random", "--trials", "2", "--warm-start", "none"]


def goal(folder: Path) -> list[str]:
    return ["--task", "multiple_choice", "--data", str(folder / "task.jsonl"), "--limit", "24"]


def study(folder: Path, name: str = "s") -> list[str]:
    return ["--study", name, "--storage", f"sqlite:///{folder / 'studies.db'}"]


@pytest.mark.slow
def test_the_command_writes_a_better_plan_that_exports(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fitted.safetensors"
    given = ["refit", str(MODEL), str(out), *goal(place), "--plan", str(place / "pruned.safetensors")]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "refitted 6 of 6 layers" in printed
    assert "better" in printed
    assert f"moeopt export {MODEL} OUT_DIR --plan {out}" in printed
    assert Plan.load(out).is_refitted
    assert list(tmp_path.iterdir()) == [out]
    assert main(["export", str(MODEL), str(tmp_path / "small"), "--plan", str(out)]) == 0
    assert "24 sequences of `multiple_choice`" in (tmp_path / "small" / "README.md").read_text()
    capsys.readouterr()
    assert main(given) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_cut_off_command_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--rank", "4", *goal(place), *study(place)]
    run, ran = refitting.LayerFitting.run, list[int]()

    def cut_off(self: Any, *arguments: Any) -> Any:
        ran.append(self.layer.index)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(refitting.LayerFitting, "run", cut_off)
    assert main(["refit", str(MODEL), str(tmp_path / "a.safetensors"), *given]) == 130
    assert "every layer that was fitted is kept" in " ".join(capsys.readouterr().err.split())
    assert main(["refit", str(MODEL), str(tmp_path / "a.safetensors"), *given]) == 0
    assert ran == [0, 1, 2, 2, 3, 4, 5]
    assert main(["refit", str(MODEL), str(tmp_path / "b.safetensors"), *given]) == 0
    assert Plan.load(tmp_path / "a.safetensors") == Plan.load(tmp_path / "b.safetensors")


def test_searches_and_selections_end_with_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("search", "select")}
    search = ["--keep", "2", "--space", "prune", *SEARCH, *study(place, "other"), "--limit", "24"]
    select = [*study(place), "--dev-limit", "6", "--test-limit", "6"]
    for command, more in (("search", search), ("select", select)):
        assert main([command, str(MODEL), *goal(place)[:-2], *more, "--refit", str(files[command])]) == 0
        printed = capsys.readouterr().out
        assert "refitted - plan:" in printed
        assert f"--plan {files[command]}" in printed
        about = Plan.about(files[command])["refit"]
        assert (about["sequences"], about["task"]["name"]) == (24, "multiple_choice")
        assert "refitted - plan: " in Plan.about(files[command])["judged"][1]
        assert Plan.load(files[command]).is_refitted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.txt"], "does not end in .safetensors"),
        (["nowhere/plan.safetensors"], "cannot write the refitted plan into"),
        (["new.safetensors", "--plan", "missing"], "no plan file"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(place)
    more = [] if "--plan" in arguments else ["--plan", "pruned.safetensors"]
    assert main(["refit", str(MODEL), *arguments, *more, *goal(place)]) == 2
    assert message in capsys.readouterr().err
    assert main(["search", str(MODEL), *goal(place), "--keep", "2", *study(place), "--refit", "plan.txt"]) == 2


def test_it_is_judged_on_dev() -> None:
    model, tokenizer = moeopt.load(MODEL)
    task = moeopt.demo.skill_task("caesar")
    plan = Plan.one_hot([[0, 1]] * 6, experts=8, k=2)
    fitted = moeopt.refit(plan, Calibration(model, tokenizer, task, limit=16)).plan
    said = refit_lines(judged_refit(plan, fitted, model, tokenizer, task, dev_limit=24))
    evaluator = Evaluator(model, tokenizer, task, split="dev", limit=24)
    assert f"refitted plan {evaluator.evaluate(fitted).loss:.4f}" in said[0]
    assert said[1].endswith("better")
    worse = judged_refit(fitted, plan, model, tokenizer, task, dev_limit=24)
    assert refit_lines(worse)[1].endswith("keep the plan as it was")
    without = moeopt.tasks.TextTask("text", search=["some text"] * 4, window=16)
    assert judged_refit(plan, fitted, model, tokenizer, without) is None


def test_what_a_refit_cannot_do_is_said_before_the_search(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*goal(place)[:-1], "3", "--keep", "2", *study(place, "few"), "--refit", str(tmp_path / "a.safetensors")]
    assert main(["search", str(MODEL), *few]) == 2
    assert "at least 4 sequences" in capsys.readouterr().err
    assert main(["show", *study(place, "few")[2:], "--json"]) == 0
    assert "few" not in [entry["name"] for entry in json.loads(capsys.readouterr().out)]


@pytest.mark.slow
def test_a_comparison_has_every_plan_refitted_too(tmp_path: Path) -> None:
    task, (model, tokenizer) = moeopt.demo.skill_task("caesar"), moeopt.load(MODEL)
    steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "keep": [2], "methods": ["naee", "reap"], "draws": 2, "limit": 16, "test_limit": 24, "refits": True,
        "out": tmp_path / "out",
    }  # fmt: skip
    made = compare(model, tokenizer, task, progress=lambda *step: steps.append(step[:2]), **options)
    rows = {row.name: row for row in made.rows}
    for name in ("best of 2 random", "naee", "reap"):
        plain, fitted = rows[name], rows[f"{name} + refit"]
        assert fitted.loss["test"] < plain.loss["test"]
        assert fitted.layer_tokens > plain.layer_tokens
        assert fitted.parameters == plain.parameters
        assert plain.plan is not None
        assert fitted.plan == moeopt.refit(plain.plan, Calibration(model, tokenizer, task, limit=16)).plan
    assert steps[-1][0] == steps[-1][1]
    best = made.best_one_shot(2, 2)
    assert best is not None
    assert not best.refitted
    again = compare(model, tokenizer, task, **options)
    assert [row.loss for row in again.rows] == [row.loss for row in made.rows]
    about = Plan.about(tmp_path / "out" / "plans" / "naee-refit-keep2-k2.safetensors")
    assert about["refit"]["sequences"] == 16


def test_a_refit_that_cannot_be_is_left_out_of_a_comparison() -> None:
    task = moeopt.demo.skill_task("caesar")
    options: dict[str, Any] = {"keep": [2], "methods": ["naee"], "draws": 2, "limit": 3, "test_limit": 6}
    made = compare(*moeopt.load(MODEL), task, refits=True, **options)
    assert [row.name for row in made.rows] == ["full model", "mean of 2 random", "best of 2 random", "naee"]
    assert len(made.left_out) == 2
    assert all("at least 4 sequences" in reason for reason in made.left_out)
