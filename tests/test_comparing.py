"""Comparisons: the numbers are those of direct evaluation, nothing is computed twice, bad input is one clear line."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

import moeopt
from moeopt import methods, report
from moeopt.cli import main
from moeopt.demo import MODEL
from moeopt.demo import task as demo_task
from moeopt.errors import MethodError, StudyError
from moeopt.evaluation import Evaluator, Interval, paired_bootstrap
from moeopt.plan import LayerPlan, Plan
from moeopt.report.method_comparison import sentences, table, view
from moeopt.results import method_comparison as comparing
from moeopt.results.method_comparison import ComparisonError, MethodComparison, Row, compare
from moeopt.tasks import MultipleChoiceTask

KEEP, DRAWS, TEST_DRAWS, SEED = 4, 3, 2, 3
LIMITS = {"search": 4, "dev": 3, "test": 3}
NAMES = ("reap", "naee", "naee_progressive")
SMALL: dict[str, Any] = {
    "keep": [KEEP], "methods": ["reap", "naee"], "draws": DRAWS, "test_draws": TEST_DRAWS, "seed": SEED,
    "limit": LIMITS["search"], "test_limit": LIMITS["test"],
}  # fmt: skip


skill_task = cache(demo_task.skill_task)


@dataclass(frozen=True)
class Demo:
    """The demo model, its tokenizer, and a task."""

    model: Any
    tokenizer: Any
    task: Any

    def compare(self, **options: Any) -> MethodComparison:
        options = SMALL | options
        return compare(self.model, self.tokenizer, options.pop("task", self.task), **options)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(*moeopt.load(MODEL), skill_task("caesar"))


@pytest.fixture(scope="module")
def study(demo: Demo) -> optuna.Study:
    """Four trials: three random prunings, and a better plan that merges a little."""
    space = moeopt.EEPSpace.of(demo.model, keep=KEEP)
    objective = moeopt.Objective(demo.model, demo.tokenizer, demo.task, space, limit=LIMITS["search"])
    calibration = methods.Calibration(demo.model, demo.tokenizer, demo.task, limit=LIMITS["search"])
    pruned = methods.plan("soft_activation", calibration, keep=KEEP)
    merged = [LayerPlan(8, 2, w_em=x.expert_matrix + 0.01, w_rm=x.expert_matrix, router="prob") for x in pruned.layers]
    made = moeopt.create_study(
        "s", objective=objective, storage=None, sampler="eep", warm_starts=[Plan(tuple(merged))], initial=8
    )
    moeopt.optimize(made, objective, n_trials=4)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "out"


@pytest.fixture(scope="module")
def compared(demo: Demo, study: optuna.Study, folder: Path) -> MethodComparison:
    made = demo.compare(methods=NAMES, active=[2, 1], skipping=True, study=study, out=folder)
    report.save(made, folder)
    return made


@pytest.fixture(scope="module")
def evaluators(demo: Demo) -> dict[str, Evaluator]:
    return {
        split: Evaluator(demo.model, demo.tokenizer, demo.task, split=split, limit=n) for split, n in LIMITS.items()
    }


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time; `compared` has them."""
    monkeypatch.setattr("moeopt.report.method_comparison.find_spec", lambda name: None)


def row(compared: MethodComparison, name: str, k: int = 2) -> Row:
    return next(row for row in compared.rows if (row.name, row.k) == (name, k))


@dataclass
class Calls:
    """How often plans were evaluated, and passes of a calibration made."""

    evaluated: int = 0
    passes: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    race, watching = Evaluator.race, methods.Calibration.watching

    def counting_race(self: Evaluator, *args: Any) -> Any:
        counted.evaluated += 1
        return race(self, *args)

    def counting_watch(self: methods.Calibration, *args: Any, **options: Any) -> Any:
        counted.passes += 1
        return watching(self, *args, **options)

    monkeypatch.setattr(Evaluator, "race", counting_race)
    monkeypatch.setattr(methods.Calibration, "watching", counting_watch)
    return counted


