"""How alike tasks use experts: each number against a slow sum, samples of one text, other texts, plans, files."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from moeopt import methods, report
from moeopt.cli import main
from moeopt.errors import MethodError
from moeopt.plan import Plan
from moeopt.report.similarity import sentences
from moeopt.results.analysis import activation_shares
from moeopt.results.similarity import Similarity, similarity, spearman
from moeopt.tasks import TextTask


def text(name: str, letters: str, seed: int, count: int = 32) -> TextTask:
    rng = random.Random(seed)
    return TextTask(name, search=["".join(rng.choices(letters, k=60)) for _ in range(count)], window=60)


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=3, experts=8)


@pytest.fixture(scope="module")
def tasks() -> dict[str, TextTask]:
    return {"a": text("a", "abcdef ", 1), "again": text("again", "abcdef ", 2), "b": text("b", "0123456789+", 3)}


@pytest.fixture(scope="module")
def made(model: Any, tiny_tokenizer: Any, tasks: dict[str, TextTask]) -> Similarity:
    plan = methods.plan("reap", methods.Calibration(model, tiny_tokenizer, tasks["a"]), keep=4)
    return similarity(model, tiny_tokenizer, tasks, keep=4, plan=plan, draws=50)


def test_samples_of_one_text_stand_for_each_other_and_other_texts_do_not(made: Similarity) -> None:
    verdicts = {(pair.first, pair.second): pair.verdict for pair in made.pairs}
    assert verdicts[("a", "b")] == verdicts[("again", "b")] == "differs"
    assert verdicts[("a", "again")] != "differs"
    for pair in made.pairs:
        for measure in pair.measures.values():
            assert measure.gap.mean == pytest.approx(measure.within.mean - measure.between.mean)
            assert measure.layers.shape == (2, 3)
    same, other = (made.pairs[i].measures for i in (0, 1))
    assert all(same[name].between.mean > other[name].between.mean for name in same)


def test_the_whole_is_what_one_pass_over_all_gives(
    made: Similarity, model: Any, tiny_tokenizer: Any, tasks: dict[str, TextTask]
) -> None:
    """Blocks add up to the task: shares of picks, and the experts that the method keeps."""
    for name, task in tasks.items():
        calibration = methods.Calibration(model, tiny_tokenizer, task)
        np.testing.assert_allclose(made.picks[name], activation_shares(calibration) / 2, atol=1e-6)
        order = methods.ranking("reap", calibration)
        np.testing.assert_array_equal(np.argsort(-made.scores[name], axis=1, kind="stable"), order)


def test_a_plan_hurts_what_it_was_not_made_for(
    made: Similarity, model: Any, tiny_tokenizer: Any, tasks: dict[str, TextTask]
) -> None:
    """By shares of the task's picks that go to what is dropped, counted; and in words."""
    plan = methods.plan("reap", methods.Calibration(model, tiny_tokenizer, tasks["a"]), keep=4)
    for name, dropped in made.dropped.items():
        gone = [[e for e in range(8) if e not in layer.kept] for layer in plan.layers]
        slow = [sum(made.picks[name][i, e] for e in experts) for i, experts in enumerate(gone)]
        np.testing.assert_allclose(dropped.layers[0], slow)
        assert dropped.picks.low <= dropped.picks.mean <= dropped.picks.high
    assert set(made.harms) == {"again", "b"}
    assert made.harms["b"].low > 0
    assert any("It will hurt b more" in sentence for sentence in sentences(made))


def test_ranks_are_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 5, 12)).astype(float)
    np.testing.assert_allclose(spearman(a, b), [spearmanr(x, y).statistic for x, y in zip(a, b)])
    assert spearman(np.ones((1, 4)), b[:1, :4]) == 0


def test_it_is_shown_and_saved(made: Similarity, tmp_path: Any) -> None:
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as captured:
        console.print(report.view(made))
    shown = captured.get()
    assert "a does not stand for b" in shown
    assert "what the plan drops" in shown
    for suffix in (".html", ".csv", ".json", ".png"):
        report.save(made, tmp_path / f"alike{suffix}")
    assert (tmp_path / "alike.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "alike.json").read_text())
    assert [pair["tasks"] for pair in kept["pairs"]] == [["a", "again"], ["a", "b"], ["again", "b"]]
    lines = (tmp_path / "alike.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * (3 + 3)
    assert "Content-Security-Policy" in (tmp_path / "alike.html").read_text()
    with pytest.raises(MethodError, match="is written to"):
        report.save(made, tmp_path / "alike.txt")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "naee"}, "sums over tokens"),
        ({"method": "reap_progressive"}, "sums over tokens"),
        ({"keep": 9}, "keep must be"),
        ({"limit": 3}, "4 at least"),
        ({"plan": Plan.identity(2, 8, 2)}, "not of a model of 3 layers"),
    ],
)
def test_what_cannot_be_told_is_refused(
    model: Any, tiny_tokenizer: Any, tasks: dict[str, TextTask], given: dict[str, Any], says: str
) -> None:
    with pytest.raises(MethodError, match=says):
        similarity(model, tiny_tokenizer, tasks, **given)
    with pytest.raises(MethodError, match="two tasks or more"):
        similarity(model, tiny_tokenizer, {"a": tasks["a"]})


def test_on_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str], refused: Any) -> None:
    from moeopt.demo import MODEL

    rng = random.Random(0)
    for name, letters in (("x", "abc "), ("y", "012+")):
        rows = [json.dumps({"text": "".join(rng.choices(letters, k=300))}) for _ in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    given = ["similarity", str(MODEL), *(f"--task=text={tmp_path}/{name}.jsonl" for name in "xy")]
    assert main([*given, "--limit", "16", "--keep", "4", "--out", str(tmp_path / "alike.html")]) == 0
    assert "experts that reap keeps" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "alike.html").exists()
    assert "twice or more" in refused(given[:3])
    assert "is given twice" in refused([*given[:3], given[2]])
    assert "ranks none" in refused([*given, "--method", "naee"])
