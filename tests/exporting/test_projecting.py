"""Projection: the nearest stock plan, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeopt
from moeopt.cli import main
from moeopt.exporting import project, why_not_stock
from moeopt.exporting.projecting import _kl_fit, expert_weights
from moeopt.models import RoutingRule
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import TextTask

TASK = TextTask(
    "toy",
    search=[f"a text of many words, number {i}, to fit to" for i in range(12)],
    dev=[f"other words {i * i} to measure on, not the same" for i in range(6)],
    window=32,
)
KINDS = ("mixed-r", "prob", "prob-eep", "alias", "novices", "novices-skip", "skip", "prob-skip", "everything")
RULE = RoutingRule("weight", None, False, None, "softmax", True, True, 1e-20, 1.0, True)


@pytest.fixture
def float_model(saved: Any, make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    return saved(make_mixtral(layers=3, experts=6), tiny_tokenizer, tmp_path / "full")


def test_every_kind_becomes_stock_and_exports(
    float_model: Any, plans: dict[str, Plan], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for kind in ("mixed-r", "alias", "novices", "everything"):
        projected, cost = project(plans[kind], float_model, tiny_tokenizer, TASK)
        assert why_not_stock(projected) is None
        assert {(p.kept_experts, p.k) for p in projected.layers} == {(cost.r, cost.k)}
        assert cost.r == max(p.kept_experts for p in plans[kind].layers)
        assert cost.k == max(p.k for p in plans[kind].layers)
        evaluator = moeopt.Evaluator(float_model, tiny_tokenizer, TASK, split="dev")
        assert cost.loss_before == pytest.approx(evaluator.evaluate(plans[kind]).loss, abs=1e-5)
        assert cost.loss_after == pytest.approx(evaluator.evaluate(projected).loss, abs=1e-5)
        assert all(how.endswith(", without novices") == (kind == "novices") for how in cost.how)
        assert cost.kl > 0
        assert 0 < cost.top_k <= 1
        moeopt.export(projected, tmp_path / kind, model=float_model, form="stock", projection=cost)
        record = json.loads((tmp_path / kind / "moeopt.json").read_text())
        assert record["form"] == "stock"
        assert record["projection"]["kl"] == cost.kl
        assert "Projected" in (tmp_path / kind / "README.md").read_text()


def test_a_plan_that_is_stock_already_stays_as_it_is(float_model: Any, tiny_tokenizer: Any) -> None:
    plan = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)
    projected, cost = project(plan, float_model, tiny_tokenizer, TASK)
    assert projected == plan
    assert (cost.kl, cost.top_1, cost.top_k) == (pytest.approx(0, abs=1e-6), 1.0, 1.0)


def test_a_one_hot_mapping_of_probabilities_loses_nothing(float_model: Any, tiny_tokenizer: Any) -> None:
    plan = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2, router="prob")
    projected, cost = project(plan, float_model, tiny_tokenizer, TASK)
    assert set(cost.how) == {"by selected router rows"}
    assert all(p.router_rows == (0, 2, 5) for p in projected.layers)
    assert cost.kl == pytest.approx(0, abs=1e-5)


def test_the_fit_finds_a_mapping_that_exists() -> None:
    rng = np.random.default_rng(0)
    logits, w = rng.standard_normal((500, 6)), rng.standard_normal((3, 6))
    wanted = np.exp(logits @ w.T)
    wanted /= wanted.sum(1, keepdims=True)
    fitted = _kl_fit(logits, wanted, np.zeros((3, 6), dtype=np.float32))
    mapped = np.exp(logits @ fitted.T.astype(np.float64))
    mapped /= mapped.sum(1, keepdims=True)
    assert (wanted * np.log(wanted / mapped)).sum(1).mean() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_expert_weights_are_those_of_the_patched_model(float_model: Any, plans: dict[str, Plan], kind: str) -> None:
    plan, block = plans[kind], float_model.model.layers[0].mlp
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), moeopt.patched(float_model, plan):
        logits, weights, index = block.gate(hidden)
    part: LayerPlan = plan.layers[0]
    names = list(part.kept) if part.kept is not None else list(range(part.kept_experts))
    expected = torch.zeros(40, 6).scatter_add_(1, index, weights)[:, names]
    assert torch.allclose(expert_weights(part, RULE, logits), expected, atol=1e-5)


def test_the_command_line_projects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = moeopt.demo.MODEL
    shape = moeopt.models.check_checkpoint(model)
    Plan(tuple(LayerPlan(shape.experts, 1 + i % 2, kept=(0, 1, 2)) for i in range(shape.layers))).save(
        tmp_path / "plan.safetensors"
    )
    for number in range(40):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(
            f"sort {number} and {number * 7}: {number} < {number * 7}. " * 3
        )
    given = ["export", str(model), str(tmp_path / "small"), "--plan", str(tmp_path / "plan.safetensors")]
    assert main([*given, "--project", "stock"]) == 2
    task = ["--task", "text", "--data", str(tmp_path / "texts"), "--task-option", "window=64", "--limit", "4"]
    assert main([*given, "--project", "stock", *task, "--device-map", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "projected to r = 3, k = 2" in printed
    assert "stock form" in printed
    assert main([given[0], given[1], str(tmp_path / "custom"), *given[3:]]) == 0
    assert "custom form" in capsys.readouterr().out
    assert main([given[0], given[1], str(tmp_path / "other"), *given[3:], "--form", "stock"]) == 2
