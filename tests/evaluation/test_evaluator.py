"""The evaluator against the obvious way to do it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from moeopt.errors import NonFiniteLossError, TaskError
from moeopt.evaluation import Evaluator
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import Example, MultipleChoiceTask, TextTask

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "far",
    "away",
    "over",
    "some",
    "old",
    "hills",
]


@pytest.fixture
def questions() -> MultipleChoiceTask:
    def example(i: int) -> Example:
        prompt = " ".join(WORDS[i % 5 : i % 5 + 1 + i % 7]) + f" {i}?"
        return Example(str(i), prompt, (" no", " yes", " y") if i % 3 else ("n", "y"), i % 2)

    return MultipleChoiceTask("questions", search=[example(i) for i in range(25)])


@pytest.fixture
def text() -> TextTask:
    return TextTask("text", search=[" ".join(WORDS[i:]) * (1 + i % 4) for i in range(12)], window=48)


def reference_log_probabilities(model, ids: list[int]) -> list[tuple[float, bool]]:
    """For every token but the first: its log-probability and whether it is the most likely one, from one full pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    result = []
    for position in range(len(ids) - 1):
        row = logits[position].tolist()
        top = max(row)
        log_sum = top + math.log(sum(math.exp(value - top) for value in row))
        result.append((row[ids[position + 1]] - log_sum, row.index(top) == ids[position + 1]))
    return result


def test_multiple_choice_equals_one_sequence_at_a_time(tiny_model, tiny_tokenizer, questions):
    losses, correct = [], []
    for example in questions.examples("search"):
        means = []
        for option in example.options:
            prompt = tiny_tokenizer(example.prompt)["input_ids"]
            ids = prompt + tiny_tokenizer(option, add_special_tokens=False)["input_ids"]
            scored = reference_log_probabilities(tiny_model, ids)[len(prompt) - 1 :]
            means.append(sum(value for value, _ in scored) / len(scored))
        losses.append(-means[example.answer])
        correct.append(means.index(max(means)) == example.answer)
    result = Evaluator(tiny_model, tiny_tokenizer, questions, batch_tokens=64).evaluate()
    np.testing.assert_allclose(result.losses, losses, atol=1e-5)
    np.testing.assert_array_equal(result.correct, correct)
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.accuracy == pytest.approx(np.mean(correct))
    assert 0 < result.accuracy < 1


def test_text_equals_one_window_at_a_time(tiny_model, tiny_tokenizer, text):
    total = tokens = hits = 0.0
    result = Evaluator(tiny_model, tiny_tokenizer, text, batch_tokens=200).evaluate()
    for i, request in enumerate(text.requests("search", tiny_tokenizer)):
        scored = reference_log_probabilities(tiny_model, list(request.ids))
        assert result.losses[i] == pytest.approx(-np.mean([value for value, _ in scored]), abs=1e-5)
        assert result.weights[i] == len(scored)
        total -= sum(value for value, _ in scored)
        hits += sum(hit for _, hit in scored)
        tokens += len(scored)
    assert result.loss == pytest.approx(total / tokens, abs=1e-5)
    assert result.accuracy == pytest.approx(hits / tokens, abs=1e-6)


@pytest.mark.parametrize("task", ["questions", "text"])
def test_batches_do_not_change_losses(tiny_model, tiny_tokenizer, task, request):
    task = request.getfixturevalue(task)
    results = [Evaluator(tiny_model, tiny_tokenizer, task, batch_tokens=n).evaluate() for n in (1, 90, 10_000)]
    for result in results[1:]:
        np.testing.assert_allclose(result.losses, results[0].losses, atol=1e-5)
        assert result.tokens == results[0].tokens


def test_same_plan_gives_bitwise_the_same_losses(tiny_model, tiny_tokenizer, text):
    evaluator = Evaluator(tiny_model, tiny_tokenizer, text)
    np.testing.assert_array_equal(evaluator.evaluate().losses, evaluator.evaluate().losses)


def test_a_limit_evaluates_the_first_examples(tiny_model, tiny_tokenizer, questions):
    few = Evaluator(tiny_model, tiny_tokenizer, questions, limit=6)
    result = few.evaluate()
    full = Evaluator(tiny_model, tiny_tokenizer, questions).evaluate()
    np.testing.assert_allclose(result.losses, full.losses[:6], atol=1e-5)


def test_one_token_options_share_a_forward(tiny_model, tiny_tokenizer):
    options = ("a", "b", "c", "d")
    task = MultipleChoiceTask("letters", search=[Example(str(i), f"question {i}:", options, 0) for i in range(10)])
    result = Evaluator(tiny_model, tiny_tokenizer, task).evaluate()
    assert result.tokens == sum(len(tiny_tokenizer(e.prompt)["input_ids"]) for e in task.examples("search"))
    assert result.layer_tokens == 2 * result.tokens


