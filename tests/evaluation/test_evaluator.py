"""The evaluator against the obvious way to do it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeopt.errors import NonFiniteLossError, TaskError
from moeopt.evaluation import Evaluator
from moeopt.evaluation.runners import Whole
from moeopt.models import patched
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


# Active experts -----------------------------------------------------------------------------------------------------


def skipping(*layers: tuple[int, float]) -> Plan:
    """All four experts of each layer, with its k and beta."""
    return Plan(tuple(LayerPlan(experts=4, k=k, kept=(0, 1, 2, 3), skip=beta) for k, beta in layers))


@pytest.mark.parametrize("rungs", [None, (7, 25)])
@pytest.mark.parametrize("whole", [False, True])
def test_active_counts_the_experts_that_ran(make_mixtral, tiny_tokenizer, questions, monkeypatch, rungs, whole):
    model = make_mixtral(layers=3, experts=4)
    model.set_experts_implementation("eager")
    evaluator = Evaluator(model, tiny_tokenizer, questions, batch_tokens=64, rungs=rungs, prefix_memory=0)
    if whole:
        evaluator.passes.runner = Whole(model, 3)
    plan = skipping((2, 0.9), (3, 0.6), (1, 0.0))
    evaluator.evaluate(plan)  # what it checks first runs experts, too
    pairs, forward = [], type(model.model.layers[0].mlp.experts).forward.__wrapped__

    def counting(self, hidden_states, top_k_index, top_k_weights):
        pairs.append(top_k_index.numel())
        return forward(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts).forward, "__wrapped__", counting)
    places = 0
    for rung, evaluation in zip(evaluator.passes.batches, evaluator.race(plan)):
        places += sum(batch.ids.numel() for batch in rung)
        assert evaluation.active == pytest.approx(sum(pairs) / (3 * places))
    assert 1 < evaluation.active < 2
    assert evaluator.evaluate().active == 2.0
    assert evaluator.evaluate(Plan.identity(3, 4, 2)).active == 2.0
    assert evaluator.evaluate(skipping((1, 0.0), (2, 0.0), (4, 0.0))).active == pytest.approx(7 / 3)
    with patched(model, plan):
        assert evaluator.evaluate().active == evaluation.active


LAYER_CHOICES = ((2, 0.0), (1, 0.0), (2, 0.5), (2, 0.9), (3, 0.7))


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.lists(st.sampled_from(LAYER_CHOICES), min_size=4, max_size=4), min_size=2, max_size=6),
    layers=st.sampled_from([1, 3, 6, 1000]),
    rungs=st.sampled_from([None, (5, 25)]),
)
def test_layers_that_are_not_run_again_count_as_when_they_were(
    make_mixtral, tiny_tokenizer, questions, chosen, layers, rungs
):
    model = make_mixtral(layers=4, experts=4, hidden=16, intermediate=16)
    plain = Evaluator(model, tiny_tokenizer, questions, batch_tokens=64, rungs=rungs, prefix_memory=0)
    bytes_a_layer = sum(4 * 16 * batch.ids.numel() for batch in plain.batches)
    reusing = Evaluator(
        model, tiny_tokenizer, questions, batch_tokens=64, rungs=rungs, prefix_memory=layers * bytes_a_layer
    )
    for parts in (*chosen, chosen[0]):
        plan = skipping(*parts)
        for got, expected in zip(reusing.race(plan), plain.race(plan), strict=True):
            assert got.active == expected.active
            np.testing.assert_array_equal(got.losses, expected.losses)
    if layers == 1000:
        assert got.layer_tokens == got.tokens < expected.layer_tokens


def test_what_is_known_of_a_plan_keeps_its_active_experts(tiny_model, tiny_tokenizer, questions):
    evaluator = Evaluator(tiny_model, tiny_tokenizer, questions, batch_tokens=64, rungs=(5, 12, 25))
    plan = skipping((2, 0.5), (2, 0.9))
    stages = list(evaluator.race(plan))
    assert len({stage.active for stage in stages}) == 3
    for stage in stages:
        evaluator.clear()
        *_, last = evaluator.race(plan, stage)
        assert last.active == pytest.approx(stages[-1].active, abs=1e-12)
        np.testing.assert_array_equal(last.scores, stages[-1].scores)
        seen = len(stage.losses)
        assert last.tokens == stages[-1].tokens - stage.tokens
        assert [s.active for s in evaluator.race(plan, stage) if len(s.losses) == seen] == [pytest.approx(stage.active)]
