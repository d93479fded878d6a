"""Fronts are those found by hand, selections pick what brute force picks, nothing runs twice, bad input is named."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from browser import Browser, browser  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import moeopt
from moeopt import methods, report
from moeopt.cli import main
from moeopt.errors import ExportError, MethodError, StorageError, StudyError, TaskError
from moeopt.evaluation import Evaluator, paired_bootstrap
from moeopt.exporting import why_not_stock
from moeopt.plan import Plan
from moeopt.results.front import Front, front_of, uniform_of
from moeopt.results.front.making import spread
from moeopt.results.front.one_shot import ONE_SHOT, uniform_keeps
from moeopt.results.selection import fitting_trial, recorded, selected_trial
from moeopt.study import quantities
from moeopt.study.storage.attributes import study_attributes, write_study
from moeopt.tasks import TextTask

optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The test split has now"),
    pytest.mark.filterwarnings("ignore:the full model gets none"),
]
LAYERS, EXPERTS, KEEP, TRIALS, UNIT = 2, 6, 3, 16, 1000.0
TEXTS = [
    f"the {a} {b} sat on the {c}" for a in ("red", "old", "big", "wet") for b in ("cat", "dog") for c in ("mat", "log")
]
NAMES = ("loss", "bytes")
ONE_SHOTS: dict[str, Any] = {"methods": ("reap", "frequency"), "keeps": [3, 4]}


class Numbered:
    """A size that differs between prunings of one number: the sum of the numbers of the experts kept."""

    needs_evaluation = False

    def __init__(self, model: Any) -> None:
        pass

    def __call__(self, plan: Plan, evaluation: Any) -> float:
        return UNIT * sum(sum(layer.kept or ()) for layer in plan.layers)

    def describe(self) -> None:
        return None


@pytest.fixture(scope="module")
def patched_bytes() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantities.QUANTITIES, "bytes", Numbered)
        yield


@pytest.fixture(scope="module")
def objective(make_mixtral: Any, tiny_tokenizer: Any, patched_bytes: None) -> moeopt.Objective:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16, seed=7)
    task = TextTask("toy", search=TEXTS[:4], dev=TEXTS[4:9], test=TEXTS[9:], window=32)
    return moeopt.Objective(model, tiny_tokenizer, task, moeopt.PruneSpace.of(model, keep=KEEP), objectives=NAMES)


def searched(objective: moeopt.Objective, storage: str | None = None, trials: int = TRIALS) -> optuna.Study:
    study = moeopt.create_study("trade-off", objective=objective, storage=storage, sampler="random", seed=0)
    moeopt.optimize(study, objective, n_trials=trials)
    return study


@pytest.fixture
def study(objective: moeopt.Objective) -> optuna.Study:
    return searched(objective)


@pytest.fixture(scope="module")
def made(objective: moeopt.Objective) -> tuple[optuna.Study, Front]:
    study = searched(objective)
    return study, front_of(study, objective, **ONE_SHOTS)


def beats(a: Any, b: Any) -> bool:
    return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))


def test_the_front_is_the_one_found_by_hand(made: tuple[optuna.Study, Front], objective: moeopt.Objective) -> None:
    study, front = made
    values = {trial.number: trial.values for trial in study.trials}
    unbeaten = {n for n, v in values.items() if not any(beats(other, v) for other in values.values())}
    assert {point.trial for point in front.points} <= unbeaten  # of equal ones the first
    assert {tuple(values[n]) for n in unbeaten} == {tuple(p.search.values()) for p in front.points}
    dev = Evaluator(objective.model, objective.tokenizer, objective.task, split="dev")
    full = dev.evaluate(None)
    size = Numbered(None)
    expected: dict[str, tuple[float, float]] = {}
    for point in front.points:
        plan = objective.space.plan(study.trials[point.trial or 0])
        evaluation = dev.evaluate(plan)
        assert point.dev == {"loss": evaluation.loss, "bytes": size(plan, None)}
        assert point.against_full == paired_bootstrap(evaluation, full)
        expected[point.name] = (evaluation.loss, size(plan, None))
    on_dev = {n for n, v in expected.items() if not any(beats(other, v) for other in expected.values())}
    assert {point.name for point in front.on_dev} == on_dev
    for point in front.on_dev:
        others = {p.name for p in front.one_shot if beats(p.dev.values(), expected[point.name])}
        assert set(front.beaten.get(point.name, [])) == others
    assert front.full is not None
    assert front.full.dev == {"loss": full.loss, "bytes": LAYERS * 15 * UNIT}


def test_one_shot_plans_are_those_of_the_methods_room(
    made: tuple[optuna.Study, Front], objective: moeopt.Objective
) -> None:
    calibration = methods.Calibration(objective.model, objective.tokenizer, objective.task)
    plans = {point.name: point.plan for point in made[1].one_shot}
    assert plans == {
        f"{name}, {keep} of {EXPERTS}": methods.plan(name, calibration, keep=keep)
        for keep in ONE_SHOTS["keeps"]
        for name in ONE_SHOTS["methods"]
    }


def test_nothing_runs_twice(made: tuple[optuna.Study, Front], objective: moeopt.Objective) -> None:
    study, front = made
    assert front.evaluated == 2 + len(front.points) + 2 * len(front.one_shot)  # what trials gave on search is theirs
    again = front_of(study, objective.model, objective.tokenizer, objective.task, **ONE_SHOTS)
    assert again.evaluated == 0
    assert [(p.name, p.search, p.dev) for p in again.everything] == [
        (p.name, p.search, p.dev) for p in front.everything
    ]


def test_hypervolume_grows_to_that_of_the_front(made: tuple[optuna.Study, Front]) -> None:
    study, front = made
    assert (np.diff(front.hypervolume) >= 0).all()
    at = np.array([trial.values for trial in study.trials])
    assert front.hypervolume[-1] == pytest.approx(front.bounds.hypervolume(at))
    spent = [trial.user_attrs["spent"] for trial in study.trials]
    assert np.diff(front.costs).tolist() == np.diff(spent).tolist()


def test_without_a_model_the_study_tells_what_it_holds(made: tuple[optuna.Study, Front]) -> None:
    study, front = made
    alone = front_of(study)
    assert [(p.name, p.search) for p in alone.points] == [(p.name, p.search) for p in front.points]
    assert (alone.one_shot, alone.examples, alone.judged, alone.evaluated) == ((), None, [], 0)
    assert alone.full is not None
    assert front.full is not None
    assert alone.full.search == {"loss": front.full.search["loss"]}


def test_trials_that_break_a_constraint_are_on_no_front(objective: moeopt.Objective) -> None:
    bound = LAYERS * 7 * UNIT
    limited = moeopt.Objective(
        objective.model, objective.tokenizer, objective.task, objective.space, objectives=NAMES,
        constraints=(f"bytes >= {bound}",),
    )  # fmt: skip
    study = searched(limited)
    assert any(trial.values[1] < bound for trial in study.trials)
    assert all(point.search["bytes"] >= bound for point in front_of(study).points)
    selected = moeopt.select(study, limited, fit=10**9)
    assert all(candidate.bytes is not None and candidate.bytes >= bound for candidate in selected.candidates)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_what_is_spread_holds_the_ends_and_no_two_alike(points: int, count: int, seed: int) -> None:
    at = np.random.default_rng(seed).random((points, 2))
    chosen = spread(at, count)
    assert len(set(chosen)) == len(chosen) == min(points, count)
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == points - 1


def test_some_points_are_judged_where_there_are_too_many(study: optuna.Study, objective: moeopt.Objective) -> None:
    front = front_of(study, objective, top=2, methods=())
    assert [bool(point.dev) for point in front.points] == [True, *[False] * (len(front.points) - 2), True]
    assert front.not_judged == len(front.points) - 2
    assert front.one_shot == ()


def test_uniform_numbers_lie_within_the_space(make_mixtral: Any) -> None:
    model = make_mixtral(experts=8)
    assert uniform_keeps(moeopt.PruneSpace.of(model, keep=5)) == [5]
    assert uniform_keeps(moeopt.PruneSpace.of(model, keep=(3, 8))) == [3, 4, 5, 6, 7]
    many = moeopt.PruneSpace.of(make_mixtral(experts=32), keep=(2, 32))
    assert uniform_keeps(many) == [2, 7, 12, 16, 21, 26, 31]
    assert uniform_keeps(many, most=None) == list(range(2, 32))


def test_a_plan_is_levelled_where_layers_keep_different_numbers(objective: moeopt.Objective) -> None:
    space = moeopt.PruneSpace.of(objective.model, keep=(2, 4))
    varied = moeopt.Objective(objective.model, objective.tokenizer, objective.task, space, objectives=NAMES)
    study = moeopt.create_study(objective=varied, storage=None, sampler="random", seed=0)
    moeopt.optimize(study, varied, n_trials=6)
    chosen = next(t for t in study.trials if why_not_stock(space.plan(t)) is not None)
    uniform = uniform_of(study, chosen, varied, methods=())
    x = space.vector(chosen)
    levelled = {space.decode(space.with_counts(x, keep)).fingerprint for keep in (2, 3, 4)}
    stock = {plan.fingerprint for t in study.trials if why_not_stock(plan := space.plan(t)) is None}
    assert uniform.plan.fingerprint in levelled | stock
    assert len({layer.kept_experts for layer in uniform.plan.layers}) == 1
    assert uniform.bytes <= uniform.chosen_bytes


# Selecting ------------------------------------------------------------------------------------------------------------


def dev_losses(study: optuna.Study, objective: moeopt.Objective) -> dict[int, Any]:
    dev = Evaluator(objective.model, objective.tokenizer, objective.task, split="dev")
    return {trial.number: dev.evaluate(objective.space.plan(trial)) for trial in study.trials}


def test_fit_picks_the_best_on_dev_of_what_fits(study: optuna.Study, objective: moeopt.Objective) -> None:
    sizes = sorted(trial.values[1] for trial in study.trials)
    judged = dev_losses(study, objective)
    for most in (int(sizes[0]), int(sizes[len(sizes) // 2]), int(sizes[-1])):
        selected = moeopt.select(study, objective, fit=most, top=TRIALS)
        fits = [trial for trial in study.trials if trial.values[1] <= most]
        assert sorted(c.trial for c in selected.candidates) == [trial.number for trial in fits]
        assert selected.winner.trial == min(fits, key=lambda trial: judged[trial.number].loss).number
        assert selected.winner.bytes == study.trials[selected.winner.trial].values[1] <= most
        assert selected_trial(study).number == selected.winner.trial
        assert recorded(study)["settings"]["fit"] == most  # type: ignore[index]
        assert any(f"of {most:,} that it may have" in text for text in selected.sentences)
    few = moeopt.select(study, objective, fit="1MB", top=2)
    best = sorted(study.trials, key=lambda trial: trial.values[0])[:2]
    assert {c.trial for c in few.candidates} == {trial.number for trial in best}


def test_loss_within_picks_the_smallest_that_surely_is(study: optuna.Study, objective: moeopt.Objective) -> None:
    dev = Evaluator(objective.model, objective.tokenizer, objective.task, split="dev")
    full, judged = dev.evaluate(None), dev_losses(study, objective)
    on_front = [point.trial or 0 for point in front_of(study).points]
    gaps = {number: paired_bootstrap(judged[number], full) for number in on_front}
    for within in sorted(max(0.0, gap.high) for gap in gaps.values()):
        if all(gap.high > within for gap in gaps.values()):
            continue
        selected = moeopt.select(study, objective, loss_within=within, top=TRIALS)
        sure = [number for number in on_front if gaps[number].high <= within]
        smallest = min(sure, key=lambda number: study.trials[number].values[1])
        assert selected.winner.trial == selected.search_best.trial == smallest
        assert selected.winner.against_full == gaps[smallest]
        stays = selected.intervals["full"]["loss"].high <= within
        assert any("does not hold on test" in text for text in selected.warnings) != stays
    console = Console(width=150, file=io.StringIO())
    console.print(report.view(selected))
    assert "kB" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_study_of_one_objective_is_filtered_by_size(objective: moeopt.Objective) -> None:
    alone = moeopt.Objective(objective.model, objective.tokenizer, objective.task, objective.space)
    study = searched(alone)
    size = {trial.number: Numbered(None)(alone.space.plan(trial), None) for trial in study.trials}
    most = int(np.median([*size.values()]))
    selected = moeopt.select(study, alone, fit=most, top=TRIALS)
    assert {c.trial: c.bytes for c in selected.candidates} == {n: s for n, s in size.items() if s <= most}
    assert moeopt.select(study, alone).winner.bytes is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has the objectives loss, bytes: say how small a plan must be"),
        ({"fit": "big"}, "a size is a number of bytes, such as 24GB"),
        ({"fit": 5}, "fits 5 bytes: the smallest of its trials has "),
        ({"loss_within": -1}, "loss_within must be a loss of at least 0, got -1"),
        ({"loss_within": True}, "loss_within must be a loss of at least 0, got True"),
        ({"loss_within": float("nan")}, "loss_within must be a loss of at least 0, got nan"),
    ],
)
def test_what_cannot_be_selected_says_so(
    made: tuple[optuna.Study, Front], objective: moeopt.Objective, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        moeopt.select(made[0], objective, **options)


def test_none_within_names_the_nearest(study: optuna.Study, objective: moeopt.Objective) -> None:
    smallest = min(study.trials, key=lambda trial: (trial.values[1], trial.values[0]))
    said = (
        f"no candidate is surely within 0 of the full model's loss on dev: the nearest, trial {smallest.number}, is at"
    )
    with pytest.raises(StudyError, match=said):
        moeopt.select(study, objective, fit=int(smallest.values[1]), loss_within=0.0)


# From a front to a file ----------------------------------------------------------------------------------------------


def test_uniform_is_the_best_that_fits_and_says_what_it_costs(objective: moeopt.Objective) -> None:
    """A space of k by layer: most of its trials differ between layers, and no ordinary checkpoint holds them."""
    space = moeopt.ActiveSpace(objective.space, k=(1, 2))
    mixed = moeopt.Objective(objective.model, objective.tokenizer, objective.task, space, objectives=NAMES)
    study = searched(mixed, trials=12)
    plans = {trial.number: space.plan(trial) for trial in study.trials}
    assert {why_not_stock(plan) is None for plan in plans.values()} == {True, False}
    chosen = max(study.trials, key=lambda trial: trial.values[1])
    uniform = uniform_of(study, chosen, mixed, methods=["reap"])
    calibration = methods.Calibration(objective.model, objective.tokenizer, objective.task)
    candidates = [*plans.values(), methods.plan("reap", calibration, keep=KEEP)]
    size = Numbered(None)
    fits = [p for p in candidates if why_not_stock(p) is None and size(p, None) <= chosen.values[1]]
    dev = Evaluator(objective.model, objective.tokenizer, objective.task, split="dev")
    best = min((dev.evaluate(plan) for plan in fits), key=lambda evaluation: evaluation.loss)
    assert dev.evaluate(uniform.plan).loss == best.loss
    assert uniform.against_chosen == paired_bootstrap(best, dev.evaluate(plans[chosen.number]))
    assert uniform.against_full == paired_bootstrap(best, dev.evaluate(None))
    assert (uniform.bytes, uniform.chosen_bytes) == (size(uniform.plan, None), chosen.values[1])
    assert uniform.candidates == len({plan.fingerprint for plan in fits})
    assert f"in place of trial {chosen.number}" not in uniform.lines[0]
    assert f"chosen (trial {chosen.number}): {uniform.bytes - uniform.chosen_bytes:+,.0f} bytes" in uniform.lines[1]
    with pytest.raises(StudyError, match="no plan of at most 1,000 bytes keeps the same number"):
        uniform_of(study, chosen, mixed, methods=["reap"], fit=1000)


def test_what_fits_is_what_was_selected_or_else_the_best_on_search(
    study: optuna.Study, objective: moeopt.Objective
) -> None:
    sizes = sorted(trial.values[1] for trial in study.trials)
    middle = int(sizes[len(sizes) // 2])
    best = min((t for t in study.trials if t.values[1] <= middle), key=lambda t: t.values[0])
    assert [fitting_trial(study, middle)[0].number, fitting_trial(study, middle)[1]] == [best.number, False]
    winner = moeopt.select(study, objective, fit=middle, top=TRIALS).winner
    assert [fitting_trial(study, middle)[0].number, fitting_trial(study, middle)[1]] == [winner.trial, True]
    smaller = int(winner.bytes or 0) - 1
    assert not fitting_trial(study, smaller)[1]
    with pytest.raises(StudyError, match="fits 5 bytes: the smallest of its trials has"):
        fitting_trial(study, 5)


@pytest.mark.slow
def test_the_commands_lead_from_a_front_to_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    for split in ("search", "dev", "test"):
        rows = moeopt.demo.skills.rows("caesar", split, 3)
        lines = [json.dumps({key: row[key] for key in ("prompt", "options", "answer")}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    task = moeopt.tasks.get("multiple_choice", data=str(tmp_path), delimiter="")
    space = moeopt.PruneSpace.of(model, keep=2)
    objective = moeopt.Objective(model, tokenizer, task, space, limit=2, objectives=NAMES)
    url = f"sqlite:///{tmp_path}/study.db"
    study = searched(objective, url, trials=3)
    best = min(study.trials, key=lambda trial: trial.values[0])
    of_task = ["--task", "multiple_choice", "--data", str(tmp_path), "--task-option", "delimiter="]
    where = ["--storage", url]
    full = str(moeopt.demo.MODEL)

    asked = ["--model", full, *of_task, "--methods", "reap", "--dev-limit", "2", "--out", str(tmp_path / "front.csv")]
    assert main(["front", "trade-off", *where, *asked]) == 0
    out = capsys.readouterr().out
    assert "reap, 2 of 8" in out
    assert shlex.join(["--study", "trade-off", *of_task, "--loss-within", "0.01"]) in " ".join(out.split())
    assert len((tmp_path / "front.csv").read_text().splitlines()) == 2 + 1 + len(front_of(study).points)

    export = ["export", full, str(tmp_path / "small"), "--study", "trade-off", *where]
    assert "2 objectives and no best trial" in refused(export)
    assert "--fit chooses a trial of --study" in refused([*export, "--trial", "1", "--fit", "24GB"])
    assert "--uniform needs --study and --task" in refused([*export, "--uniform"])
    assert "fits 1,000 bytes" in refused([*export, "--fit", "1kB"])
    assert main([*export, "--fit", "24MB"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"trial {best.number} of trade-off (loss {best.values[0]:.4f}, bytes {best.values[1]:,.0f})" in out
    record = json.loads((tmp_path / "small" / "moeopt.json").read_text())
    assert record["trial"]["number"] == best.number
    assert [record["trial"][name] for name in NAMES] == best.values

    export[2] = str(tmp_path / "uniform")
    assert main([*export, "--fit", "24MB", "--uniform", *of_task, "--dev-limit", "2"]) == 0
    assert "2 experts in every layer, the best of " in capsys.readouterr().out
    assert "uniform" in json.loads((tmp_path / "uniform" / "moeopt.json").read_text())["about"]


# Refusals and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"top": 0}, StudyError, "top must be an integer of at least 1, got 0"),
        ({"dev_limit": 0}, StudyError, "dev_limit must be"),
        ({"methods": "reap"}, MethodError, r"methods must be a list of names, such as \['reap'\]"),
        ({"methods": ["hc_smoe"]}, MethodError, "methods that prune"),
        ({"methods": ["reep"]}, MethodError, "did you mean"),
        ({"methods": ["reap"], "keeps": [9]}, None, "reap, 9 experts: keep must be an integer between 1 and"),
    ],
)
def test_what_no_front_is_made_of(
    made: tuple[optuna.Study, Front], objective: moeopt.Objective, options: dict[str, Any], error: Any, said: str
) -> None:
    if error is None:
        assert said in front_of(made[0], objective, **options).left_out[0]
        return
    with pytest.raises(error, match=said):
        front_of(made[0], objective, **options)


def test_a_study_without_a_trial_or_a_task_without_dev_is_refused(objective: moeopt.Objective) -> None:
    empty = moeopt.create_study(objective=objective, storage=None, sampler="random")
    with pytest.raises(StudyError, match="has no complete trial that keeps its constraints yet"):
        front_of(empty)
    task = TextTask("toy", search=TEXTS[:4], dev=[], test=TEXTS[9:], window=32)
    with pytest.warns(UserWarning, match="no dev split"):
        without = moeopt.Objective(objective.model, objective.tokenizer, task, objective.space, objectives=NAMES)
    with pytest.raises(TaskError, match="dev"):
        front_of(searched(without, trials=2), without)


def test_damaged_one_shot_plans_are_named(study: optuna.Study, objective: moeopt.Objective) -> None:
    front_of(study, objective, methods=["reap"], keeps=[3])
    (key,) = [key for key in study_attributes(study) if key.startswith(ONE_SHOT)]
    from moeopt.trials import genome

    for numbers in ([0, 1, 2], [0, 1, 2, 3, 4, 77], [0, 1, 2, 3, 4, 0.5]):
        write_study(study, genome.pack(key, np.array(numbers, dtype=np.float32)))
        with pytest.raises(StorageError, match="is damaged: it holds no 3 experts for 2 layers"):
            front_of(study, objective, methods=["reap"], keeps=[3])


@pytest.mark.parametrize("dark", [False, True])
def test_its_page_draws(made: tuple[optuna.Study, Front], tmp_path: Path, browser: Browser, dark: bool) -> None:  # noqa: F811
    report.save(made[1], tmp_path / "front.html")
    with browser.open((tmp_path / "front.html").as_uri(), dark=dark, width=1280) as tab:
        assert tab.traces("#front") == 1 + len(ONE_SHOTS["methods"]) + 1  # the search, and the full model's level
        assert tab.traces("#growth") == 1
        assert tab.page.locator("tbody tr").count() == len(made[1].everything)
        paper = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") != dark


@pytest.mark.parametrize(
    ("objectives", "values", "system", "said"),
    [
        (["loss"], (0.1, 2.0), {}, "does not minimize 'loss'"),
        (["loss", "bites"], (0.1, 2.0), {}, "an objective is one of"),
        (["loss", "metric"], (0.1, 2.0), {}, "does not minimize 'loss' and maximize 'metric'"),
        (["loss", 7], (0.1, 2.0), {}, r"evaluation\.objectives\[1\] must be text, got 7"),
        ([*NAMES], (0.1, 2.0), {"constraints:bytes <= 1": "much"}, "must be a number, got 'much'"),
        ([*NAMES], (float("inf"), 2.0), {}, "has no complete trial that keeps its constraints yet"),
        ([*NAMES], (0.1, 2.0), {"constraints:bytes <= 1": float("nan")}, "has no complete trial that keeps its"),
    ],
)
def test_what_others_wrote_is_one_error(
    objective: moeopt.Objective, objectives: list[Any], values: tuple[float, float], system: Any, said: str
) -> None:
    study = moeopt.create_study(objective=objective, storage=None, sampler="random")
    about = study.user_attrs["moeopt"]
    study.set_user_attr("moeopt", {**about, "evaluation": {**about["evaluation"], "objectives": objectives}})
    study.add_trial(optuna.trial.create_trial(values=values, system_attrs=system))
    with pytest.raises(StudyError, match=said):
        front_of(study)


def test_names_of_others_are_shown_as_plain_text(objective: moeopt.Objective, tmp_path: Path) -> None:
    study = moeopt.create_study(objective=objective, storage=None, sampler="random")
    about = study.user_attrs["moeopt"]
    names = ["loss:\x1b[31m<script>[bold]", "bytes"]
    study.set_user_attr("moeopt", {**about, "evaluation": {**about["evaluation"], "objectives": names}})
    study.add_trial(optuna.trial.create_trial(values=(0.1, 2.0)))
    front = front_of(study)
    console = Console(width=150, file=io.StringIO())
    console.print(report.view(front))
    report.save(front, tmp_path / "front.html")
    for text in (console.file.getvalue(), (tmp_path / "front.html").read_text()):  # type: ignore[attr-defined]
        assert "\x1b" not in text
        assert "[bold]" in text
    assert "<script>[bold]" not in text


def test_it_is_shown_and_written(made: tuple[optuna.Study, Front], tmp_path: Path) -> None:
    _, front = made
    console = Console(width=180, file=io.StringIO())
    console.print(report.view(front))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("full model", "dev loss − full [95%]", *(point.name for point in front.points)):
        assert text in shown
    for suffix in ("csv", "json", "html", "png"):
        report.save(front, tmp_path / f"front.{suffix}")
    rows = [*csv.DictReader((tmp_path / "front.csv").open())]
    assert [row["name"] for row in rows] == [point.name for point in front.everything]
    assert [float(row["dev_loss"]) for row in rows] == [point.dev["loss"] for point in front.everything]
    record = json.loads((tmp_path / "front.json").read_text())
    assert record["hypervolume"]["value"][-1] == front.hypervolume[-1]
    assert [point["on_front"] for point in record["points"]] == [p in front.on_dev for p in front.everything]
    page = (tmp_path / "front.html").read_text()
    assert "https://" not in page.partition("<script")[0]
    assert all(text in page for text in ("prefers-color-scheme:dark", "@media print", front.points[0].name))
    for path, said in (("front.pdf", "ends in .html, .csv, .json, .png"), ("none/front.csv", "there is no folder")):
        with pytest.raises(ExportError, match=said):
            report.save(front, tmp_path / path)


def test_the_command_shows_and_refuses(
    objective: moeopt.Objective, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    refused: Callable[[list[str]], str],
) -> None:  # fmt: skip
    url = f"sqlite:///{tmp_path}/study.db"
    searched(objective, url, trials=4)
    where = ["front", "trade-off", "--storage", url]
    assert main([*where, "--out", str(tmp_path / "front.csv"), "--out", str(tmp_path / "front.html")]) == 0
    out = capsys.readouterr().out
    assert "trial" in out
    assert "front.html" in out
    assert "4" in (tmp_path / "front.csv").read_text()
    assert "--model and --task go together" in refused([*where, "--model", "x"])
    assert "methods that prune" in refused([*where, "--methods", "naee,ream"])
    assert "ends in .html" in refused([*where, "--out", "front.pdf"])
    assert "no study 'trade-of'" in refused(["front", "trade-of", "--storage", url])
