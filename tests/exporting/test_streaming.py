"""Export reads and writes piece by piece, in a folder that appears whole or not at all, and refuses damaged input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import moeopt
from moeopt.errors import ExportError
from moeopt.plan import LayerPlan, Plan

PLAN = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def test_files_are_as_safetensors_would_write_them(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    moeopt.export(plans["everything"], tmp_path / "one", model=full)
    moeopt.export(plans["everything"], tmp_path / "many", model=full, shard_bytes=30_000)
    whole, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert whole.keys() == many.keys()
    assert all(torch.equal(whole[name], many[name]) for name in whole)
    assert whole["model.layers.1.block_sparse_moe.gate.w_rm"].dtype == torch.float32
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("many/model-*.safetensors"))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert all(index["weight_map"][name] == file.name for name in names)
        assert sum(whole[name].nbytes for name in names) <= 30_000 or len(names) == 1


def test_names_of_the_source_are_kept(full: Any, tmp_path: Path) -> None:
    """Per expert as transformers 4 and vLLM know them, or fused, whichever the source has."""
    fused: dict[str, torch.Tensor] = dict(full.state_dict())
    (tmp_path / "fused").mkdir()
    shutil.copytree(tmp_path / "full", tmp_path / "fused", dirs_exist_ok=True)
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    outputs = []
    for name in ("full", "fused"):
        moeopt.export(PLAN, tmp_path / f"small-{name}", model=tmp_path / name)
        small = MixtralForCausalLM.from_pretrained(tmp_path / f"small-{name}", dtype="auto").eval()
        with torch.no_grad():
            outputs.append(small(torch.arange(3, 40)[None]).logits)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in tensors(tmp_path / "small-full")
    assert tensors(tmp_path / "small-fused")["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 96, 32)
    assert torch.equal(*outputs)


def write_sharded(folder: Path, hidden: int, intermediate: int) -> int:
    """A Mixtral of zeros in bfloat16, 2 layers of 8 experts, a file a layer; returns its bytes."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, dtype="bfloat16", architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    config.to_json_file(folder / "config.json")
    with torch.device("meta"):
        left = {name: t.shape for name, t in MixtralForCausalLM(config).state_dict().items()}
    weight_map = {}
    for prefix in ("model.layers.0.", "model.layers.1.", ""):
        names = [name for name in left if name.startswith(prefix)]
        state = {name: torch.zeros(left.pop(name), dtype=torch.bfloat16) for name in names}
        file = f"shard-{len(left)}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_memory_stays_far_below_a_shard(tmp_path: Path) -> None:
    """Of a merging, the dearest export, of shards of 74 MiB, which hold one fused tensor of 48 MiB and one of 24."""
    write_sharded(tmp_path / "warm-up", 32, 48)
    size = write_sharded(tmp_path / "full", 512, 3072)
    w_em = np.full((4, 8), 0.125, dtype=np.float32)
    w_em[:, :4] += np.eye(4, dtype=np.float32)
    Plan((LayerPlan(8, 2, w_em=w_em, w_rm=w_em, router="prob"),) * 2).save(tmp_path / "plan")
    script = """
import resource, sys, moeopt
plan, unit = moeopt.Plan.load("plan"), 1 if sys.platform == "darwin" else 1024
moeopt.export(plan, "warm", model="warm-up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moeopt.export(plan, "small", model="full")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert size > 145 << 20
    assert int(done.stdout.split()[-1]) < 32 << 20


@pytest.mark.parametrize("which", ["model.norm.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(full: Any, tmp_path: Path, which: str) -> None:
    file = tmp_path / "full" / "model.safetensors"
    state = load_file(file)
    del state[which]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"incomplete: it lacks model\.(norm\.weight|layers\.1.*experts\.3\.w2)"):
        moeopt.export(PLAN, tmp_path / "small", model=tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_tensors_that_the_config_ties_may_be_absent(
    saved: Any, make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    full = saved(make_mixtral(layers=3, experts=6, tie_word_embeddings=True), tiny_tokenizer, tmp_path / "full")
    assert "lm_head.weight" not in tensors(tmp_path / "full")
    moeopt.export(PLAN, tmp_path / "small", model=full)
    config = tmp_path / "full" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(ExportError, match=r"lacks lm_head\.weight"):
        moeopt.export(PLAN, tmp_path / "other", model=tmp_path / "full")


def test_damaged_files_are_named(full: Any, tmp_path: Path) -> None:
    file = tmp_path / "full" / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) - 100], b"x" * 100, whole[:4]):
        file.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"model\.safetensors' is truncated or not a safetensors file"):
            moeopt.export(PLAN, tmp_path / "small", model=tmp_path / "full")
    file.rename(file.with_name("part.safetensors"))
    index = tmp_path / "full" / "model.safetensors.index.json"
    file.with_name("part.safetensors").write_bytes(whole)
    for text, reason in (
        ('{"weight_map": {"a": "../part.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "part.safetensors"}}', "lacks tensors that its index names: a"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors that its index names"),
        ("[]", "not an index"),
    ):
        index.write_text(text)
        with pytest.raises(ExportError, match=reason):
            moeopt.export(PLAN, tmp_path / "small", model=tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


@pytest.mark.slow
def test_what_a_killed_export_leaves_is_hidden_and_removed_by_the_next(full: Any, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan")
    script = """
import os, signal, moeopt, moeopt.exporting.exporter as room
room.copy_companions = lambda source, names, folder: names and os.kill(os.getpid(), signal.SIGKILL)
moeopt.export(moeopt.Plan.load("plan"), "small", model="full")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"full", "plan"}
    assert len(left) == 1
    assert left.pop().startswith(".small.")
    strangers = tmp_path / ".small.notes"
    strangers.mkdir()
    moeopt.export(PLAN, tmp_path / "small", model=full)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "plan", "small", ".small.notes"}
    assert not (tmp_path / "small" / ".writer.json").exists()
