"""Selections: the winner is that found by hand, nothing runs twice, looks at test are counted, bad input is named."""

from __future__ import annotations

import io
import json
import sqlite3
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

import moeopt
from moeopt import report
from moeopt.cli import main
from moeopt.errors import NonFiniteLossError, StudyError, TaskError
from moeopt.evaluation import Compression, Evaluator, Interval, paired_bootstrap
from moeopt.evaluation.store import Scored, StudyStore
from moeopt.exporting import why_not_stock
from moeopt.plan import LayerPlan, Plan
from moeopt.results.method_comparison.searched import searched
from moeopt.results.selection import SELECTION, check, on_test, recorded, selected_trial, verdict
from moeopt.results.selection.record import sentence
from moeopt.tasks import MultipleChoiceTask, TextTask
from moeopt.tasks.base import Example

optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings("ignore:The test split has now")

TEXTS = [
    f"the {a} {b} sat on the {c}" for a in ("red", "old", "big", "wet") for b in ("cat", "dog") for c in ("mat", "log")
]
LAYERS, EXPERTS, KEEP = 3, 6, 3


def text_task() -> TextTask:
    return TextTask("toy", search=TEXTS[:4], dev=TEXTS[4:9], test=TEXTS[9:], window=32)


@pytest.fixture
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)


@pytest.fixture
def objective(model: Any, tiny_tokenizer: Any) -> moeopt.Objective:
    return moeopt.Objective(model, tiny_tokenizer, text_task(), moeopt.PruneSpace.of(model, keep=KEEP))


def searched_study(objective: moeopt.Objective, trials: int = 8, **options: Any) -> optuna.Study:
    study = moeopt.create_study(objective=objective, sampler="random", **{"storage": None, **options})
    moeopt.optimize(study, objective, n_trials=trials)
    return study


@dataclass
class Forwards:
    """Passes through the model's first MoE block."""

    count: int = 0


@pytest.fixture
def forwards(model: Any) -> Iterator[Forwards]:
    counted = Forwards()

    def count(*_: Any) -> None:
        counted.count += 1

    handle = model.model.layers[0].mlp.register_forward_hook(count)
    yield counted
    handle.remove()


def test_the_winner_is_the_one_found_by_hand() -> None:
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    task = moeopt.demo.skill_task("caesar")
    space = moeopt.PruneSpace.of(model, keep=4)
    objective = moeopt.Objective(model, tokenizer, task, space, limit=6)
    study = searched_study(objective, 7)
    moeopt.enqueue(study, space, space.plan(study.best_trial))
    moeopt.optimize(study, objective, n_trials=8)
    assert study.trials[7].value == study.best_value  # a plan twice

    selected = moeopt.select(study, objective, top=5, dev_limit=8, test_limit=12)

    ranked = sorted(study.trials[:7], key=lambda t: t.value)[:5]
    dev = Evaluator(model, tokenizer, task, split="dev", limit=8)
    losses = {t.number: dev.evaluate(space.plan(t)).loss for t in ranked}
    assert [(c.trial, c.dev and c.dev.loss) for c in selected.candidates] == sorted(losses.items(), key=lambda x: x[1])
    assert all(c.search_loss == study.trials[c.trial].value for c in selected.candidates)
    winner = study.trials[min(losses, key=lambda n: losses[n])]
    assert (selected.winner.trial, selected.search_best.trial) == (winner.number, ranked[0].number)

    test = Evaluator(model, tokenizer, task, split="test", limit=12)
    full, best = test.evaluate(None), test.evaluate(space.plan(winner))
    assert np.array_equal(selected.evaluations["test"]["winner"].scores, best.scores)
    of_metric = paired_bootstrap(best, full, of="accuracy")
    assert selected.intervals["full"] == {"loss": paired_bootstrap(best, full), "accuracy": of_metric}
    if selected.search_best is not selected.winner:
        other = test.evaluate(space.plan(ranked[0]))
        assert selected.intervals["search_best"]["loss"] == paired_bootstrap(best, other)
    assert selected.gain("search") == objective.evaluator.evaluate(None).loss - winner.value
    assert selected.gain("test") == pytest.approx(full.loss - best.loss)
    scores = {"loss": best.loss, "accuracy": best.accuracy, "active": best.active}
    assert selected.record["scores"]["test"]["winner"] == scores
    assert json.loads(json.dumps(selected.record)) == selected.record == recorded(study)
    console = Console(width=130, file=io.StringIO())
    console.print(report.view(selected))
    for text in (selected.sentence, f"winner, trial {winner.number}"):
        assert text in console.file.getvalue()  # type: ignore[attr-defined]