@pytest.fixture(scope="module")
def calibration(demo: Demo) -> methods.Calibration:
    return methods.Calibration(demo.model, demo.tokenizer, demo.task, limit=LIMITS["search"])


@pytest.mark.slow
def test_every_row_is_scored_as_the_evaluator_does(
    compared: MethodComparison, evaluators: dict[str, Evaluator]
) -> None:
    for line in compared.rows:
        for split, evaluator in evaluators.items():
            if line.kind != "random":
                scores = evaluator.evaluate(line.plan)
                assert np.array_equal(line.evaluations[split].scores, scores.scores)
                assert (line.loss[split], line.accuracy[split]) == (scores.loss, scores.accuracy)
                assert line.active == line.evaluations["test"].active


@pytest.mark.parametrize("k", [2, 1])
def test_methods_are_those_of_the_methods_room(
    compared: MethodComparison, calibration: methods.Calibration, k: int
) -> None:
    for name, expected in methods.plans(NAMES, calibration, keep=KEEP, k=k).items():
        line = row(compared, name, k)
        assert (line.plan, line.layer_tokens) == (expected.plan, expected.layer_tokens)
        assert (line.keep, line.kind, line.active) == (KEEP, "method", k)
    assert compared.calibrated == comparing.Calibrated("demo:caesar", True, calibration.sequences, calibration.tokens)


def test_skipping_is_calibrated_for_every_plan_of_two_active_experts(
    compared: MethodComparison, calibration: methods.Calibration
) -> None:
    plain = [line for line in compared.rows if line.k == 2 and not line.skips and line.kind != "random"]
    assert len(plain) == 1 + 1 + len(NAMES) + 2
    assert not any(line.skips for line in compared.rows if line.k == 1)
    for line in plain:
        skipped = row(compared, f"{line.name} + skipping")
        plan = Plan.identity(6, 8, 2) if line.plan is None else line.plan
        assert skipped.plan == methods.skipping(plan, calibration)
        assert skipped.layer_tokens == line.layer_tokens + 6 * calibration.tokens
        assert 1 < skipped.active < 2


def test_the_full_model_comes_first_and_with_fewer_active_experts(
    compared: MethodComparison, evaluators: dict[str, Evaluator]
) -> None:
    assert compared.rows[0] is compared.full
    assert (compared.full.plan, compared.full.against_full) == (None, None)
    fewer = row(compared, "full model", 1)
    assert (fewer.plan, fewer.active) == (Plan.identity(6, 8, 1), 1)
    assert compared.splits == {s: comparing.Size(e.examples, e.tokens) for s, e in evaluators.items()}


@pytest.mark.parametrize("k", [2, 1])
def test_random_prunings_are_drawn_and_the_best_is_chosen_on_search(
    compared: MethodComparison, evaluators: dict[str, Evaluator], k: int
) -> None:
    plans = []
    for draw in range(DRAWS):
        rngs = [np.random.default_rng([SEED, draw, layer]) for layer in range(6)]
        kept = [sorted(rng.permutation(8)[:KEEP].tolist()) for rng in rngs]
        plans.append(Plan.one_hot(kept, experts=8, k=k))
    mean = row(compared, f"mean of {DRAWS} random", k)
    for split, n in (("search", DRAWS), ("dev", TEST_DRAWS), ("test", TEST_DRAWS)):
        scored = [evaluators[split].evaluate(plan) for plan in plans[:n]]
        assert mean.loss[split] == pytest.approx(np.mean([e.loss for e in scored]), rel=1e-12)
        assert mean.loss_sd[split] == pytest.approx(np.std([e.loss for e in scored]), rel=1e-12)
        assert mean.accuracy[split] == pytest.approx(np.mean([e.accuracy for e in scored]), rel=1e-12)
        assert mean.drawn[split] == n
    losses = [evaluators["search"].evaluate(plan).loss for plan in plans]
    assert row(compared, f"best of {DRAWS} random", k).plan == plans[int(np.argmin(losses))]
    assert mean.plan is None
    assert mean.against_full is None


