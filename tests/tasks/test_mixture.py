"""Mixtures: shares, order, and losses against the members' own."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_of import write as write_rows

import moeopt
from moeopt import tasks
from moeopt.demo import skills
from moeopt.errors import TaskError
from moeopt.evaluation.evaluation import Evaluation
from moeopt.methods import Calibration
from moeopt.plan import Plan
from moeopt.samplers.racing import honest_estimate
from moeopt.tasks import Example, GenerationTask, MixtureTask, MultipleChoiceTask, TextTask
from moeopt.tasks.mixture import _order

USES = ("share", "all")


def questions(name: str, n: int) -> MultipleChoiceTask:
    made = [Example(str(i), f"{name} {i}:", (" no", " maybe", " yes"), i % 3) for i in range(2 * n)]
    return MultipleChoiceTask(name, made[:n], (), made[n:])


def texts(documents: int) -> TextTask:
    """Windows of different lengths: 32 tokens, and what is left of a document."""
    made = ["".join(chr(97 + (i * j) % 26) for j in range(40 + 7 * i)) for i in range(2, 2 * documents + 2)]
    return TextTask("text", search=made[:documents], test=made[documents:], window=32)


@pytest.fixture
def members():
    return {"a": (questions("a", 10), 2.0), "b": (questions("b", 30), 1.0), "t": (texts(8), 3.0)}


@pytest.fixture
def plan(tiny_model):
    return Plan.one_hot([[0, 3], [1, 2]], experts=4, k=2)


def quiet(mixture: MixtureTask, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mixture.requests(*args, **kwargs)


@pytest.mark.parametrize(("use", "counts"), [("all", (10, 30, None)), ("share", (10, 5, 15))])
def test_loss_is_the_weighted_mean_of_the_members_over_what_is_in_use(
    tiny_model, tiny_tokenizer, members, plan, use, counts
):
    warned = pytest.warns(UserWarning, match="5 of 30 examples of 'b' are in use, as its share says")
    with warned if use == "share" else nullcontext():
        got = moeopt.Evaluator(tiny_model, tiny_tokenizer, MixtureTask(members, use=use), split="search").evaluate(plan)
    loss = accuracy = 0.0
    for n, (name, (task, weight)) in zip(counts, members.items(), strict=True):
        alone = moeopt.Evaluator(tiny_model, tiny_tokenizer, task, split="search", limit=n).evaluate(plan)
        loss += weight / 6 * alone.loss
        accuracy += weight / 6 * alone.accuracy
        assert got.metrics[f"{name}/accuracy"] == pytest.approx(alone.metrics["accuracy"], abs=1e-6)
    assert got.loss == pytest.approx(loss, abs=1e-5)
    assert got.accuracy == got.metrics["score"] == pytest.approx(accuracy, abs=1e-5)
    assert got.weights.mean() == pytest.approx(1, abs=1e-6)


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(USES), st.lists(st.integers(1, 9), min_size=5)
)
def test_every_prefix_holds_each_member_by_its_rate(sizes, use, weights):
    mixture = MixtureTask({f"{m}": (questions(f"m{m}", n), weights[m]) for m, n in enumerate(sizes)}, use=use)
    used = mixture._in_use(sizes)
    assert all(1 <= u <= n for u, n in zip(used, sizes, strict=True))
    assert used == sizes or use == "share"
    assert any(u == n for u, n in zip(used, sizes, strict=True))
    order = np.asarray(_order(used))
    for m, u in enumerate(used):
        assert (order == m).sum() == u
        held = np.cumsum(order == m) - u / len(order) * np.arange(1, len(order) + 1)
        assert np.abs(held).max() <= 1 + len(sizes) / 2
    if use == "share":
        for u, w in zip(used, weights, strict=False):
            assert u == 1 or abs(u - w * min(n / v for n, v in zip(sizes, weights, strict=False))) <= 1


@pytest.mark.parametrize("use", USES)
def test_rungs_race_as_one_evaluation(tiny_model, tiny_tokenizer, members, plan, use):
    mixture = MixtureTask(members, use=use)
    whole = moeopt.Evaluator(tiny_model, tiny_tokenizer, mixture, limit=24).evaluate(plan)
    raced = moeopt.Evaluator(tiny_model, tiny_tokenizer, mixture, limit=24, rungs=(6, 12, 24))
    seen = list(raced.race(plan))
    for part, size in zip(seen, (6, 12, 24), strict=True):
        np.testing.assert_array_equal(part.weights, whole.weights[:size])
        np.testing.assert_allclose(part.losses, whole.losses[:size], atol=1e-5)
    part = Evaluation(*seen[1].scores, tokens=0, layer_tokens=0, seconds=0.0, active=2.0)
    *_, last = raced.race(plan, part)
    np.testing.assert_allclose(last.losses, whole.losses, atol=1e-5)
    assert last.tokens < seen[-1].tokens
    assert honest_estimate(seen[0].scores, whole.scores) == pytest.approx(whole.loss, abs=1e-5)


def written(skill: str) -> GenerationTask:
    def split(part: str) -> list[Example]:
        table = skills.rows(skill, part, 24)
        return [Example(row["id"], row["prompt"], (row["options"][row["answer"]],), 0) for row in table]

    return GenerationTask(skill, *map(split, ("search", "dev", "test")), stop="\n")


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_the_metric_of_a_member_that_writes_is_that_of_its_text(use):
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    plan = Plan.one_hot([[0, 1, 2, 3, 5, 7], [4, 5, 6, 7]] * 3, experts=8, k=2)
    members = {"w": (written("caesar"), 2.0), "q": (moeopt.demo.skill_task("sort"), 1.0), "t": (texts(8), 3.0)}
    mixture = MixtureTask(members, use=use)
    evaluator = moeopt.Evaluator(model, tokenizer, mixture, limit=24, score="metric", rungs=(5, 11, 24))
    seen = list(evaluator.race(plan))
    likelihood = moeopt.Evaluator(model, tokenizer, mixture, limit=24).evaluate(plan)
    np.testing.assert_allclose(seen[-1].weights, likelihood.weights, rtol=1e-6)
    np.testing.assert_array_equal(seen[-1].losses, 1 - seen[-1].correct)
    loss = 0.0
    for name, (at, _) in mixture.places(quiet(mixture, "search", tokenizer, 24)).items():
        task = members[name][0]
        alone = moeopt.Evaluator(model, tokenizer, task, limit=len(at), score="metric").evaluate(plan)
        np.testing.assert_allclose(seen[-1].correct[at], alone.correct, atol=0.02)  # other batches
        assert seen[-1].metrics[f"{name}/{task.metric}"] == pytest.approx(alone.accuracy, abs=0.02)
        loss += alone.losses.astype(float) @ likelihood.weights[at].astype(float)
        assert name != "w" or use == "all" or 0 < alone.accuracy < 1
    assert seen[-1].loss == pytest.approx(loss / likelihood.weights.sum(dtype=float), abs=0.02)
    for part, size in zip(seen, (5, 11, 24)):
        np.testing.assert_array_equal(part.scores, seen[-1].scores[:, :size])
    *_, last = evaluator.race(plan, seen[1])
    np.testing.assert_array_equal(last.scores, seen[-1].scores)
    assert 0 < last.tokens < seen[-1].tokens
    assert evaluator.fingerprint != moeopt.Evaluator(model, tokenizer, mixture, limit=24).fingerprint


def test_methods_calibrate_on_the_members_right_answers(tiny_model, tiny_tokenizer, members):
    mixture = MixtureTask(members, use="all")
    requests = quiet(mixture, "search", tiny_tokenizer)
    expected = sorted(
        request.ids
        for task, _ in members.values()
        for request in task.requests("search", tiny_tokenizer)
        if task.name == "text" or request.option == task.examples("search")[request.example].answer
    )
    assert sorted(request.ids for request in mixture.solutions("search", requests)) == expected
    assert Calibration(tiny_model, tiny_tokenizer, mixture).sequences == len(expected)


def test_mixture_of_mixtures(tiny_model, tiny_tokenizer, members):
    inner = MixtureTask({"a": members["a"], "b": (members["b"][0], 2)}, use="all", name="inner")
    nested = MixtureTask([(inner, 4), members["t"]], use="all")
    flat = MixtureTask({**members, "b": (members["b"][0], 2)} | {"t": members["t"]}, use="all")
    losses = [moeopt.Evaluator(tiny_model, tiny_tokenizer, mixed).evaluate().loss for mixed in (nested, flat)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert nested.examples("search")[0].id.startswith(("inner/a/", "inner/b/", "text/"))


def test_examples_stand_in_the_order_of_requests(tiny_tokenizer, members):
    mixture = MixtureTask({"a": members["a"], "b": members["b"]})
    examples = mixture.examples("search")
    for request in quiet(mixture, "search", tiny_tokenizer):
        example = examples[request.example]
        assert tiny_tokenizer.decode(request.ids) == "<s>" + example.prompt + example.options[request.option]


def test_member_that_a_limit_leaves_out_is_named(tiny_tokenizer):
    mixture = MixtureTask({"a": (questions("a", 40), 9), "b": (questions("b", 40), 1)})
    with pytest.warns(UserWarning, match="none of the first 3 examples is of 'b', whose first is number 6"):
        requests = mixture.requests("search", tiny_tokenizer, 3)
    zeros = np.zeros(len(requests))
    scores = mixture.reduce("search", requests, zeros, zeros.astype(np.int64))
    assert set(mixture.metrics("search", scores)) == {"score", "a/accuracy"}
    with pytest.raises(TaskError, match="limit must be at least 1, got 0"):
        mixture.requests("search", tiny_tokenizer, 0)


def test_weights_that_a_task_does_not_tell_are_refused(tiny_tokenizer):
    class Heavy(MultipleChoiceTask):
        def weights(self, split, tokenizer, max_length=None):
            return 2 * super().weights(split, tokenizer, max_length)

    mixture = MixtureTask([(Heavy("h", [Example("1", "q", ("a", "b"), 0)]), 1)])
    requests = mixture.requests("search", tiny_tokenizer)
    with pytest.raises(TaskError, match="'h': `reduce` gives other weights than `weights`"):
        mixture.reduce("search", requests, np.zeros(2), np.zeros(2, np.int64))


def test_splits_and_overlap(members):
    only = MultipleChoiceTask("s", search=[Example("1", "q", ("a", "b"), 0)])
    mixture = MixtureTask([(only, 1), members["a"]])
    assert mixture.splits == ("search",)
    with pytest.raises(TaskError, match="no split 'test': 's' lacks it"):
        mixture.examples("test")
    with pytest.raises(TaskError, match="unknown split 'train'"):
        mixture.examples("train")
    shared = Example("x", "q", ("a", "b"), 0)
    other = [Example(str(i), f"{i}", ("a", "b"), 0) for i in range(2)]
    first = MultipleChoiceTask("one", [shared], (), other[:1])
    second = MultipleChoiceTask("two", other[1:], (), [shared])
    with pytest.raises(TaskError, match="example 'x' is in 'test' of 'two' and in 'search' of 'one'"):
        MixtureTask([(first, 1), (second, 1)])
    with pytest.raises(TaskError, match="no split in common: s has search; d has dev"):
        MixtureTask({"s": (only, 1), "d": (MultipleChoiceTask("d", dev=other), 1)})


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({"a": 1, "b": 0}, {}, "weight of 'b' must be a number above 0, got 0"),
        ({"a": 1, "b": float("nan")}, {}, "weight of 'b' must be"),
        ({"a": True, "b": 1}, {}, "weight of 'a' must be a number above 0, got True"),
        ({}, {}, "needs at least one task"),
        ([1, 1], {}, "two tasks of the mixture are called 'a'"),
        ({"a": 1}, {"use": "some"}, "use must be one of share, all, got 'some'"),
    ],
)
def test_bad_mixtures_are_named(members, options, message):
    pairs = members.items() if isinstance(members, dict) else zip("aa", members)
    made = [(questions(name, 3), weight) for name, weight in pairs]
    with pytest.raises(TaskError, match=message):
        MixtureTask(made, **options)


def test_fingerprint_tells_weights_and_members(members):
    changed = {**members, "a": (members["a"][0], 5.0)}
    shots = {**members, "a": (members["a"][0].prompted(shots=1), 2.0)}
    doubled = {name: (task, 2 * weight) for name, (task, weight) in members.items()}
    made = [MixtureTask(members), MixtureTask(members, use="all"), MixtureTask(changed), MixtureTask(shots)]
    assert len({mixed.fingerprint("search") for mixed in made}) == 4
    assert MixtureTask(doubled).describe() == made[0].describe()


def write(folder, entries) -> str:
    rows = [{"prompt": f"{i} and 1 make", "options": [str(i + 1), str(i + 2)], "answer": i % 2} for i in range(60)]
    write_rows(folder / "sums.jsonl", rows)
    (folder / "notes").mkdir(exist_ok=True)
    for i in range(12):
        (folder / "notes" / f"{i}.txt").write_text(f"note {i}: " + "all is well and more is to come. " * 4)
    (folder / "mixture.json").write_text(json.dumps({"tasks": entries}) if not isinstance(entries, str) else entries)
    return str(folder / "mixture.json")


SUMS = {"task": "multiple_choice", "data": "sums.jsonl", "weight": 2, "name": "sums", "options": {"shots": 2}}
NOTES = {"task": "text", "data": "notes", "options": {"window": 32}}


def test_file(tmp_path, tiny_tokenizer):
    path = write(tmp_path, [SUMS, NOTES])
    mixture = tasks.get("mixture", path, use="all")
    assert mixture.describe()["members"]["sums"]["prompting"]["shots"] == 2
    assert mixture.shares == {"sums": 2 / 3, "text": 1 / 3}
    assert mixture.splits == ("search", "dev", "test")
    assert mixture.requests("search", tiny_tokenizer)
    with pytest.raises(TaskError, match="give shots and chat to its tasks"):
        mixture.prompted(shots=2)
    with pytest.raises(TaskError, match="'mixture' has no option 'shots'"):
        tasks.get("mixture", path, shots=2)
    with pytest.raises(TaskError, match=r"cannot read mixture file .*absent.json: No such file"):
        tasks.get("mixture", str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "mixture.json is not JSON"),
        ("[]", 'must be {"tasks": '),
        ([], 'must be {"tasks": '),
        (["sums"], "task 1: expected an object with a \"task\", got 'sums'"),
        ([SUMS, {"data": "x"}], "task 2: expected an object"),
        ([SUMS | {"wieght": 1}], "task 1: unknown 'wieght'; did you mean 'weight'"),
        ([SUMS | {"task": "bolq"}], "task 1: unknown task 'bolq'; did you mean 'boolq'"),
        ([SUMS | {"task": "mixture"}], "task 1: a mixture's file takes neither .* nor mixtures, got 'mixture'"),
        ([SUMS | {"task": "mine.py:Mine"}], "task 1: a mixture's file takes neither .*'mine.py:Mine'"),
        ([{"task": "boolq", "options": {"trust_remote_code": True}}], "task 1: .* leave trust_remote_code out"),
        ([SUMS | {"data": "absent.jsonl"}], "task 1: data file .*absent.jsonl does not exist"),
        ([SUMS | {"data": 3}], 'task 1: "data" must be a path'),
        ([SUMS | {"options": {"data": "x"}}], 'task 1: "options" must be the task\'s own'),
        ([SUMS | {"options": {"delimeter": "x"}}], "task 1: task 'multiple_choice' has no option 'delimeter'"),
        ([SUMS, SUMS], "task 2: a task before is called 'sums' already"),
        ([SUMS, NOTES | {"weight": "2"}], "weight of 'text' must be a number above 0, got '2'"),
    ],
)
def test_malformed_file_is_named(tmp_path, entries, message):
    with pytest.raises(TaskError, match=message):
        tasks.get("mixture", write(tmp_path, entries))
