"""The bytes of a checkpoint that is not written are those of the one that is (quantised ones: test_quantised.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moeopt
from moeopt.exporting import ExportedBytes
from moeopt.models.sizes import Sizes
from moeopt.plan import Plan
from moeopt.study.quantities import Bytes


def test_every_kind_of_plan(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    folder = Path(full.config._name_or_path)
    count = ExportedBytes(folder)
    for name, plan in plans.items():
        small = moeopt.export(plan, tmp_path / f"small-{name}", model=folder) / "model.safetensors"
        assert count(plan) == sum(tensor.nbytes for tensor in load_file(small).values()), name
        assert count(plan) == ExportedBytes(folder)(plan), "what was counted before must not matter"
    assert count.full == count(Plan.identity(3, 6, 2))


def test_the_objective_counts_the_checkpoint_where_there_is_one(
    full: Any, make_mixtral: Any, plans: dict[str, Plan]
) -> None:
    folder = Path(full.config._name_or_path)
    count, in_memory = ExportedBytes(folder), make_mixtral(experts=6)
    of_checkpoint, of_memory = Bytes(moeopt.models.load_model(folder).to(torch.bfloat16)), Bytes(in_memory)
    for plan in plans.values():
        assert of_checkpoint(plan, None) == count(plan), "the dtype in memory does not matter"
        assert of_memory(plan, None) == Sizes(in_memory).under(plan).bytes
    assert of_checkpoint.describe() == {"of": "checkpoint", "full": count.full}
    assert of_memory.describe() == {"of": "memory", "full": Sizes(in_memory).under().bytes}


def test_every_number_of_experts(full: Any) -> None:
    """Two of them are laid out, and the others follow."""
    folder = Path(full.config._name_or_path)
    count = ExportedBytes(folder)
    uneven = [Plan.one_hot([[*range(r)], [*range(7 - r)], [0, 5]], experts=6, k=1) for r in range(1, 7)]
    for plan in uneven:
        assert count(plan) == ExportedBytes(folder)(plan)