def test_intervals_are_those_of_the_paired_bootstrap_on_test(compared: MethodComparison) -> None:
    full = compared.full.evaluations["test"]
    for line in compared.rows[1:]:
        if line.kind == "random":
            continue
        assert line.against_full == paired_bootstrap(line.evaluations["test"], full)
        best = compared.best_one_shot(line.keep, line.k)
        if line.kind == "full" or line is best:
            assert line.against_best is None
        else:
            assert best is not None
            assert line.against_best == paired_bootstrap(line.evaluations["test"], best.evaluations["test"])


def mixed_task(*, dev: bool = True, test: bool = True) -> MultipleChoiceTask:
    """What is best on search and dev is not on test: that is another skill."""
    caesar, dates = skill_task("caesar"), skill_task("dates")
    parts = caesar.examples("search"), caesar.examples("dev") if dev else (), dates.examples("test") if test else ()
    return MultipleChoiceTask("mixed", *parts)


@pytest.mark.slow
def test_the_best_one_shot_method_is_chosen_on_dev_never_on_test(demo: Demo) -> None:
    compared = demo.compare(task=mixed_task(), methods=NAMES, draws=0)
    lines = [row(compared, name) for name in NAMES]
    least = {split: min(lines, key=lambda line: line.loss[split]).name for split in ("dev", "test")}
    assert least["dev"] != least["test"]
    best = compared.best_one_shot(KEEP, 2)
    assert best is not None
    assert (best.name, compared.chosen_on) == (least["dev"], "dev")
    assert row(compared, least["test"]).against_best == paired_bootstrap(
        row(compared, least["test"]).evaluations["test"], best.evaluations["test"]
    )


def test_without_dev_search_chooses_and_without_test_nothing_is_claimed(demo: Demo) -> None:
    compared = demo.compare(task=mixed_task(dev=False, test=False), methods=["naee", "reap"])
    assert (list(compared.splits), compared.chosen_on) == (["search"], "search")
    best = compared.best_one_shot(KEEP, 2)
    assert best is min((row(compared, name) for name in ("naee", "reap")), key=lambda line: line.loss["search"])
    assert all(line.against_full is None and line.against_best is None for line in compared.rows)
    assert "no test split" in sentences(compared, KEEP)[0]
    assert "Interval" not in printed(compared, 120)


def test_task_agnostic_methods_look_at_another_task(demo: Demo) -> None:
    text = skill_task("text")
    compared = demo.compare(methods=["naee", "reap"], calibration=text, calibration_limit=3, draws=0)
    calibration = methods.Calibration(demo.model, demo.tokenizer, text, limit=3)
    expected = methods.plans(["naee", "reap"], calibration, keep=KEEP)
    assert row(compared, "naee").plan == expected["naee"].plan
    assert row(compared, "reap").plan == expected["reap"].plan
    assert compared.calibrated == comparing.Calibrated("demo:text", False, 3, calibration.tokens)
    assert "another task, demo:text" in printed(compared, 200)


def test_a_second_run_evaluates_and_calibrates_nothing(
    demo: Demo, study: optuna.Study, compared: MethodComparison, folder: Path, calls: Calls
) -> None:
    files = {name: (folder / name).read_bytes() for name in ("table.csv", "table.json", "records.jsonl")}
    again = demo.compare(methods=NAMES, active=[2, 1], skipping=True, study=study, out=folder)
    report.save(again, folder)
    assert (calls.evaluated, calls.passes) == (0, 0)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert [line.plan for line in again.rows] == [line.plan for line in compared.rows]
    more = demo.compare(methods=[*NAMES, "ean"], out=folder)
    assert (calls.evaluated, calls.passes) == (3, 1)
    assert row(more, "naee").loss == row(compared, "naee").loss