def test_equal_plans_and_failed_trials_are_no_candidates(objective: moeopt.Objective) -> None:
    study = searched_study(objective, 4)
    for trial in study.trials:
        moeopt.enqueue(study, objective.space, objective.space.plan(trial))
    moeopt.optimize(study, objective, n_trials=8)
    study.add_trial(create_trial(state=TrialState.FAIL))
    study.add_trial(create_trial(state=TrialState.PRUNED, system_attrs=study.trials[0].system_attrs))
    selected = moeopt.select(study, objective)
    assert sorted(c.trial for c in selected.candidates) == [0, 1, 2, 3]


@pytest.fixture
def place(database: str) -> Iterator[tuple[str, str]]:
    """Name and storage of a study that is to be made."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name, database
    optuna.delete_study(study_name=name, storage=database)


@pytest.mark.slow
def test_a_study_keeps_its_selections_and_runs_nothing_twice(
    objective: moeopt.Objective, place: tuple[str, str], forwards: Forwards
) -> None:
    name, url = place
    searched_study(objective, study_name=name, storage=url)
    options: dict[str, Any] = {"dev_limit": 3, "test_limit": 4}
    first = moeopt.select(moeopt.load_study(name, url), objective, top=3, **options)
    assert (first.evaluated, first.looks) == (1 + 4 + len(first.evaluations["test"]), 1)
    assert first.layer_tokens > 0
    before = forwards.count
    assert before > 0

    study = moeopt.load_study(name, url)
    again = moeopt.select(study, objective.model, objective.tokenizer, objective.task, top=3, **options)
    assert (again.evaluated, again.layer_tokens, again.looks, forwards.count) == (0, 0, 1, before)
    assert again.record == first.record == recorded(study)
    assert selected_trial(study).number == first.winner.trial

    more = moeopt.select(study, objective, top=5, **options)
    changed = {c.plan.fingerprint for c in (more.winner, more.search_best)}
    changed -= {c.plan.fingerprint for c in (first.winner, first.search_best)}
    assert (more.evaluated, more.looks) == (2 + len(changed), 1 + bool(changed))
    assert {c.trial for c in first.candidates} < {c.trial for c in more.candidates}
    tested = on_test(moeopt.load_study(name, url))
    for plan in ("full", "winner"):
        assert np.array_equal(tested[plan].scores, more.evaluations["test"][plan].scores)
    assert len(json.dumps(study.user_attrs[SELECTION])) < 4000


def test_every_new_run_on_test_is_a_look(objective: moeopt.Objective) -> None:
    study = searched_study(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = moeopt.select(study, objective, top=2, test_limit=3)
        assert first.warnings == [text for text in first.warnings if "looked at" not in text]
        assert moeopt.select(study, objective, top=2, test_limit=3).looks == 1
    with pytest.warns(UserWarning, match="looked at 2 times"):
        second = moeopt.select(study, objective, top=2, test_limit=4)
    assert second.looks == 2
    assert any("2 times" in text for text in second.warnings)
    assert second.evaluated == len(second.evaluations["test"])
    back = moeopt.select(study, objective, top=2, test_limit=3)
    assert (back.evaluated, back.looks) == (0, 2)
    assert recorded(study) == back.record


def test_a_selection_that_was_cut_off_goes_on_where_it_was(objective: moeopt.Objective, tmp_path: Path) -> None:
    """Every evaluation is committed when the next begins, so that whatever ends it, kill -9 too, loses one at most."""
    study = searched_study(objective, study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    committed = "SELECT COUNT(*) FROM study_system_attributes WHERE key LIKE 'moeopt:dev:%'"

    def interrupt(done: int, total: int, what: str) -> None:
        with closing(sqlite3.connect(tmp_path / "study.db")) as other:
            assert other.execute(committed).fetchone() == (done,)
        if done == 3:
            assert what.startswith("candidate 4 of 5 (trial ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moeopt.select(study, objective, top=5, progress=interrupt)
    assert recorded(study) is None
    resumed = moeopt.select(study, objective, top=5)
    assert resumed.evaluated == 2 + 2 + len(resumed.evaluations["test"])
    assert resumed.looks == 1
    assert resumed.record == moeopt.select(searched_study(objective), objective, top=5).record


@pytest.mark.parametrize(
    ("search", "interval", "became", "said"),
    [
        (0.0, (0.2, 0.1, 0.3), "none", "No gain on search to lose: winner - full is -0.0000 there"),
        (-0.5, (-0.4, -0.6, -0.2), "none", "+0.5000 there, +0.4000 [+0.2000, +0.6000] on test."),
        (0.5, (-0.2, -0.3, -0.1), "reversed", "(0.5000) reversed on test (-0.2000 [-0.3000, -0.1000])"),
        (0.5, (0.0, -0.1, 0.1), "vanished", "(0.5000) vanished on test (0.0000 [-0.1000, 0.1000])."),
        (0.5, (0.3, 0.0, 0.6), "vanished", "excludes neither 0 nor the gain on search"),
        (0.5, (-0.1, -0.3, 0.0), "vanished", "vanished"),
        (0.5, (0.2, 0.1, 0.4), "shrank", "(0.5000) shrank to 0.2000 [0.1000, 0.4000] on test."),
        (0.5, (0.3, 0.1, 0.5), "holds", "(0.5000) holds on test (0.3000 [0.1000, 0.5000])."),
        (0.5, (0.7, 0.6, 0.8), "holds", "holds"),
    ],
)
def test_the_verdict(search: float, interval: tuple[float, float, float], became: str, said: str) -> None:
    assert verdict(search, Interval(*interval)) == became
    assert said in sentence(search, Interval(*interval))


def choice_task(count: int = 40) -> MultipleChoiceTask:
    rows = [Example(str(i), f"{i} and 1 make", (str(i + 1), str(i + 2)), i % 2) for i in range(count)]
    return MultipleChoiceTask("sums", rows[:8], rows[8:20], rows[20:])


def test_a_study_of_a_metric_selects_by_it(model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.PruneSpace.of(model, keep=KEEP)
    objective = moeopt.Objective(model, tiny_tokenizer, choice_task(), space, score="metric")
    study = searched_study(objective)
    selected = moeopt.select(study, objective)
    dev = Evaluator(model, tiny_tokenizer, objective.task, split="dev")
    wrong = [1 - dev.evaluate(c.plan).accuracy for c in selected.candidates]
    assert [c.dev and pytest.approx(c.dev.loss) for c in selected.candidates] == sorted(wrong) == wrong
    assert selected.settings["score"] == "metric"
    smooth = moeopt.select(study, objective, score="likelihood")
    losses = sorted(dev.evaluate(c.plan).loss for c in selected.candidates)
    assert [c.dev and c.dev.loss for c in smooth.candidates] == losses
    likelihood = Evaluator(model, tiny_tokenizer, objective.task).evaluate(smooth.winner.plan)
    assert np.array_equal(smooth.evaluations["search"]["winner"].scores, likelihood.scores)


def test_a_study_without_labels_selects_by_its_distance(model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.PruneSpace.of(model, keep=KEEP)
    compression = Compression(top_p=0.9)
    objective = moeopt.Objective(model, tiny_tokenizer, text_task(), space, score="kl", compression=compression)
    study = searched_study(objective, 4)
    selected = moeopt.select(study, objective)
    dev = Evaluator(model, tiny_tokenizer, objective.task, split="dev", score="kl", compression=compression)
    losses = [dev.evaluate(c.plan).loss for c in selected.candidates]
    assert losses == sorted(losses) == [c.dev and c.dev.loss for c in selected.candidates]
    assert selected.evaluations["test"]["full"].loss == 0
    assert (selected.metric, selected.verdict) == ("agreement", "none")
    assert selected.evaluated == 1 + 5 + len(
        selected.evaluations["test"]
    )  # on search, the trials' own scores were taken
    assert moeopt.select(study, model, tiny_tokenizer, objective.task).evaluated == 0


def test_active_experts_weigh_as_in_the_search(model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.ActiveSpace.of(model, k=(1, 2))
    objective = moeopt.Objective(model, tiny_tokenizer, text_task(), space, active_weight=100.0)
    study = searched_study(objective, 6)
    selected = moeopt.select(study, objective)
    active = [float(np.mean([layer.k for layer in c.plan.layers])) for c in selected.candidates]
    assert len(set(active)) > 1
    assert active == sorted(active)
    assert selected.evaluations["search"]["winner"].loss == pytest.approx(selected.winner.search_loss)
    dev = Evaluator(model, tiny_tokenizer, objective.task, split="dev").evaluate(selected.winner.plan)
    assert selected.winner.dev is not None
    assert selected.winner.dev.loss == pytest.approx(dev.loss + 100 * dev.active, rel=1e-4)
    assert selected.gain("test") == pytest.approx(100 * (2 - active[0]), abs=1)


def merged(scale: float) -> Plan:
    w_em = np.eye(KEEP, EXPERTS, dtype=np.float32)
    w_em[:, -1] = scale
    return Plan(tuple(LayerPlan(EXPERTS, 2, w_em=w_em, w_rm=w_em, router="prob") for _ in range(LAYERS)))


def test_a_candidate_without_a_finite_loss_does_not_win(objective: moeopt.Objective) -> None:
    about = moeopt.select(searched_study(objective, 3), objective).examples
    on = {split: Scored(split, facts["of"]) for split, facts in about.items()}
    study, overflow = searched_study(objective, 3), NonFiniteLossError("overflow", layer=0)
    best = objective.space.plan(study.best_trial).fingerprint
    for split in ("dev", "test"):
        StudyStore(study).put(best, on[split], overflow)
    selected = moeopt.select(study, objective)
    assert selected.search_best is selected.candidates[-1]
    assert selected.search_best.trial == study.best_trial.number
    assert selected.search_best.dev is None
    assert "no finite loss on test" in selected.sentences[-1]
    assert selected.record["candidates"]["dev_loss"][-1] is None
    assert set(on_test(study)) == {"full", "winner"}
    assert moeopt.select(study, objective).evaluated == 0
    StudyStore(study).put(selected.winner.plan.fingerprint, on["test"], overflow)
    with pytest.raises(NonFiniteLossError, match=f"trial {selected.winner.trial}, the winner, on test: overflow"):
        moeopt.select(study, objective)
    with pytest.raises(NonFiniteLossError, match="no candidate has a finite loss on dev"):
        moeopt.select(study, objective, top=1)


def test_stock_only_selects_what_exports(model: Any, tiny_tokenizer: Any) -> None:
    space = moeopt.EEPSpace.of(model, keep=KEEP)
    objective = moeopt.Objective(model, tiny_tokenizer, text_task(), space)
    study = moeopt.create_study(objective=objective, storage=None, initial=3, prune_until=4)
    for scale in (0.1, 0.2):
        moeopt.enqueue(study, space, merged(scale))
    moeopt.optimize(study, objective, n_trials=5)
    every = moeopt.select(study, objective)
    stock = moeopt.select(study, objective, stock_only=True)
    assert [c.trial for c in stock.candidates] == [c.trial for c in every.candidates if why_not_stock(c.plan) is None]
    assert 0 < len(stock.candidates) < len(every.candidates)
    only_merged = moeopt.create_study(objective=objective, storage=None)
    moeopt.enqueue(only_merged, space, merged(0.1))
    moeopt.optimize(only_merged, objective, n_trials=1)
    with pytest.raises(StudyError, match="no completed trial that an ordinary checkpoint can hold"):
        moeopt.select(only_merged, objective, stock_only=True)


def test_what_was_selected_joins_a_comparison(objective: moeopt.Objective) -> None:
    study = searched_study(objective)
    assert [row.name for row in searched(study)] == ["search"]
    ranked = sorted(study.trials, key=lambda t: t.value)
    study.set_user_attr(SELECTION, {"winner": ranked[2].number})
    selected = searched(study)
    assert [row.name for row in selected] == ["search, selected on dev", "search"]
    assert [row.plan for row in selected] == [objective.space.plan(ranked[i]) for i in (2, 0)]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"top": 0}, "top .* got 0"), ({"top": 1001}, "at most 1000, got 1001"), ({"top": True}, "top .* got True"),
        ({"test_limit": 1.5}, "test_limit .* got 1.5"), ({"score": "kll"}, "score .* got 'kll'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(objective: moeopt.Objective, given: dict[str, Any], named: str) -> None:
    study = moeopt.create_study(objective=objective, storage=None)
    with pytest.raises(StudyError, match=named):
        moeopt.select(study, objective, **given)


def test_studies_that_cannot_serve_are_refused(objective: moeopt.Objective) -> None:
    study = moeopt.create_study(study_name="s", objective=objective, storage=None)
    model, tokenizer, task = objective.model, objective.tokenizer, objective.task
    for call in (lambda: moeopt.select(study, objective), lambda: check(study, task)):  # the command's, before loading
        with pytest.raises(StudyError, match="'s' has no completed trial with a finite loss yet"):
            call()
    with pytest.raises(StudyError, match="nothing was selected"):
        selected_trial(study)
    with pytest.raises(StudyError, match="moeopt did not make it"):
        moeopt.select(optuna.create_study(), objective)
    with pytest.raises(StudyError, match=r"another task: 'toy'.*'sums'"):
        moeopt.select(study, model, tokenizer, choice_task())
    with pytest.raises(StudyError, match="an Objective, or model, tokenizer and task"):
        moeopt.select(study, model)
    for split in ("dev", "test"):
        other = moeopt.Objective(model, tokenizer, task, objective.space, split=split)
        with pytest.raises(StudyError, match=f"searched the {split} split"):
            moeopt.select(moeopt.create_study(objective=other, storage=None), other)
    no_test = moeopt.Objective(model, tokenizer, TextTask("t", TEXTS[:4], TEXTS[4:], [], window=32), objective.space)
    with pytest.raises(TaskError, match=r"'t' has no test split \(it has search, dev\)"):
        moeopt.select(moeopt.create_study(objective=no_test, storage=None), no_test)


@pytest.fixture(scope="module")
def shop(make_mixtral: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, task.jsonl, and studies.db with the study `s`."""
    folder = tmp_path_factory.mktemp("select-cli")
    make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} and 1 make", "options": [str(i + 1), str(i + 2)], "answer": i % 2} for i in range(60)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--limit", "4", "--keep", "3", "--trials", "10", "--sampler-option", "initial=4"]
    assert main(["search", *where(folder), *small, "--sampler-option", "prune_until=6"]) == 0
    return folder


