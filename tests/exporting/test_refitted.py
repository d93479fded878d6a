"""Checkpoints of refitted plans: the patched model, in every family's own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting.conftest import exported, save

import moeopt
from moeopt.errors import ExportError, PlanError
from moeopt.exporting import project, verify
from moeopt.methods import Calibration
from moeopt.models import moe_layers
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import TextTask


@pytest.fixture(scope="module")
def text() -> TextTask:
    rows = ["".join(chr(40 + i * j % 83) for i in range(59 - j)) for j in range(1, 21)]
    return TextTask("text", search=rows[:16], dev=rows[16:], window=60)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 3])
def test_every_family_s_own_class_loads_it(
    family: str, rank: int | None, build_family: Any, text: TextTask, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    full = save(build_family(family, vocabulary=300), tiny_tokenizer, tmp_path / "full")
    layers = moe_layers(full)
    plan = Plan.one_hot([[0, 3, 5], [6, 1, 2]], experts=layers[0].n, k=layers[0].k)
    plan = moeopt.refit(plan, Calibration(full, tiny_tokenizer, text), rank=rank).plan
    assert plan.is_refitted
    patched, reloaded = exported(full, plan, tmp_path / "small")
    assert torch.equal(reloaded, patched)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank"), [("stock", None), ("stock", 3), ("mixed-r", 3), ("novices-skip", None), ("everything", 3)]
)
def test_it_is_verified_and_its_card_says_what_was_fitted(
    kind: str, rank: int | None, full: Any, text: TextTask, plans: dict[str, Plan], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """The original is bfloat16: what is fitted is exact in it."""
    plan = plans[kind] if kind in plans else Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)
    made = moeopt.refit(plan, Calibration(full, tiny_tokenizer, text), rank=rank)
    made.save(tmp_path / "plan.safetensors")
    loaded, about = Plan.load(tmp_path / "plan.safetensors"), Plan.about(tmp_path / "plan.safetensors")
    moeopt.export(loaded, tmp_path / "small", model=tmp_path / "full", about=about)
    found = verify(tmp_path / "small", sequences=1, length=8, new_tokens=3)
    assert found.ok
    assert found.difference == 0.0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "down projections are fitted" in card
    assert f"of {made.calibrated['sequences']} sequences of `text`" in card
    assert Plan.load(tmp_path / "small" / "plan.safetensors") == made.plan
    assert Plan.about(tmp_path / "small" / "plan.safetensors") == about


def test_weights_of_another_model_are_refused(
    full: Any, make_mixtral: Any, text: TextTask, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    wide = make_mixtral(experts=6, intermediate=40)
    plan = moeopt.refit(Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2), Calibration(wide, tiny_tokenizer, text)).plan
    with pytest.raises(ExportError, match=r"the plan has down projections of \(hidden, inner\) = \(32, 40\)"):
        moeopt.export(plan, tmp_path / "small", model=full)
    assert not (tmp_path / "small").exists()


def test_a_projection_keeps_the_weights_or_says_why_not(full: Any, text: TextTask, tiny_tokenizer: Any) -> None:
    calibration = Calibration(full, tiny_tokenizer, text)
    made = moeopt.refit(Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2).with_skip(0.5), calibration).plan
    projected, _ = project(made, full, tiny_tokenizer, text)
    assert [layer.down for layer in projected.layers] == [layer.down for layer in made.layers]
    mixed = Plan((*made.layers[:2], LayerPlan(6, 2, kept=(0, 1, 2, 3))))
    with pytest.raises(PlanError, match="project the plan first, then refit it"):
        project(mixed, full, tiny_tokenizer, text)