def test_steps_are_counted_beforehand(demo: Demo, study: optuna.Study) -> None:
    seen: list[tuple[int, int, str]] = []
    options: dict[str, Any] = {"keep": [KEEP], "methods": ["reap", "naee_progressive"], "skipping": True}
    demo.compare(
        **options, draws=2, limit=2, test_limit=2, active=[1, 2], study=study, progress=lambda *step: seen.append(step)
    )
    total = seen[0][1]
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {steps for _, steps, _ in seen} == {total}
    assert seen[-1][2] == "done"


def test_plans_that_are_gone_or_others_are_made_again(demo: Demo, tmp_path: Path, calls: Calls) -> None:
    options: dict[str, Any] = {"methods": ["naee", "reap"], "draws": 0, "out": tmp_path}
    first = demo.compare(**options)
    (tmp_path / "plans" / "naee-keep4-k2.safetensors").unlink()
    row(first, "naee").plan.save(tmp_path / "plans" / "reap-keep4-k2.safetensors")  # type: ignore[union-attr]
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('17\n[]\n{}\n\x00\n{"kind": "plan"}\n{"kind": "evaluation", "scores": 3}\n')
    calls.evaluated = calls.passes = 0
    again = demo.compare(**options)
    assert (calls.evaluated, calls.passes) == (0, 1)
    assert [line.plan for line in again.rows] == [line.plan for line in first.rows]


def test_the_folder_of_something_else_is_refused_by_what_differs(
    demo: Demo, folder: Path, compared: MethodComparison, make_mixtral: Any
) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ComparisonError, match=r"task\.name: it has 'demo:caesar', now 'demo:dates'"):
        demo.compare(task=skill_task("dates"), calibration=demo.task, out=folder)
    with pytest.raises(ComparisonError, match=r"calibration\.name: it has 'demo:caesar', now 'demo:text'"):
        demo.compare(calibration=skill_task("text"), out=folder)
    with pytest.raises(ComparisonError, match=r"model\.weights"):
        Demo(make_mixtral(experts=8), demo.tokenizer, demo.task).compare(out=folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("other", "x", "not empty"), ("comparison.json", "{", "cannot be read"),
        ("comparison.json", '{"format": "songs"}', "another program"), (None, "x", "is a file"),
    ],
)  # fmt: skip
def test_folders_that_cannot_serve_are_refused(
    demo: Demo, tmp_path: Path, file: str | None, content: str, named: str
) -> None:
    folder = tmp_path / "out"
    if file is not None:
        folder.mkdir()
    (folder / file if file is not None else folder).write_text(content)
    with pytest.raises(ComparisonError, match=named):
        demo.compare(out=folder)


def test_files_hold_every_row(compared: MethodComparison, tmp_path: Path) -> None:
    report.save(compared, tmp_path)
    record = json.loads((tmp_path / "table.json").read_text())
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(record["rows"]) == len(compared.rows)
    best = {(line["keep"], line["k"], line["name"]) for line in record["best_one_shot"]["methods"]}
    for line, cells, entry in zip(compared.rows, table, record["rows"]):
        assert entry["name"] == cells["name"] == line.name
        assert (int(cells["keep"]), int(cells["k"])) == (line.keep, line.k)
        assert int(cells["parameters"]) == entry["parameters"] == line.parameters
        for split in line.loss:
            assert float(cells[f"{split}_loss"]) == entry["scores"][split]["loss"] == line.loss[split]
            assert float(cells[f"{split}_accuracy"]) == line.accuracy[split]
        against = entry["test_minus_full"] or {}
        assert against.get("low") == (line.against_full and line.against_full.low)
        assert cells["test_minus_full_low"] == str(against.get("low", ""))
        if line.plan is not None:
            assert Plan.load(tmp_path / entry["file"]) == line.plan
            assert entry["plan"] == cells["plan"] == line.plan.fingerprint
        assert entry["best_one_shot"] == (cells["best_one_shot"] == "True") == ((line.keep, line.k, line.name) in best)
    assert record["splits"]["test"] == {"examples": 3, "tokens": compared.splits["test"].tokens}
    assert str(MODEL) not in (tmp_path / "table.json").read_text()


