"""Label-free losses against the full model: the formulas, the bounds of a compressed teacher, when it is renewed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeopt
from moeopt.errors import ModelError, NonFiniteLossError
from moeopt.evaluation import Compression, Evaluator
from moeopt.evaluation.evaluator import Score
from moeopt.evaluation.runners import Whole
from moeopt.evaluation.teacher import TOKEN_BYTES, Teacher
from moeopt.models import patched
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import Example, MultipleChoiceTask, TextTask

LAYERS, EXPERTS, VOCAB = 3, 4, 300
OPTIONS = [(" no", " yes", " y"), ("n", "y"), (" a long one", " a longer one", " a", " long")]
QUESTIONS = [Example(str(i), f"{'so ' * (i % 4)}is {i} odd?", OPTIONS[i % 3], i % 2) for i in range(18)]
TASKS = {
    "questions": MultipleChoiceTask("questions", search=QUESTIONS),
    "text": TextTask(
        "text", search=[f"line {i}: text that goes on and on " * (1 + i % 3) for i in range(9)], window=40
    ),
}
FULL = Plan.identity(LAYERS, EXPERTS, 2)
PRUNED = Plan.one_hot([[0, 1], [2, 3], [3, 1]], experts=EXPERTS, k=2)
DENSE = LayerPlan(EXPERTS, 2, w_em=np.eye(4)[[0, 2]] + 0.1, w_rm=np.eye(4)[[0, 2]] + 0.1, router="prob")
MERGED = Plan((DENSE,) * LAYERS)
EXACT = Compression(top_p=1.0)
LABEL_FREE: tuple[Score, ...] = ("kl", "acceptance")


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=LAYERS, experts=EXPERTS)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Any:
    return TASKS[request.param]


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Callable[..., Evaluator]:
    def make(task: Any = TASKS["questions"], model: Any = model, score: Score = "kl", **options: Any) -> Evaluator:
        return Evaluator(model, tiny_tokenizer, task, score=score, **({"batch_tokens": 90} | options))

    return make


def teacher_of(evaluator: Evaluator) -> Teacher:
    assert evaluator.teacher is not None
    return evaluator.teacher


def reference(model: Any, tokenizer: Any, task: Any, plan: Plan) -> np.ndarray:
    """Of each example, a sequence at a time in float64: mean KL, total variation, agreement; and its positions."""
    seen: dict[int, dict[tuple[int, ...], tuple[float, float, float]]] = {}
    for request in task.requests("search", tokenizer):
        ids, contexts = torch.tensor([request.ids]), seen.setdefault(request.example, {})
        with torch.no_grad():
            both = [model(input_ids=ids).logits[0].double().numpy()]
            with patched(model, plan):
                both.append(model(input_ids=ids).logits[0].double().numpy())
        for t in range(request.scored_from, len(request.ids)):
            p, q = (np.exp(x[t - 1]) / np.exp(x[t - 1]).sum() for x in both)
            values = (p * np.log(p / q)).sum(), 1 - np.minimum(p, q).sum(), float(p.argmax() == q.argmax())
            contexts[request.ids[:t]] = values
    rows = [[*np.mean(list(contexts.values()), 0), len(contexts)] for contexts in seen.values()]
    return np.array(rows).T


@pytest.mark.parametrize("plan", [PRUNED, MERGED], ids=["pruned", "merged"])
def test_losses_are_those_of_the_whole_softmax(model, tiny_tokenizer, make, task, plan) -> None:
    kl, distance, agreement, positions = reference(model, tiny_tokenizer, task, plan)
    by_score = {score: make(task, score=score, compression=EXACT).evaluate(plan) for score in LABEL_FREE}
    np.testing.assert_allclose(by_score["kl"].losses, kl, atol=1e-5)
    np.testing.assert_allclose(by_score["acceptance"].losses, distance, atol=1e-5)
    for evaluation in by_score.values():
        np.testing.assert_array_equal(evaluation.weights, positions)
        np.testing.assert_allclose(evaluation.correct, agreement, atol=1e-6)
        means = np.array([kl, 1 - distance, agreement]) @ positions / positions.sum()
        assert list(evaluation.metrics) == ["kl", "acceptance", "agreement"]
        np.testing.assert_allclose(list(evaluation.metrics.values()), means, atol=1e-5)
        assert evaluation.accuracy == pytest.approx(means[2], abs=1e-6)
    assert by_score["kl"].loss == pytest.approx(by_score["kl"].metrics["kl"], abs=1e-6)
    assert by_score["acceptance"].loss == pytest.approx(1 - by_score["acceptance"].metrics["acceptance"], abs=1e-6)
    assert by_score["kl"].loss > 0
    assert 0 < by_score["acceptance"].loss < 1


def test_a_position_that_options_share_counts_once(make) -> None:
    shared = Example("0", "is it?", (" abcd", " abce", " abc"), 0)  # after " ", "a", "b" and "c" tokens part or end
    evaluation = make(MultipleChoiceTask("shared", search=[shared])).evaluate(PRUNED)
    assert evaluation.weights.tolist() == [5]  # behind "?", " ", "a", "b", "c"


def test_the_full_model_is_at_no_distance_from_itself(make, task) -> None:
    for score in LABEL_FREE:
        for batch_tokens in (1, 5000):
            evaluator = make(task, score=score, batch_tokens=batch_tokens)
            for plan in (None, FULL):
                evaluation = evaluator.evaluate(plan)
                assert not evaluation.losses.any()
                assert (evaluation.correct == 1).all()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    top_p=st.floats(0.05, 1.0, exclude_max=True),
    tokens=st.integers(1, VOCAB),
    rows=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True), min_size=3, max_size=3),
)
@pytest.mark.filterwarnings("ignore:the .* likeliest tokens")
def test_a_compressed_teacher_gives_bounds(make, top_p: float, tokens: int, rows: list[list[int]]) -> None:
    plan = Plan.one_hot(rows, experts=EXPERTS, k=2)
    exact = make(compression=EXACT).evaluate(plan)
    positions = int(exact.weights.sum())
    memory = positions * (16 + TOKEN_BYTES * tokens)
    evaluator = make(compression=Compression(top_p, memory))
    bound, teacher = evaluator.evaluate(plan), teacher_of(evaluator)
    assert teacher.nbytes <= memory
    assert teacher.most == tokens
    assert 1 <= teacher.tokens_kept <= tokens
    assert (bound.losses >= 0).all()
    assert (bound.losses <= exact.losses + 1e-6).all()
    np.testing.assert_array_equal(bound.correct, exact.correct)
    assert bound.metrics["acceptance"] >= exact.metrics["acceptance"] - 1e-7
    assert bound.metrics["acceptance"] <= exact.metrics["acceptance"] + teacher.rest + 1e-6
    if tokens == VOCAB:
        assert teacher.rest <= 1 - top_p + 1e-6


def test_of_equally_likely_tokens_the_lowest_is_the_first_choice(make_mixtral, make) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS)
    with torch.no_grad():
        model.lm_head.weight[150:] = model.lm_head.weight[:150]  # every token has a twin
    evaluations = [make(model=model, compression=Compression(p)).evaluate(PRUNED) for p in (1.0, 0.999, 0.5, 0.01)]
    for evaluation in evaluations:
        np.testing.assert_array_equal(evaluation.correct, evaluations[0].correct)
        assert (evaluation.losses <= evaluations[0].losses + 1e-6).all()
    assert not make(model=model, compression=Compression(0.01)).evaluate(None).losses.any()


def test_kept_tokens_are_the_fewest_that_reach_top_p(model, tiny_tokenizer, make) -> None:
    evaluator = make(TASKS["text"], compression=Compression(0.8))
    evaluator.evaluate(None)
    counts, rests = [], []
    for request in TASKS["text"].requests("search", tiny_tokenizer):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([request.ids[:-1]])).logits[0].double().softmax(1)
        falling = p.sort(1, descending=True).values.cumsum(1)
        counts += (falling < 0.8).sum(1).add(1).tolist()
        rests += (1 - falling.gather(1, (falling < 0.8).sum(1, keepdim=True))).flatten().tolist()
    assert teacher_of(evaluator).tokens_kept == np.mean(counts)
    assert teacher_of(evaluator).rest == pytest.approx(np.mean(rests), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["rungs", "whole", "no prefixes", "offloaded", "blocks", "known"])
def test_how_it_is_run_changes_nothing(
    model, make_mixtral, make, task, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score: Score = "kl" if task.name == "questions" else "acceptance"
    expected = make(task, score=score).evaluate(PRUNED)
    options: dict[str, Any] = {}
    if change in ("rungs", "known"):
        options["rungs"] = lambda examples: (2, 5, examples)
    if change == "no prefixes":
        options["prefix_memory"] = 0
    if change == "offloaded":
        options["model"] = cpu_offload(make_mixtral(layers=LAYERS, experts=EXPERTS), torch.device("cpu"))
    if change == "blocks":
        monkeypatch.setattr("moeopt.evaluation.scoring.ROWS", 3)
        monkeypatch.setattr("moeopt.evaluation.teacher.FEW", 1)
    evaluator = make(task, score=score, **options)
    if change == "whole":
        evaluator.passes.runner = Whole(model, LAYERS)
    stages = list(evaluator.race(PRUNED))
    np.testing.assert_allclose(stages[-1].losses, expected.losses, atol=2e-6)
    np.testing.assert_array_equal(stages[-1].weights, expected.weights)
    for stage in stages:
        np.testing.assert_array_equal(stage.losses, stages[-1].losses[: len(stage.losses)])
    if change == "known":
        before = teacher_of(evaluator).layer_tokens
        evaluator.clear()
        *_, again = evaluator.race(PRUNED, stages[1])
        np.testing.assert_array_equal(again.scores, stages[-1].scores)
        assert teacher_of(evaluator).layer_tokens - before == evaluator.layers * sum(
            batch.tokens for batch in evaluator.passes.batches[2]
        ), "rungs that are known need no teacher"


def test_prefix_reuse_and_threads_change_no_bit(make) -> None:
    plans = [PRUNED, Plan((*PRUNED.layers[:2], FULL.layers[2])), FULL, MERGED, PRUNED]
    expected = [make(prefix_memory=0).evaluate(plan).losses for plan in plans]
    evaluator = make()
    with ThreadPoolExecutor(3) as pool:
        losses = [evaluation.losses for evaluation in pool.map(evaluator.evaluate, plans)]
    np.testing.assert_array_equal(losses, expected)


def test_the_teacher_runs_once_and_is_charged_to_no_evaluation(make) -> None:
    likelihood = make(score="likelihood", prefix_memory=0).evaluate(PRUNED)
    evaluator = make(prefix_memory=0)
    teacher = teacher_of(evaluator)
    assert (teacher.layer_tokens, teacher.nbytes) == (0, 0)
    for _ in range(2):
        evaluation = evaluator.evaluate(PRUNED)
        assert (evaluation.tokens, evaluation.layer_tokens) == (likelihood.tokens, likelihood.layer_tokens)
        assert teacher.layer_tokens == likelihood.layer_tokens
    assert 0 < teacher.nbytes <= teacher.compression.memory
    evaluator.clear()
    assert teacher.nbytes == 0


def test_inside_a_plan_the_full_model_is_still_the_model_without(model, make) -> None:
    expected = make().evaluate(PRUNED)
    with patched(model, PRUNED):
        evaluator = make()
        np.testing.assert_array_equal(evaluator.evaluate(None).losses, expected.losses)
        assert not evaluator.evaluate(FULL).losses.any()
    assert not evaluator.evaluate(None).losses.any()


@pytest.mark.parametrize("change", ["weights", "backend"])
def test_a_changed_model_is_learnt_anew(make_mixtral, make, change: str) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS)
    evaluator = make(model=model)
    before = evaluator.evaluate(PRUNED)
    once = teacher_of(evaluator).layer_tokens
    if change == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj.mul_(1.5)
    else:
        model.set_experts_implementation("eager" if model.config._experts_implementation != "eager" else "grouped_mm")
    assert not evaluator.evaluate(None).losses.any()
    assert teacher_of(evaluator).layer_tokens == 2 * once
    after = evaluator.evaluate(PRUNED)
    np.testing.assert_array_equal(after.losses, make(model=model).evaluate(PRUNED).losses)
    assert np.allclose(after.losses, before.losses, atol=1e-5) == (change == "backend")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["teacher", "plan"])
def test_halved_batches_keep_the_losses(make_mixtral, make, task, when: str) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS)
    expected = make(task, model=model).evaluate(PRUNED)
    evaluator = make(task, model=model, batch_tokens=1024)
    if when == "plan":
        evaluator.evaluate(FULL)
    longest = max(batch.ids.shape[1] for batch in evaluator.batches)

    def small(_module: Any, args: Any) -> None:
        if args[0].shape[:-1].numel() > 2 * longest:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.model.layers[-1].mlp.register_forward_pre_hook(small)
    with pytest.warns(UserWarning, match="out of memory: going on"):
        result = evaluator.evaluate(PRUNED)
    np.testing.assert_allclose(result.losses, expected.losses, atol=2e-6)
    np.testing.assert_array_equal(result.weights, expected.weights)
    assert not evaluator.evaluate(None).losses.any()
    handle.remove()


def test_answers_do_not_matter(make) -> None:
    others = [replace(e, answer=(e.answer + 1) % len(e.options)) for e in QUESTIONS]
    other = MultipleChoiceTask("others", search=others)
    for score in LABEL_FREE:
        a, b = make(score=score), make(other, score=score)
        np.testing.assert_array_equal(a.evaluate(PRUNED).scores, b.evaluate(PRUNED).scores)
        assert a.fingerprint == b.fingerprint


def test_what_is_scored_has_a_name_of_its_own(make) -> None:
    evaluators = [
        *(make(score=score) for score in ("likelihood", "metric", *LABEL_FREE)),
        make(compression=EXACT),
        make(compression=Compression(memory=200_000)),
    ]
    assert len({evaluator.fingerprint for evaluator in evaluators}) == len(evaluators)


def test_memory_that_is_short_is_said(make) -> None:
    with pytest.raises(ValueError, match=r"top_p=1 needs \d+ bytes for \d+ positions"):
        make(compression=Compression(1.0, memory=10_000))
    with pytest.raises(ValueError, match=r"top_p=0\.9 needs"):
        make(compression=Compression(0.9, memory=10))
    with pytest.warns(UserWarning, match="likeliest tokens of a position that fit into 10000 bytes"):
        make(compression=Compression(0.9999, memory=10_000)).evaluate(None)
    for bad in ({"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"memory": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Compression(**bad)


def test_what_is_not_finite_is_said(make_mixtral, make) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS)
    keep = FULL.layers[0]
    explosive = LayerPlan(EXPERTS, 2, w_em=np.full((4, 4), 1e38), w_rm=np.eye(4))
    evaluator = make(model=model)
    with pytest.raises(NonFiniteLossError, match="layer 2"):
        evaluator.evaluate(Plan((keep, keep, explosive)))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("nan"))
    with pytest.raises(ModelError, match="the full model gives logits that are not finite"):
        evaluator.evaluate(PRUNED)


# The demo model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return moeopt.load(moeopt.demo.MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("score", LABEL_FREE)
def test_more_experts_are_closer(demo: Any, score: Score) -> None:
    evaluator = Evaluator(*demo, moeopt.demo.skill_task("sort"), limit=12, score=score)
    losses = [evaluator.evaluate(Plan.one_hot([range(r)] * 6, experts=8, k=2)).loss for r in (8, 7, 4, 2)]
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert losses[1] > 0


@pytest.mark.slow
def test_a_search_without_answers_gets_closer(demo: Any) -> None:
    score: Score = "acceptance"  # the command line's tests search by KL
    space = moeopt.PruneSpace.of(demo[0], keep=4, groups=2)
    task = moeopt.demo.skill_task("sort")
    objective = moeopt.Objective(*demo, task, space, limit=8, rungs=2, score=score)
    assert objective.describe()["evaluation"]["score"] == score
    assert objective.describe()["evaluation"]["top_p"] == Compression().top_p
    study = moeopt.create_study(objective=objective, storage=None, sampler="random", pruner="racing", seed=0)
    moeopt.optimize(study, objective, n_trials=8)
    first = study.trials[0]
    assert study.best_value < first.value
    assert first.user_attrs["layer_tokens"] == 6 * objective.evaluator.tokens
    assert 0 < study.best_trial.user_attrs["accuracy"] <= 1
