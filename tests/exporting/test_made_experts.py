"""Checkpoints of experts made anew, mixed in an order or refitted: the patched model, in every family's own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from exporting.conftest import exported, save

import moeopt
from moeopt.errors import ExportError, PlanError
from moeopt.exporting import project, verify
from moeopt.methods import Calibration
from moeopt.models import moe_layers
from moeopt.models.mixing import ExpertForm
from moeopt.plan import DownProjections, LayerPlan, Merge, Plan
from moeopt.tasks import TextTask

ROWS = ["".join(chr(40 + i * j % 83) for i in range(59 - j)) for j in range(1, 21)]
TEXT = TextTask("text", search=ROWS[:16], dev=ROWS[16:], window=60)
PRUNED = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)


def mixed(model: Any, rank: int | None = None, **options: Any) -> Plan:
    """Two pairs of experts and one alone, in random orders."""
    rng, layers = np.random.default_rng(0), moe_layers(model)
    n, inner = layers[0].n, ExpertForm.from_module(layers[0].experts).inner
    w_em = np.zeros((3, n), np.float32)
    w_em[0, [1, 4]], w_em[1, [0, 2]], w_em[2, 5] = (0.4, 0.6), (0.5, 0.5), 1
    w_rm = np.eye(n)[[4, 0, 5]] if options.get("router", "rows") == "rows" else w_em > 0
    neurons = np.stack([rng.permutation(inner) for _ in range(n)])
    if rank is not None:
        left, right = rng.standard_normal((3, 32, rank)), rng.standard_normal((3, rank, inner))
        options["down"] = DownProjections(left=left.astype(np.float32) * 0.1, right=right.astype(np.float32) * 0.1)
    return Plan(tuple(LayerPlan(n, x.k, w_em=w_em, w_rm=w_rm, neurons=neurons, **options) for x in layers))


def refitted(model: Any, tokenizer: Any, rank: int | None) -> Plan:
    layer = moe_layers(model)[0]
    plan = Plan.one_hot([[0, 3, 5], [6, 1, 2]], experts=layer.n, k=layer.k)
    plan = moeopt.refit(plan, Calibration(model, tokenizer, TEXT), rank=rank).plan
    assert plan.is_refitted
    return plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "rank"),
    [*((merge, None) for merge in get_args(Merge)), ("linear", 3), ("refitted", None), ("refitted", 3)],
)
def test_every_family_s_own_class_loads_it(
    family: str, made: Any, rank: int | None, build_family: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    full = save(build_family(family, vocabulary=300), tiny_tokenizer, tmp_path / "full")
    plan = refitted(full, tiny_tokenizer, rank) if made == "refitted" else mixed(full, rank, merge=made)
    patched, reloaded = exported(full, plan, tmp_path / "small")
    assert torch.equal(reloaded, patched)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["rows", "prob"])
def test_a_mixture_is_verified_and_its_card_says_how_experts_were_merged(
    router: Any, full: Any, tmp_path: Path
) -> None:
    """Of bfloat16, stock and custom."""
    moeopt.export(mixed(full, merge="karcher", router=router), tmp_path / "small", model=tmp_path / "full")
    outcome = verify(tmp_path / "small", sequences=1, length=8, new_tokens=3)
    assert outcome.ok
    assert outcome.difference == 0.0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "In 3 layers experts are merged by karcher means, with their neurons put in one order first in 3." in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank"), [("stock", None), ("stock", 3), ("mixed-r", 3), ("novices-skip", None), ("everything", 3)]
)
def test_a_refit_is_verified_and_its_card_says_what_was_fitted(
    kind: str, rank: int | None, full: Any, plans: dict[str, Plan], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """The original is bfloat16: what is fitted is exact in it."""
    plan = plans.get(kind, PRUNED)
    made = moeopt.refit(plan, Calibration(full, tiny_tokenizer, TEXT), rank=rank)
    made.save(tmp_path / "plan.safetensors")
    loaded, about = Plan.load(tmp_path / "plan.safetensors"), Plan.about(tmp_path / "plan.safetensors")
    moeopt.export(loaded, tmp_path / "small", model=tmp_path / "full", about=about)
    outcome = verify(tmp_path / "small", sequences=1, length=8, new_tokens=3)
    assert outcome.ok
    assert outcome.difference == 0.0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "down projections are fitted" in card
    assert f"of {made.calibrated['sequences']} sequences of `text`" in card
    assert Plan.load(tmp_path / "small" / "plan.safetensors") == made.plan
    assert Plan.about(tmp_path / "small" / "plan.safetensors") == about


def test_weights_of_another_model_are_refused(
    full: Any, make_mixtral: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    wide = make_mixtral(experts=6, intermediate=40)
    plan = moeopt.refit(PRUNED, Calibration(wide, tiny_tokenizer, TEXT)).plan
    with pytest.raises(ExportError, match=r"the plan has down projections of \(hidden, inner\) = \(32, 40\)"):
        moeopt.export(plan, tmp_path / "small", model=full)
    assert not (tmp_path / "small").exists()


def test_a_projection_keeps_the_weights_or_says_why_not(full: Any, tiny_tokenizer: Any) -> None:
    calibration = Calibration(full, tiny_tokenizer, TEXT)
    made = moeopt.refit(PRUNED.with_skip(0.5), calibration).plan
    projected, _ = project(made, full, tiny_tokenizer, TEXT)
    assert [layer.down for layer in projected.layers] == [layer.down for layer in made.layers]
    uneven = Plan((*made.layers[:2], LayerPlan(6, 2, kept=(0, 1, 2, 3))))
    with pytest.raises(PlanError, match="project the plan first, then refit it"):
        project(uneven, full, tiny_tokenizer, TEXT)


def test_a_projection_keeps_the_order(full: Any, tiny_tokenizer: Any) -> None:
    plan = mixed(full, router="prob")
    projected, _ = project(plan, full, tiny_tokenizer, TEXT)
    for part, before in zip(projected.layers, plan.layers):
        assert part.router != "prob"
        assert part.neurons is not None
        assert np.array_equal(part.neurons, before.neurons)