def test_there_are_figures_where_something_can_draw_them(
    compared: MethodComparison, folder: Path, tmp_path: Path
) -> None:
    assert (folder / "methods.html").stat().st_size > 1000
    assert (folder / "methods.png").read_bytes().startswith(b"\x89PNG")
    report.save(compared, tmp_path)
    assert (tmp_path / "table.json").is_file()
    assert not list(tmp_path.glob("methods.*"))


def test_the_study_joins_with_its_best_trial_and_its_best_pruning(
    study: optuna.Study, compared: MethodComparison
) -> None:
    space = moeopt.study.space_of(study)
    ranked = sorted(study.trials, key=lambda trial: trial.value)
    pruned = next(trial for trial in ranked if space.plan(trial).is_one_hot)
    assert pruned.number != ranked[0].number
    for name, trial in (("search", ranked[0]), ("search, pruning only", pruned)):
        line = row(compared, name)
        assert line.plan == space.plan(trial)
        assert line.loss["search"] == pytest.approx(trial.value, abs=1e-12)
        assert line.layer_tokens == sum(trial.user_attrs["layer_tokens"] for trial in study.trials)
        assert line.against_best is not None
    assert any("search is worse" in s or "search beats" in s or "no difference" in s for s in sentences(compared, KEEP))


def test_a_study_says_which_method_it_started_from(demo: Demo) -> None:
    space = moeopt.PruneSpace.of(demo.model, keep=KEEP)
    objective = moeopt.Objective(demo.model, demo.tokenizer, demo.task, space, limit=4)
    study = moeopt.create_study("warm", objective=objective, storage=None, sampler="random")
    plan = Plan.one_hot([range(KEEP)] * 6, experts=8, k=2)
    moeopt.enqueue(study, space, plan, method="naee")
    moeopt.optimize(study, objective, n_trials=1)
    compared = demo.compare(methods=["reap"], study=study, draws=0)
    assert row(compared, "search (from naee)").plan == plan
    assert [line.kind for line in compared.rows].count("search") == 1


def test_studies_of_something_else_are_refused(demo: Demo, study: optuna.Study) -> None:
    with pytest.raises(StudyError, match=r"another task.*'demo:caesar'.*'demo:dates'"):
        demo.compare(task=skill_task("dates"), study=study)
    with pytest.raises(ComparisonError, match=r"keeps 4 experts.*6, 3"):
        demo.compare(keep=[6, 3], study=study)
    empty, description = optuna.create_study(study_name="empty"), study.user_attrs["moeopt"]
    for changed, named in (
        ({}, "'empty' has no completed trial"),
        ({"task": {**description["task"], "split": "test"}}, "test split"),
        ({"model": {**description["model"], "weights": "f" * 32}}, r"another model.*weights 'f"),
    ):
        empty.set_user_attr("moeopt", description | changed)
        with pytest.raises(StudyError, match=named):
            demo.compare(study=empty)


class Impossible(methods.Method):
    """A method that no model suits."""

    summary = "cannot"

    def layer(self, statistics: Any, wanted: Any, rng: Any) -> LayerPlan:
        raise MethodError("this model does not suit")


