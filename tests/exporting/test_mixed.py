"""Checkpoints of plans that order neurons or merge otherwise than by sums, in every family's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from exporting.conftest import exported, save

import moeopt
from moeopt.exporting import project, verify
from moeopt.models import moe_layers
from moeopt.models.mixing import ExpertForm
from moeopt.plan import DownProjections, LayerPlan, Merge, Plan
from moeopt.tasks import TextTask


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


@pytest.mark.slow
@pytest.mark.parametrize(("merge", "rank"), [*((merge, None) for merge in get_args(Merge)), ("linear", 3)])
def test_every_family_s_own_class_loads_it(
    family: str, merge: Merge, rank: int | None, build_family: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    full = save(build_family(family, vocabulary=300), tiny_tokenizer, tmp_path / "full")
    plan = mixed(full, rank, merge=merge)
    patched, reloaded = exported(full, plan, tmp_path / "small")
    assert torch.equal(reloaded, patched)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["rows", "prob"])
def test_it_is_verified_and_its_card_says_how_experts_were_merged(router: Any, full: Any, tmp_path: Path) -> None:
    """Of bfloat16, stock and custom."""
    moeopt.export(mixed(full, merge="karcher", router=router), tmp_path / "small", model=tmp_path / "full")
    outcome = verify(tmp_path / "small", sequences=1, length=8, new_tokens=3)
    assert outcome.ok
    assert outcome.difference == 0.0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "In 3 layers experts are merged by karcher means, with their neurons put in one order first in 3." in card


def test_a_projection_keeps_the_order(full: Any, tiny_tokenizer: Any) -> None:
    rows = ["".join(chr(40 + i * j % 83) for i in range(50)) for j in range(1, 13)]
    text = TextTask("text", search=rows[:8], dev=rows[8:], window=40)
    plan = mixed(full, router="prob")
    projected, _ = project(plan, full, tiny_tokenizer, text)
    for part, before in zip(projected.layers, plan.layers):
        assert part.router != "prob"
        assert part.neurons is not None
        assert np.array_equal(part.neurons, before.neurons)
