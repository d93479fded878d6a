"""`score="choice"`: minus the log of the right option's share in the softmax over the options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moeopt
from moeopt.errors import TaskError
from moeopt.evaluation import Evaluator
from moeopt.tasks import Example, MixtureTask, MultipleChoiceTask, TextTask
from moeopt.tasks.base import choice_loss
from moeopt.tasks.multiple_choice import NORMALISE

FINITE = st.floats(-200, 0)


class TwoRight(MultipleChoiceTask):
    """The first two options of a question are right."""

    def right(self, example: Example) -> tuple[int, ...]:
        return (0, 1)


def questions(task: type[MultipleChoiceTask] = MultipleChoiceTask, **options: str) -> MultipleChoiceTask:
    rows = [Example(str(i), f"question {i}:", (" yes", " certainly not", " a"), i % 3) for i in range(9)]
    return task("q", rows[:6], rows[6:], **options)


@given(st.lists(FINITE, min_size=2, max_size=6), st.data())
def test_the_loss_is_that_of_a_slow_softmax(values: list[float], data: st.DataObject) -> None:
    right = data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1))
    largest = max(values)
    shares = [math.exp(v - largest) for v in values]
    share = sum(shares[j] for j in right) / sum(shares)
    loss = choice_loss(values, tuple(right))
    assert loss >= -1e-9
    assert loss == pytest.approx(-math.log(share), abs=1e-6) if share > 1e-200 else loss > 100
    assert choice_loss([v - 7.5 for v in values], tuple(right)) == pytest.approx(loss, abs=1e-6)  # blind to calibration


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("kind", [MultipleChoiceTask, TwoRight])
def test_options_are_compared_as_the_task_says(make_mixtral, tiny_tokenizer, normalise, kind) -> None:
    model, task = make_mixtral(), questions(kind, normalise=normalise)
    evaluation = Evaluator(model, tiny_tokenizer, task, score="choice").evaluate()
    examples = task.examples("search")
    for i, example in enumerate(examples):
        compared = []
        for j, option in enumerate(example.options):
            request = next(r for r in task.requests("search", tiny_tokenizer) if (r.example, r.option) == (i, j))
            total = log_likelihood(model, request.ids, request.scored_from)
            characters = len(option.removeprefix(" "))
            compared.append(total / {"tokens": request.scored, "none": 1, "characters": characters}[normalise])
        shares = np.exp(compared) / np.exp(compared).sum()
        expected = -np.log(sum(shares[j] for j in task.right(example)))
        assert evaluation.losses[i] == pytest.approx(expected, abs=1e-4)
        assert evaluation.correct[i] == (int(np.argmax(compared)) in task.right(example))
    plain = Evaluator(model, tiny_tokenizer, task)
    assert plain.fingerprint != Evaluator(model, tiny_tokenizer, task, score="choice").fingerprint
    np.testing.assert_array_equal(plain.evaluate().correct, evaluation.correct)


def log_likelihood(model, ids: tuple[int, ...], scored_from: int) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logits[t - 1, ids[t]] for t in range(scored_from, len(ids))))


def test_a_task_without_options_is_refused(make_mixtral, tiny_tokenizer) -> None:
    text = TextTask("text", search=["some words of text " * 4], window=16)
    with pytest.raises(TaskError, match="'text' does not choose among options"):
        Evaluator(make_mixtral(), tiny_tokenizer, text, score="choice")
    with pytest.raises(TaskError, match="does not choose"):
        Evaluator(make_mixtral(), tiny_tokenizer, MixtureTask({"t": (text, 1.0)}), score="choice")


def test_a_mixture_minimises_the_choice_of_those_that_choose(make_mixtral, tiny_tokenizer) -> None:
    model, text = make_mixtral(), TextTask("text", search=["some words of text " * 8], window=16)
    mixture = MixtureTask({"q": (questions(), 2.0), "t": (text, 1.0)}, use="all")
    got = Evaluator(model, tiny_tokenizer, mixture, score="choice").evaluate()
    chosen = Evaluator(model, tiny_tokenizer, questions(), score="choice").evaluate().loss
    written = Evaluator(model, tiny_tokenizer, text).evaluate().loss
    assert got.loss == pytest.approx((2 * chosen + written) / 3, rel=1e-4)


def test_tasks_of_the_harness_choose_by_their_totals(harness_tasks, tiny_model, tiny_tokenizer) -> None:
    task = moeopt.tasks.get("lm_eval:sums", include_path=harness_tasks)
    evaluator = Evaluator(tiny_model, tiny_tokenizer, task, score="choice", limit=6)
    evaluation = evaluator.evaluate()
    totals: dict[int, dict[int, float]] = {}
    for request in task.requests("search", tiny_tokenizer, limit=6):
        total = log_likelihood(tiny_model, request.ids, request.scored_from)
        totals.setdefault(request.example, {})[request.option] = total
    for i, example in enumerate(task.examples("search")[:6]):
        values = [totals[i][j] for j in range(len(example.options))]
        assert evaluation.losses[i] == pytest.approx(choice_loss(values, (example.answer,)), abs=1e-4)
    alone = moeopt.tasks.get("lm_eval:sums_word", include_path=harness_tasks)
    with pytest.raises(TaskError, match="does not choose"):
        Evaluator(tiny_model, tiny_tokenizer, alone, score="choice")


@pytest.fixture
def raced(make_mixtral, tiny_tokenizer) -> moeopt.Objective:
    model = make_mixtral()
    space = moeopt.PruneSpace.of(model, keep=4)
    return moeopt.Objective(model, tiny_tokenizer, questions(), space, score="choice", rungs=2)


def test_races_and_studies_take_it(raced: moeopt.Objective) -> None:
    study = moeopt.create_study(objective=raced, storage=None, sampler="random", pruner="racing", seed=0)
    moeopt.optimize(study, raced, n_trials=6)
    best = study.best_trial
    assert best.value == pytest.approx(raced.evaluator.evaluate(raced.space.plan(best)).loss)
    assert raced.describe()["evaluation"]["score"] == "choice"