def test_what_a_method_cannot_do_is_said_and_only_a_named_one_stops_the_rest(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(methods.METHODS) - {"random", "reap"}:
        monkeypatch.delitem(methods.ROUTERS, name)
    monkeypatch.setitem(methods.ROUTERS, "cannot", "rows")
    monkeypatch.setitem(methods.METHODS, "cannot", Impossible())
    compared = demo.compare(methods=None, draws=0)
    assert [line.name for line in compared.rows] == ["full model", "reap"]
    assert compared.left_out == ("cannot, keep 4, k 2: this model does not suit",)
    assert "Left out: cannot, keep 4" in printed(compared, 160)
    with pytest.raises(MethodError, match="does not suit"):
        demo.compare(methods=["reap", "cannot"], draws=0)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"keep": [9]}, ComparisonError, "keep.*8 experts.*9"),
        ({"keep": []}, ComparisonError, "at least one"),
        ({"active": [5]}, ComparisonError, "keep=4.*k=5"),
        ({"test_draws": 1.5}, ComparisonError, r"test_draws.*1\.5"),
        ({"methods": ["random"]}, MethodError, "draws"),
    ],
)
def test_bad_arguments_are_named(demo: Demo, options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        demo.compare(**options)


def printed(compared: MethodComparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(view(compared))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["metric", "choice", "kl"])
def test_another_score_is_that_of_the_evaluator(
    demo: Demo, score: Any, folder: Path, compared: MethodComparison
) -> None:
    other = demo.compare(score=score, methods=["reap"], draws=0, out=folder)
    for split, n in LIMITS.items():
        evaluator = Evaluator(demo.model, demo.tokenizer, demo.task, split=split, limit=n, score=score)
        assert row(other, "reap").loss[split] == evaluator.evaluate(row(other, "reap").plan).loss
    expected = {"kl": 0.0, "metric": 1 - other.full.accuracy["test"]}
    assert other.full.loss["test"] == expected.get(score, evaluator.evaluate().loss)
    assert ("agree" in printed(other, 120)) == (score == "kl")
    assert f"Loss: {score}." in " ".join(printed(other, 120).split())


@pytest.mark.parametrize("width", [120, 160])
def test_the_table_fits_and_tells_the_sizes(compared: MethodComparison, width: int) -> None:
    text = printed(compared, width)
    assert max(map(len, text.splitlines())) <= width
    for line in compared.rows:
        name = "+ skipping" if line.name.endswith(" + skipping") else line.name
        loss = f"{line.loss['test']:.4f}"
        assert any(text.strip().startswith(name) and loss in text for text in text.splitlines()), name
    size = compared.splits["test"]
    for said in (
        f"test {size.examples} examples ({size.tokens:,} tokens)",
        "chosen on dev",
        *sentences(compared, KEEP),
    ):
        assert said in text
    assert f"{DRAWS} on search, the first {TEST_DRAWS} of them on dev and test" in text
    assert table(compared, KEEP).row_count == len(compared.rows) + 2


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((-0.012, -0.021, -0.003), "search beats {} on test by 0.0120 [0.0030, 0.0210]."),
        ((0.01, 0.003, 0.02), "search is worse than {} on test by 0.0100 [0.0030, 0.0200]."),
        ((-0.001, -0.004, 0.002), "no difference on test between search and {}: -0.0010 [-0.0040, +0.0020]."),
    ],
)
def test_the_sentence_follows_the_interval(interval: tuple[float, float, float], said: str) -> None:
    def line(name: str, kind: Any, **more: Any) -> Row:
        plan, scores = Plan.one_hot([[0, 1]], experts=4, k=1), dict.fromkeys(("search", "dev", "test"), 1.0)
        return Row(2, 1, name, kind, plan, scores, scores, parameters=1, gib=1.0, active=1.0, **more)

    best = line("search", "search", against_best=Interval(*interval))
    sizes = dict.fromkeys(("search", "dev", "test"), comparing.Size(1, 1))
    about: Any = {}, {"name": "t"}, moeopt.ModelShape(1, 4, 1), sizes, None
    rows = line("full model", "full"), line("naee", "method"), best
    made = MethodComparison(*about, rows, "dev", draws=0, test_draws=0, seed=0)
    assert sentences(made, 2) == [f"Keep 2: {said.format('the best one-shot method (naee)')}"]


# The command line.


