"""The noise floor: what moves the losses, and that the model is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeopt.errors import NonFiniteLossError
from moeopt.evaluation import Evaluator
from moeopt.evaluation.noise import Movement, NoiseFloor, experts_backend, noise_floor
from moeopt.plan import Plan
from moeopt.tasks import TextTask


@pytest.fixture
def text() -> TextTask:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "far", "away", "over", "hills"]
    return TextTask("text", search=[" ".join(words[i:]) * (1 + i % 4) for i in range(12)], window=48)


@pytest.fixture
def model(make_mixtral):
    return make_mixtral(layers=2, experts=4, dtype=torch.bfloat16, experts_implementation="grouped_mm")


def test_every_row_is_the_difference_of_two_evaluations(model, tiny_tokenizer, text):
    plan = Plan.one_hot([[0, 2], [1, 3]], experts=4, k=2)
    floor = noise_floor(model, tiny_tokenizer, text, plan=plan, limit=9, batch_tokens=256, dtypes=[torch.float32])
    assert [(row.cause, row.setting) for row in floor.movements] == [
        ("backend", "eager"),
        ("batch", "128 tokens"),
        ("batch", "64 tokens"),
        ("dtype", "float32"),
    ]
    base = Evaluator(model, tiny_tokenizer, text, limit=9, batch_tokens=256).evaluate(plan)
    assert floor.loss == base.loss
    assert floor.examples == 9
    halved = Evaluator(model, tiny_tokenizer, text, limit=9, batch_tokens=128).evaluate(plan)
    with experts_backend(model, "eager"):
        eager = Evaluator(model, tiny_tokenizer, text, limit=9, batch_tokens=256).evaluate(plan)
    exact = Evaluator(model.float(), tiny_tokenizer, text, limit=9, batch_tokens=256).evaluate(plan)
    for row, other in zip(floor.movements, (eager, halved, None, exact)):
        if other is not None:
            assert row.mean == pytest.approx(abs(other.loss - base.loss))
            assert row.largest == pytest.approx(np.abs(other.losses - base.losses).max(), rel=1e-5)
        assert row.mean <= row.largest + 1e-7
    assert floor.movements[-1].mean > 0


def test_value_is_the_largest_movement_of_the_mean_by_backend_or_batch():
    rows = (Movement("backend", "eager", 0.002, 0.3), Movement("batch", "64 tokens", 0.004, 0.1))
    assert NoiseFloor(1.0, 8, (*rows, Movement("dtype", "float32", 0.5, 0.9))).value == 0.004
    assert NoiseFloor(1.0, 8, ()).value == 0


def test_what_the_model_has_or_does_not_offer_is_passed_over(model, tiny_tokenizer, text):
    floor = noise_floor(model, tiny_tokenizer, text, limit=3, batch_tokens=1, backends=("grouped_mm", "abacus"))
    assert floor.movements == ()
    floor = noise_floor(model, tiny_tokenizer, text, limit=3, batch_tokens=256, backends=("batched_mm",))
    assert floor.movements[0].setting == "batched_mm"


def test_model_is_left_as_it_was(model, tiny_tokenizer, text):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise_floor(model, tiny_tokenizer, text, limit=3, dtypes=[torch.float32])
    assert model.config._experts_implementation == "grouped_mm"
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_backend_is_restored_after_an_error(model, tiny_tokenizer, text):
    calls = []

    def fail_under_another_backend(module, args, output):
        calls.append(module.config._experts_implementation)
        return output * float("nan") if module.config._experts_implementation == "eager" else output

    handle = model.model.layers[1].mlp.experts.register_forward_hook(fail_under_another_backend)
    with pytest.raises(NonFiniteLossError, match="layer 1"):
        noise_floor(model, tiny_tokenizer, text, limit=3)
    handle.remove()
    assert "eager" in calls
    assert model.config._experts_implementation == "grouped_mm"
    Evaluator(model, tiny_tokenizer, text, limit=3).evaluate()
