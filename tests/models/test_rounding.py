"""Self-checks where kernels round otherwise at another shape, or each time: within rounding, and said once."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moeopt.errors import ModelError
from moeopt.evaluation import Evaluator, noise_floor
from moeopt.models import is_exact, layerwise, patched
from moeopt.models.rounding import bound
from moeopt.tasks import TextTask

TASK = TextTask("words", search=[f"document {i} says one two three four" for i in range(6)], window=24)


@pytest.fixture
def rounding_by(make_mixtral: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose experts are off by a factor that `off(number of experts)` gives."""

    def make(off: Any, dtype: torch.dtype = torch.float32) -> Any:
        def tiled(self: Any, *args: Any) -> torch.Tensor:
            output = grouped_mm_experts_forward(self, *args)
            return (output.double() * (1 + off(self.num_experts))).to(output.dtype)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "tiled", tiled)
        model = make_mixtral(layers=2, dtype=dtype)
        model.set_experts_implementation("tiled")
        return model

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_rounding_at_another_shape_is_no_reason_to_refuse(
    rounding_by: Any, dense_plan: Any, tiny_tokenizer: Any, dtype: torch.dtype
) -> None:
    unit = torch.finfo(dtype).eps
    model = rounding_by(lambda experts: 1.2 * unit if experts == 1 else 0.0, dtype)
    evaluator = Evaluator(model, tiny_tokenizer, TASK)
    assert evaluator.exact
    with pytest.warns(UserWarning, match="agrees within rounding, not bit for bit") as said:
        evaluator.evaluate(dense_plan(layers=2, router="prob"))
    evaluator.evaluate(dense_plan(layers=2, router="prob", seed=1))
    assert len([w for w in said if "rounding" in str(w.message)]) == 1
    assert not evaluator.exact
    floor = noise_floor(model, tiny_tokenizer, TASK, backends=())
    assert [moved.setting for moved in floor.movements if moved.cause == "repetition"] == ["again"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_rounding_is_refused(rounding_by: Any, dense_plan: Any, dtype: torch.dtype) -> None:
    model = rounding_by(lambda experts: 3 * bound(dtype, 48, 8) if experts == 1 else 0.0, dtype)
    with (
        pytest.raises(ModelError, match="merged copy of an expert"),
        patched(model, dense_plan(layers=2, router="prob")),
    ):
        pass


def test_a_layer_that_gives_other_bits_each_time_may_be_run_alone(rounding_by: Any) -> None:
    turn = itertools.count()
    model = rounding_by(lambda experts: 2e-7 * (next(turn) % 3))
    with pytest.warns(UserWarning, match="agrees within rounding"):
        layerwise(model)
    assert not is_exact(model)


def test_state_is_refused_however_small(rounding_by: Any) -> None:
    """The same each time when a layer runs alone, and something else, by a rounding, in the whole model."""
    calls = itertools.count()
    model = rounding_by(lambda experts: 2e-7 * (next(calls) < 4))  # two runs of two layers
    with pytest.raises(ModelError, match="keeps state across layers"):
        layerwise(model)
    assert is_exact(model)


def test_no_warning_where_all_is_exact(make_mixtral: Any, dense_plan: Any, tiny_tokenizer: Any) -> None:
    model = make_mixtral(layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator = Evaluator(model, tiny_tokenizer, TASK)
        evaluator.evaluate(dense_plan(layers=2, router="prob"))
    assert evaluator.exact