@dataclass(frozen=True)
class Place:
    """A folder with a task file of the demo model, and a study of it."""

    data: Path
    storage: str

    def arguments(self, *more: str, out: Path) -> list[str]:
        goal = ["--task", "multiple_choice", "--data", str(self.data), "--limit", "4", "--test-limit", "3"]
        what = [] if "--keep" in more else ["--keep", "4"]
        what += [] if "--methods" in more else ["--methods", "reap,naee"]
        return ["compare-methods", str(MODEL), *goal, *what, "--draws", "3", "--out", str(out), *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("compare-cli")
    rows = moeopt.demo.rows("caesar", "search", 64)
    (folder / "caesar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = Place(folder / "caesar.jsonl", f"sqlite:///{folder / 'studies.db'}")
    goal = ["--task", "multiple_choice", "--data", str(place.data), "--limit", "8", "--storage", place.storage]
    search = ["--space", "prune", "--sampler", "random", "--trials", "3", "--study", "s", "--keep", "4"]
    assert main(["search", str(MODEL), *goal, *search]) == 0
    return place


@pytest.mark.slow
def test_the_command_prints_and_saves_and_does_nothing_twice(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: Calls
) -> None:
    study = ["--study", "s", "--storage", place.storage]
    given = place.arguments("--methods", "naee", "--active", "2,1", "--skip", *study, out=tmp_path / "out")
    capsys.readouterr()
    assert main(given) == 0
    printed = capsys.readouterr().out
    for text in ("Keep 4 of 8 experts", "best of 3 random", "naee", "+ skipping", "search", "test − best one-shot"):
        assert text in printed
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {entry["kind"] for entry in record["rows"]} == {"full", "random", "best random", "method", "search"}
    calls.evaluated = calls.passes = 0
    assert main(given) == 0
    assert (calls.evaluated, calls.passes) == (0, 0)
    assert capsys.readouterr().out == printed
    assert main([*place.arguments(out=tmp_path / "out"), "--task-option", "fractions=[0.4,0.3,0.3]"]) == 2
    assert "something else" in capsys.readouterr().err


def test_the_command_takes_another_task_to_look_at(place: Place, tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"The {i}th of these stories is about a fox, and it is the {i}th only. " * 3)
    other = ["--calibration-task", "text", "--calibration-data", str(tmp_path), "--calibration-option", "window=32"]
    assert main(place.arguments(*other, "--calibration-limit", "5", out=tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert record["calibration"] | {"tokens": 0} == {"task": "text", "own": False, "sequences": 5, "tokens": 0}


BAD = {
    "unknown method": (["--methods", "reap,nae"], "'nae'", "did you mean 'naee'"),
    "no name": (["--methods", "reap,,naee"], "--methods", "'reap,,naee'"),
    "more active than kept": (["--keep", "4,1"], "keep=1", "k=2"),
    "no active expert": (["--active", "0"], "--active", "'0'"),
    "unknown study": (["--study", "z"], "no study 'z'"),
    "study of other examples": (["--study", "s", "--task-option", "fractions=[0.4,0.3,0.3]"], "another task"),
    "unknown task to look at": (["--calibration-task", "txt"], "'txt'", "did you mean 'text'"),
    "option of no task": (["--calibration-option", "window=32"], "--calibration-task"),
    "missing data": (["--data", "missing.jsonl"], "missing.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line_before_the_model_loads(
    name: str, place: Place, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, *named = BAD[name]

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("moeopt.models.load", load)
    said = refused(place.arguments("--storage", place.storage, *options, out=tmp_path / "out"))
    assert all(text in said for text in named), said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_loses_one_evaluation_at_most(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = Evaluator.race

    def interrupted(self: Evaluator, *args: Any) -> Any:
        if calls.evaluated == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return race(self, *args)

    given = place.arguments("--methods", "reap", out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "race", interrupted)
        assert main(given) == 130
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command == ["moeopt", *given]
    calls.evaluated = 0
    assert main(command[1:]) == 0
    resumed = calls.evaluated
    assert main([*given, "--out", str(tmp_path / "fresh")]) == 0
    assert calls.evaluated == resumed + resumed + 4
    tables = [(tmp_path / folder / "table.json").read_bytes() for folder in ("out", "fresh")]
    assert tables[0] == tables[1]