def where(folder: Path) -> list[str]:
    task = ["--task", "multiple_choice", "--data", str(folder / "task.jsonl")]
    return [str(folder / "model"), *task, "--study", "s", "--storage", f"sqlite:///{folder / 'studies.db'}"]


@pytest.mark.slow
def test_the_command_selects_shows_and_exports(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    given = ["select", *where(shop), "--top", "4", "--dev-limit", "5", "--test-limit", "6", "--stock"]
    assert main(given) == 0
    first = capsys.readouterr().out
    for text in ("winner, trial", "full model", "dev loss", "search 4, dev 5, test 6", "--trial selected"):
        assert text in first
    assert main(given) == 0
    assert capsys.readouterr().out == "All of it was on record; nothing was evaluated.\n" + first

    study = ["--study", "s", "--storage", f"sqlite:///{shop / 'studies.db'}"]
    assert main(["show", "s", *study[2:], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["selection"]
    assert main(["show", "s", *study[2:]]) == 0
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())  # long sentences are wrapped
    assert all(text in shown for text in [*record["sentences"], f"winner, trial {record['winner']}"])
    assert main(["export", str(shop / "model"), str(tmp_path / "out"), *study, "--trial", "selected"]) == 0
    exported = json.loads((tmp_path / "out" / "moeopt.json").read_text())
    assert exported["fingerprint"] == record["plans"]["winner"]
    card = (tmp_path / "out" / "README.md").read_text()
    change, scores = record["test_minus"]["full"]["loss"], record["scores"]["test"]
    told = f"{scores['full']['loss']:.4f} | {scores['winner']['loss']:.4f} | {Interval(**change)} |"
    assert f"| test | 6 | `loss` | {told}" in card
    assert all(text in card for text in record["sentences"])
    assert f"value: {round(scores['winner'][record['metric']], 6)}" in card


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--top", "0"], ("--top", "'0'")),
        (["--study", "z"], ("no study 'z'",)),
        (["--task-option", "fractions=[0.4,0.3,0.3]"], ("another task",)),
        (["--data", "missing.jsonl"], ("missing.jsonl",)),
    ],
)
def test_the_command_refuses_in_one_line(
    shop: Path, options: list[str], named: tuple[str, ...], refused: Callable[..., str]
) -> None:
    said = refused(["select", *where(shop), *options])
    assert all(text in said for text in named), said
