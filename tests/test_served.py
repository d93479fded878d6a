"""Exports hold what vLLM and SGLang read: names and shapes as benchmarks/served.py restates their loaders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import FAMILIES, KEEP, SERVERS, cases, wrong_in_loader


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "deepseek_v3" else pytest.mark.slow) for name in FAMILIES]
)
def test_every_place_of_both_loaders_is_filled_once_and_no_other_tensor_is_there(family: str, tmp_path: Path) -> None:
    made = cases(family, tmp_path)
    for case in made:
        for server in SERVERS:
            assert wrong_in_loader(case.full, case.small, family, server) == [], (case.kind, server)
    small = made[0].small
    config, tensors = json.loads((small / "config.json").read_text()), load_file(small / "model.safetensors")
    assert config.get("num_nextn_predict_layers", 0) == 0
    expert = next(name for name in tensors if ".experts." in name)
    router = next(name for name in tensors if name.endswith(("gate.weight", "router.weight")))
    key = next(key for key in ("n_routed_experts", "num_local_experts", "num_experts") if key in config)

    def broken(**changes: torch.Tensor | None) -> list[str]:
        changed = {**tensors, **changes}
        save_file({n: t for n, t in changed.items() if t is not None}, small / "model.safetensors", {"format": "pt"})
        return wrong_in_loader(made[0].full, small, family, "SGLang")

    assert any("filled 0 times" in line for line in broken(**{expert: None}))
    assert any("has shape" in line for line in broken(**{router: torch.zeros(KEEP + 1, tensors[router].shape[1])}))
    assert any("is no tensor of the full" in line for line in broken(**{"model.layers.1.mlp.spare": torch.zeros(3)}))
    assert not broken()
    (small / "config.json").write_text(json.dumps(config | {key: KEEP - 1}))
    assert broken()
