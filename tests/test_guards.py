"""Guards: tasks that a search must not lose, as constraints relative to the full model, kept, resumed and judged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

import moeopt
from moeopt import Guard, report
from moeopt.cli import main
from moeopt.errors import StorageError, StudyError
from moeopt.results.front import front_of
from moeopt.results.guarding import GuardJudge
from moeopt.samplers import get
from moeopt.study import best_trial, guards, recipe
from moeopt.study.objective import Objective
from moeopt.study.storage import attributes
from moeopt.tasks import Example, MixtureTask, MultipleChoiceTask, TextTask
from moeopt.trials import genome
from moeopt.trials.front import is_feasible

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:task '"),
    pytest.mark.filterwarnings("ignore:the full model"),
]

QUESTIONS = [Example(str(i), f"is {i * 7 % 40} odd?", (" n", " y"), i % 2) for i in range(24)]
TASK = MultipleChoiceTask("questions", search=QUESTIONS[:12], dev=QUESTIONS[12:18], test=QUESTIONS[18:])
TEXT = TextTask(
    "text", *([f"{split}, {i} lines of {i * i} words" * 3 for i in range(6)] for split in ("search", "dev", "test")),
    window=40,
)  # fmt: skip
KEEP = 2


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=2, experts=4, hidden=16, intermediate=16)


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Callable[..., Objective]:
    def make(*given: Guard, **options: Any) -> Objective:
        space = moeopt.PruneSpace.of(model, keep=KEEP)
        return Objective(model, tiny_tokenizer, TASK, space, batch_tokens=200, guards=given, **options)

    return make


def searched(
    objective: Objective, trials: int = 8, url: str | None = None, pruner: Any = None, sampler: str = "random"
) -> optuna.Study:
    study = moeopt.create_study(
        "s", objective=objective, storage=url, sampler=sampler, seed=1, load_if_exists=True, warm_starts=[],
        pruner=pruner,
    )  # fmt: skip
    moeopt.optimize(study, objective, n_trials=trials)
    return study


def told(study: optuna.Study) -> list[Any]:
    noted = ("spent", "layer_tokens", "tokens")
    return [(t.value, t.constraints, [t.user_attrs.get(key) for key in noted]) for t in study.trials]


def test_a_constraint_is_the_mean_difference_less_what_is_allowed(make: Callable[..., Objective], model: Any) -> None:
    objective = make(Guard(TEXT, loss=0.01, limit=5), Guard(TASK, loss=1.0, score="choice", name="by choice"))
    study = searched(objective)
    plain = searched(make())
    assert study.trials[0].value == plain.trials[0].value
    for trial in study.trials:
        plan = objective.space.plan(trial)
        for name, evaluator in objective.guards.evaluators.items():
            full, small = evaluator.evaluate(), evaluator.evaluate(plan)
            gap = sum(
                w * (a - b) for a, b, w in zip(small.losses.tolist(), full.losses.tolist(), small.weights.tolist())
            )
            allowed = {"text": 0.01, "by choice": 1.0}[name]
            assert trial.constraints[f"guard:{name}"] == pytest.approx(gap / small.weights.sum() - allowed, abs=1e-6)
        judged = {each.name: each for each in guards.changes(study, trial)}
        assert [*judged] == ["text", "by choice"]
        assert judged["text"].change.mean - 0.01 == pytest.approx(trial.constraints["guard:text"])
        assert (judged["text"].examples, judged["text"].split) == (5, "search")
    assert objective.guards.evaluators["text"].examples == 5
    best = best_trial(study)
    assert best is None or is_feasible(best)


def test_what_guards_cost_is_counted_and_no_plan_is_scored_twice(make: Callable[..., Objective]) -> None:
    objective = make(Guard(TEXT, limit=5), prefix_memory=0)
    study, alone = (optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)) for _ in range(2))
    study.optimize(objective, n_trials=16)
    alone.optimize(make(prefix_memory=0), n_trials=16)
    evaluator = objective.guards.evaluators["text"]
    full = evaluator.tokens * evaluator.layers
    copies = 0
    for trial, other in zip(study.trials, alone.trials):
        copied = "copied_from" in trial.user_attrs
        copies += copied
        assert trial.user_attrs["layer_tokens"] == other.user_attrs["layer_tokens"] + full * (not copied)
        assert trial.user_attrs["tokens"] == other.user_attrs["tokens"] + evaluator.tokens * (not copied)
        if copied:
            assert trial.constraints == study.trials[trial.user_attrs["copied_from"]].constraints
    assert copies
    spent = alone.trials[-1].user_attrs["spent"] + full * (1 + len(study.trials) - copies)
    assert study.trials[-1].user_attrs["spent"] == spent


def test_the_best_trial_keeps_its_guards_and_samplers_know(make: Callable[..., Objective]) -> None:
    gaps = [t.constraints["guard:text"] for t in searched(make(Guard(TEXT, loss=0.0)), 24).trials]
    allowed = float(np.quantile([gap for gap in gaps if gap > 0], 0.3))
    study = searched(make(Guard(TEXT, loss=allowed)), 24, sampler="local")
    able = [t for t in study.trials if t.value is not None and t.constraints["guard:text"] <= 0]
    assert 0 < len(able) < len(study.trials)
    best = best_trial(study)
    assert best is not None
    assert best.value == min(t.value for t in able if t.value is not None)
    assert {each.verdict for each in guards.changes(study, best)} <= {"holds", "unclear"}
    broken = next(t for t in study.trials if t.constraints["guard:text"] > 0)
    assert [each.verdict for each in guards.changes(study, broken)] == ["broken"]


def test_resumed_is_uninterrupted(make: Callable[..., Objective], tmp_path: Path) -> None:
    guard = Guard(TEXT, limit=5)
    whole = searched(make(guard, prefix_memory=0), 5, sampler="local")
    url = f"sqlite:///{tmp_path}/s.db"
    for trials in (2, 5):
        resumed = searched(make(guard, prefix_memory=0), trials, url, sampler="local")
    assert told(resumed) == told(whole)
    for other in (Guard(TEXT, limit=5, loss=0.5), Guard(TEXT, limit=4), Guard(TEXT, limit=5, name="other")):
        with pytest.raises(StudyError, match=r"evaluation\.guards"):
            searched(make(other, prefix_memory=0), 6, url, sampler="local")
    with pytest.raises(StudyError, match=r"evaluation\.guards"):
        searched(make(prefix_memory=0), 6, url, sampler="local")


def test_raced_trials_have_guards_where_they_complete(make: Callable[..., Objective]) -> None:
    objective = make(Guard(TEXT, loss=10.0, limit=5), rungs=3)
    study = searched(objective, 20, pruner=moeopt.RacingPruner(error=0.4, noise_floor=0.0, n_min=4))
    states = {trial.state.name for trial in study.trials}
    assert states == {"COMPLETE", "PRUNED"}
    for trial in study.trials:
        assert ("guard:text" in trial.constraints) == (trial.state.name == "COMPLETE")


def test_plain_studies_and_trials_without_one(make: Callable[..., Objective]) -> None:
    objective = make(Guard(TEXT, limit=5))
    study = optuna.create_study(sampler=get("random", objective.space, seed=1))
    study.optimize(objective, n_trials=3)
    assert [t.constraints for t in study.trials] == [
        t.constraints for t in searched(make(Guard(TEXT, limit=5)), 3).trials
    ]
    fixed = optuna.trial.FixedTrial(study.trials[0].params)
    assert objective(fixed) == study.trials[0].value


def test_a_worker_rebuilds_guards_with_their_held_out_examples(make: Callable[..., Objective], tmp_path: Path) -> None:
    given = Guard(TEXT, limit=3), Guard(MixtureTask([(TASK, 1.0), (TEXT, 1.0)]), loss=0.5, limit=6, score="choice")
    url = f"sqlite:///{tmp_path}/s.db"
    study = searched(make(*given), 2, url)
    options = recipe.arguments(recipe.read(study))
    rebuilt = Objective(
        make().model, make().tokenizer, recipe.task_of(recipe.read(study)), make().space, **options
    )  # fmt: skip
    assert rebuilt.guards.describe() == make(*given).guards.describe()
    moeopt.optimize(study, rebuilt, n_trials=4)
    assert told(study) == told(searched(make(*given), 4))
    for mine, theirs in zip(given, rebuilt.guards.guards):
        for split in ("search", "dev", "test"):
            first, second = (g.evaluator(split, rebuilt.model, rebuilt.tokenizer) for g in (mine, theirs))
            assert first.fingerprint == second.fingerprint


def test_code_of_ones_own_is_not_kept_and_that_is_said(make: Callable[..., Objective], tmp_path: Path) -> None:
    class Own(TextTask):
        pass

    objective = make(Guard(Own("own", ["a document of the user's own, which has a class of its own"], window=40)))
    study = searched(objective, 1, f"sqlite:///{tmp_path}/s.db")
    with pytest.raises(StudyError, match=r"does not hold its guards \(task 'own' is code of its own"):
        recipe.arguments(recipe.read(study))


def test_a_guard_without_a_finite_loss_fails_the_trial(
    make: Callable[..., Objective], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(Guard(TEXT, limit=5))
    evaluator = objective.guards.evaluators["text"]
    race = evaluator.race
    plan = objective.space.decode(objective.space.start())

    def infinite(under: Any = None, earlier: Any = None) -> Any:
        if under is None:
            return race(under, earlier)
        raise moeopt.errors.NonFiniteLossError("the loss is not finite", layer=1)

    monkeypatch.setattr(evaluator, "race", infinite)
    study = moeopt.create_study(objective=objective, storage=None, sampler="random", warm_starts=[plan])
    moeopt.optimize(study, objective, n_trials=2)
    assert {trial.state.name for trial in study.trials} == {"FAIL"}
    assert study.trials[0].user_attrs["failure"] == "guard 'text': the loss is not finite"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": -0.1}, "loss must be a finite number of at least 0"),
        ({"loss": float("nan")}, "loss must be a finite number of at least 0"),
        ({"loss": "0.02"}, "loss must be a finite number of at least 0"),
        ({"score": "loss"}, "score must be one of likelihood"),
        ({"name": "a\nb"}, "a guard's name is printable"),
        ({"name": "n" * 81}, "a guard's name is printable"),
    ],
)
def test_what_is_no_guard_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        Guard(TEXT, **options)


def test_guards_of_an_objective_are_checked(make: Callable[..., Objective]) -> None:
    with pytest.raises(StudyError, match="two guards are called 'text'"):
        make(Guard(TEXT), Guard(TEXT, loss=0.1))
    with pytest.raises(StudyError, match=r"guards are moeopt\.Guard"):
        make(TEXT)
    with pytest.raises(StudyError, match=r"a guard is of a moeopt\.tasks\.Task, got 'text'"):
        Guard("text")  # type: ignore[arg-type]
    with pytest.raises(moeopt.errors.TaskError, match="limit"):
        make(Guard(TEXT, limit=0))


def test_damaged_and_hostile_guards_are_one_error(make: Callable[..., Objective], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = searched(make(Guard(TEXT, limit=5)), 2, url)
    key = guards.SCORES + "text"
    whole = attributes.study_attributes(study)

    def written(attrs: dict[str, Any]) -> optuna.Study:
        attributes.write_study(study, attrs)
        return optuna.load_study(study_name="s", storage=url)

    numbers = genome.unpack(key, whole)
    assert numbers is not None
    of = {name: whole[key][name] for name in ("of", "layer_tokens")}
    for vector, head in (
        (numbers[:-1], of),
        (np.full_like(numbers, np.nan), of),
        (-np.ones_like(numbers), of),
        (numbers, {**of, "layer_tokens": -1}),
        (numbers[:4], of),
    ):
        packed = genome.pack(key, vector)
        packed[key] |= head
        with pytest.raises(StorageError, match="damaged"):
            guards.changes(written(packed), study.trials[0])
    for hostile in ({"v": 1}, "text", [1]):
        with pytest.raises(StorageError, match="damaged"):
            guards.changes(written({key: hostile}), study.trials[0])
    description = dict(study.user_attrs["moeopt"])
    for wrong in ("text", [{"name": 3, "loss": 0.1}], [{"name": "text"}], [{"name": "text", "loss": "x"}]):
        evaluation = {**description["evaluation"], "guards": wrong}
        study.set_user_attr("moeopt", {**description, "evaluation": evaluation})
        with pytest.raises(StudyError, match="guards"):
            guards.guards_of(optuna.load_study(study_name="s", storage=url))


def test_hostile_guards_of_a_recipe_are_one_error(make: Callable[..., Objective], tmp_path: Path) -> None:
    held = recipe.read(searched(make(Guard(TEXT, limit=5)), 1, f"sqlite:///{tmp_path}/s.db"))
    hostile: list[dict[str, Any]] = [
        {"tasks": {}},
        {"tasks": {"search": {"kind": "none"}}},
        {"tasks": {"search": 3}, "loss": 0.1},
        {"loss": "much"},
        {"score": "none"},
        {"name": "\x1b[31m"},
    ]
    for wrong in hostile:
        body = json.loads(json.dumps(vars(held)))
        body["guards"][0] |= wrong
        with pytest.raises(StudyError):
            recipe.arguments(recipe._checked(body))


def test_older_studies_have_none_and_go_on(make: Callable[..., Objective], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = searched(make(), 2, url)
    assert "guards" not in study.user_attrs["moeopt"]["evaluation"]
    assert guards.guards_of(study) == {}
    assert guards.changes(study, study.trials[0]) == []
    assert recipe.read(study).guards is None
    packed = recipe._packed(recipe.read(study))
    size = packed[recipe.RECIPE]["bytes"]
    assert b'"guards"' not in genome.unpack_bytes(recipe.RECIPE, packed, size)


def selected(objective: Objective, study: optuna.Study, **options: Any) -> Any:
    return moeopt.select(study, objective, top=30, dev_limit=6, test_limit=6, **options)


def gaps(objective: Objective, plans: list[moeopt.Plan], guard: Guard, split: str) -> list[float]:
    evaluator = guard.evaluator(split, objective.model, objective.tokenizer, batch_tokens=200)
    full = evaluator.evaluate()
    return [moeopt.paired_bootstrap(evaluator.evaluate(plan), full, draws=1).mean for plan in plans]


@pytest.mark.slow
def test_a_selection_passes_over_what_breaks_a_guard_on_dev(make: Callable[..., Objective], tmp_path: Path) -> None:
    objective = make(Guard(TEXT, loss=0.05))
    sets = [*combinations(range(4), KEEP)]
    plans = [moeopt.Plan.one_hot(kept, experts=4, k=2) for kept in product(sets, sets)]
    search, dev = (gaps(objective, plans, Guard(TEXT), split) for split in ("search", "dev"))
    evaluator = moeopt.Evaluator(objective.model, objective.tokenizer, TASK, split="dev", batch_tokens=200)
    losses = [evaluator.evaluate(plan).loss for plan in plans]
    lost, held = next(
        (i, j)
        for i, j in permutations(range(len(plans)), 2)
        if max(search[i], search[j], dev[j]) <= 0.05 < dev[i] and losses[i] < losses[j]
    )
    url = f"sqlite:///{tmp_path}/s.db"
    starts = [plans[lost], plans[held]]
    study = moeopt.create_study("s", objective=objective, storage=url, sampler="random", warm_starts=starts)
    moeopt.optimize(study, objective, n_trials=2)
    assert all(is_feasible(trial) for trial in study.trials)
    chosen = selected(objective, study)
    assert chosen.winner.plan == plans[held]
    assert chosen.passed_over == 1
    assert "Passed over for breaking a guard on dev: 1 candidate." in chosen.sentences
    alone = selected(make(), searched(make(), 24))
    assert (alone.guards, alone.passed_over, alone.good) == ((), 0, True)
    assert not {"guards", "health", "good"} & alone.record.keys()


def test_what_breaks_a_guard_is_not_called_good(make: Callable[..., Objective], tmp_path: Path) -> None:
    objective = make()
    plans = [objective.space.plan(trial) for trial in searched(objective, 16).trials]
    told = zip(*(gaps(objective, plans, Guard(TEXT), split) for split in ("search", "dev", "test")))
    plan, seen = next((p, max(gap[:2])) for p, gap in zip(plans, told) if 0 < max(gap[:2]) < gap[2])
    given = Guard(TEXT, loss=seen + 1e-6, name="strict"), Guard(TASK, loss=50.0, name="loose")
    objective = make(*given)
    url = f"sqlite:///{tmp_path}/s.db"
    study = moeopt.create_study("s", objective=objective, storage=url, sampler="random", warm_starts=[plan])
    moeopt.optimize(study, objective, n_trials=1)
    chosen = selected(objective, study)
    verdicts = {(each.name, each.split): each.verdict for each in chosen.guards}
    assert verdicts["strict", "test"] == "broken" != verdicts["strict", "dev"]
    assert verdicts["loose", "dev"] == verdicts["loose", "test"] == "holds"
    evaluator = given[0].evaluator("test", objective.model, objective.tokenizer, batch_tokens=200)
    gap = moeopt.paired_bootstrap(evaluator.evaluate(plan), evaluator.evaluate())
    assert next(g.change for g in chosen.guards if (g.name, g.split) == ("strict", "test")) == gap
    assert not chosen.good
    assert chosen.faults == ["guard strict (test)"]
    assert chosen.warnings[0] == "The winner is no good plan: it fails guard strict (test)."
    assert all(any(str(each)[1:] in text for text in chosen.sentences) for each in chosen.guards)
    again = moeopt.select(
        study, objective.model, objective.tokenizer, TASK, top=30, dev_limit=6, test_limit=6, batch_tokens=200
    )  # fmt: skip
    assert again.evaluated == 0
    assert again.record == chosen.record == study.user_attrs["selection"]
    assert json.loads(json.dumps(chosen.record))["good"] is False


def test_guards_that_cannot_be_judged_are_named(make: Callable[..., Objective]) -> None:
    blind = Guard(TextTask("blind", TEXT.examples("search"), window=40), loss=50.0)
    study = searched(make(blind), 4)
    assert selected(make(blind), study).not_judged == ("guard blind has no dev and no test split",)
    chosen = moeopt.select(study, make().model, make().tokenizer, TASK, dev_limit=6, test_limit=6)
    assert "guards blind cannot be judged: it has no recipe" in chosen.not_judged[0]
    assert any("has no recipe" in text for text in chosen.warnings)


def test_the_health_of_the_winner_is_in_the_verdict(make: Callable[..., Objective]) -> None:
    study = searched(make(), 6)
    chosen = selected(make(), study, health=True)
    assert chosen.health is not None
    assert chosen.health["plan"] == chosen.winner.plan.fingerprint
    assert ("its health report" in chosen.faults) == (chosen.health["verdict"] == "broken")
    assert f"Health: {chosen.health['told']}." in chosen.sentences
    study.set_user_attr("selection", {**chosen.record, "health": {**chosen.health, "told": "as it was"}})
    assert selected(make(), study, health=True).health["told"] == "as it was"
    for hostile in (3, {}, {**chosen.health, "told": 3}):
        study.set_user_attr("selection", {**chosen.record, "health": hostile})
        with pytest.raises(StudyError, match=r"selection\.health"):
            selected(make(), study, health=True)
    assert "health" not in selected(make(), study).record


def test_a_front_shows_guards_and_health_and_has_none_that_breaks_one(make: Callable[..., Objective]) -> None:
    guard = Guard(TEXT, loss=0.05)
    objective = make(guard, objectives=("loss", "metric"))
    study = searched(objective, 16)
    made = front_of(study, objective, methods=["ean"], keeps=[KEEP], health=True)
    judge = GuardJudge(study, objective)
    for point in made.judged:
        assert point.plan is not None
        assert point.guards == tuple(judge(point.plan, "dev"))
        broken = point.guards[0].verdict == "broken"
        assert ("guard:text on dev" in point.broken) == broken
        assert point.health is not None
        assert ("its health report" in point.broken) == (point.health["verdict"] == "broken")
        assert not (point.broken and point in made.on_dev)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.view(made))
    shown = console.export_text()
    assert "guard text − full [95%]" in shown
    assert all(str(point.guards[0].change) in shown for point in made.judged)
    assert front_of(study, objective, methods=[], keeps=[KEEP]).evaluated == 0


@pytest.mark.slow
def test_a_worker_goes_on_with_guards(
    make: Callable[..., Objective], model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    url = f"sqlite:///{tmp_path}/s.db"
    guard = Guard(TEXT, limit=5)
    searched(make(guard, prefix_memory=0), 2, url)
    study = moeopt.run_worker(url, "s", model=tmp_path / "model", n_trials=5)
    assert told(study) == told(searched(make(guard, prefix_memory=0), 5))


def test_the_command_line_guards_a_search(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": e.prompt, "options": e.options, "answer": e.answer} for e in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} lines of {i * i} " * 3}) for i in range(30))
    )
    search = [
        "search", str(tmp_path / "model"), "--task", "multiple_choice", "--data", str(tmp_path / "rows.jsonl"),
        "--study", "s", "--storage", f"sqlite:///{tmp_path}/s.db", "--keep", "2", "--space", "prune",
        "--sampler", "random", "--warm-start", "none", "--no-held",
    ]  # fmt: skip
    texts = f"text={tmp_path / 'texts.jsonl'},window=40,name=lines"
    assert "--guard must be TASK[=DATA]" in refused([*search, "--guard", "=texts.jsonl"])
    assert "--guard must be NAME=VALUE, got 'window'" in refused([*search, "--guard", "text=texts.jsonl,window"])
    assert "loss must be a finite number" in refused([*search, "--guard", f"{texts},loss=much"])
    assert main([*search, "--trials", "3", "--guard", f"{texts},limit=4,loss=5"]) == 0
    out, err = capsys.readouterr()
    assert "guard lines: full model's loss" in err
    assert "on 4 examples, 5 beyond it allowed" in err
    assert "Guard lines holds: loss " in out
    assert "on 4 search examples, 5 allowed" in out
    assert main([*search, "--trials", "4", "--guard", f"{texts},limit=4,loss=5"]) == 0
    capsys.readouterr()
    assert main([*search, "--trials", "5"]) == 2
    assert "cannot be resumed with something else. evaluation.guards" in capsys.readouterr().err
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/s.db")
    assert study.trials[3].constraints["guard:lines"] < 0
    worst = optuna.trial.create_trial(value=0.0, system_attrs={"constraints:guard:lines": 0.5})
    study.add_trial(worst)
    capsys.readouterr()
    assert main(["show", "s", "--storage", f"sqlite:///{tmp_path}/s.db"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "best trial guard lines holds: loss " in shown
    assert shown.count("guard:lines") == 1  # which the trial that was added breaks, and so is not the best


def test_merged_experts_are_made_once_for_task_and_guards(model: Any, tiny_tokenizer: Any) -> None:
    around = moeopt.Plan.one_hot([(0, 1), (2, 3)], experts=4, k=2)
    space = moeopt.MergeSpace.of(model, around=around)
    merges = []
    given: tuple[Guard, ...]
    for given in ((), (Guard(TEXT, limit=3), Guard(TASK, loss=0.0, name="again"))):
        objective = Objective(model, tiny_tokenizer, TASK, space, guards=given, prefix_memory=0)
        study = searched(objective, 3)
        merges.append(objective.evaluator.passes.cache.merges)
    full = objective.evaluator.evaluate().loss
    gaps = [trial.constraints["guard:again"] for trial in study.trials]
    assert gaps == pytest.approx([float(trial.values[0]) - full for trial in study.trials], abs=1e-6)
    assert merges[0] == merges[1] > 0