def test_model_without_logits_to_keep_gives_the_same(make_mixtral, tiny_tokenizer, questions):
    expected = Evaluator(make_mixtral(layers=2, experts=4), tiny_tokenizer, questions).evaluate()
    model = make_mixtral(layers=2, experts=4)
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    result = Evaluator(model, tiny_tokenizer, questions).evaluate()
    np.testing.assert_allclose(result.losses, expected.losses, atol=1e-5)


def test_offloaded_model_gives_the_same(tiny_model, tiny_tokenizer, questions):
    expected = Evaluator(tiny_model, tiny_tokenizer, questions).evaluate()
    cpu_offload(tiny_model, execution_device=torch.device("cpu"))
    assert tiny_model.get_input_embeddings().weight.device.type == "meta"
    result = Evaluator(tiny_model, tiny_tokenizer, questions).evaluate()
    np.testing.assert_array_equal(result.losses, expected.losses)


def test_logits_are_scored_in_chunks(tiny_model, tiny_tokenizer, text, monkeypatch):
    expected = Evaluator(tiny_model, tiny_tokenizer, text).evaluate()
    monkeypatch.setattr("moeopt.evaluation.scoring.ROWS", 7)
    np.testing.assert_array_equal(Evaluator(tiny_model, tiny_tokenizer, text).evaluate().losses, expected.losses)


def test_model_is_left_as_it_was(tiny_model, tiny_tokenizer, text):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    modes = [module.training for module in tiny_model.modules()]
    Evaluator(tiny_model, tiny_tokenizer, text).evaluate()
    assert [module.training for module in tiny_model.modules()] == modes
    assert tiny_tokenizer.pad_token is None


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_non_finite_loss_names_the_layer(make_mixtral, tiny_tokenizer, questions, weight, batch_tokens):
    model = make_mixtral(layers=3).train()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(weight)
    with pytest.raises(NonFiniteLossError, match="layer 1") as error:
        Evaluator(model, tiny_tokenizer, questions, batch_tokens=batch_tokens).evaluate()
    assert error.value.layer == 1
    assert model.training
    assert not any(layer.mlp._forward_hooks for layer in model.model.layers)


def test_non_finite_loss_outside_the_experts(tiny_model, tiny_tokenizer, questions):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="every MoE layer") as error:
        Evaluator(tiny_model, tiny_tokenizer, questions).evaluate()
    assert error.value.layer is None


def test_plans_are_applied_and_taken_off(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral(layers=2, experts=4)
    evaluator = Evaluator(model, tiny_tokenizer, text)
    full = evaluator.evaluate()
    np.testing.assert_array_equal(evaluator.evaluate(Plan.identity(2, 4, 2)).losses, full.losses)
    plan = Plan.one_hot([[2, 0], [1, 3]], experts=4, k=2)
    pruned = evaluator.evaluate(plan)
    assert not np.allclose(pruned.losses, full.losses, atol=1e-3)
    np.testing.assert_array_equal(evaluator.evaluate().losses, full.losses)

    small = make_mixtral(layers=2, experts=2)
    state = model.state_dict()
    for i, layer in enumerate(plan.layers):
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            key = f"model.layers.{i}.mlp.{name}"
            state[key] = state[key][list(layer.kept)]
    small.load_state_dict(state)
    np.testing.assert_allclose(Evaluator(small, tiny_tokenizer, text).evaluate().losses, pruned.losses, atol=1e-5)


def test_non_finite_loss_of_a_plan_names_its_layer(make_mixtral, tiny_tokenizer, questions):
    model = make_mixtral(layers=3, experts=4)
    keep = LayerPlan(experts=4, k=2, kept=(0, 1, 2, 3))
    explosive = LayerPlan(experts=4, k=2, w_em=np.full((4, 4), 1e38), w_rm=np.eye(4))
    evaluator = Evaluator(model, tiny_tokenizer, questions)
    with pytest.raises(NonFiniteLossError, match="layer 2") as error:
        evaluator.evaluate(Plan((keep, keep, explosive)))
    assert error.value.layer == 2
    assert np.isfinite(evaluator.evaluate().loss)


def test_bad_arguments_are_refused(tiny_model, tiny_tokenizer, questions):
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        Evaluator(tiny_model, tiny_tokenizer, questions, batch_tokens=0)
    with pytest.raises(TaskError, match="'dev' of task 'questions' is empty"):
        Evaluator(tiny_model, tiny_tokenizer, questions, split="dev")
    long = TextTask("long", search=["a" * 2000], window=1000)
    with pytest.raises(TaskError, match="exceed the limit of 512"):
        Evaluator(tiny_model, tiny_tokenizer, long)
