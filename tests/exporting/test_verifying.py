"""Verification: a good checkpoint passes, a tampered one does not, and strange code does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.cli import main
from moeopt.errors import ExportError
from moeopt.exporting import verify
from moeopt.exporting.exporter import prepare
from moeopt.exporting.folders import SOURCE
from moeopt.exporting.source import Source, torch_dtype
from moeopt.plan import Plan

FEW = {"sequences": 1, "length": 8, "new_tokens": 3}
QUICK = ["--sequences", "1", "--length", "8", "--new-tokens", "2", "--device-map", "cpu"]


def tampered(folder: Path, name: str, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_a_custom_and_a_stock_checkpoint_are_the_original(
    full: Any, plans: dict[str, Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And neither tensors that no one reads nor the want of a tokenizer matter."""
    weights = tmp_path / "full" / "model.safetensors"
    save_file(load_file(weights) | {"value_head.weight": torch.ones(3)}, weights, metadata={"format": "pt"})
    moeopt.export(plans["everything"], tmp_path / "small", model=tmp_path / "full")
    assert "value_head.weight" in load_file(tmp_path / "small" / "model.safetensors")
    outcome = verify(tmp_path / "small", texts=["to be compared"], **FEW)
    assert outcome.ok
    assert (outcome.form, outcome.differing, outcome.difference, outcome.top_1) == ("custom", (), 0.0, 1.0)
    assert (outcome.tokens, outcome.generated) == (8 + 8 + 1 + len("to be compared"), 3)
    for file in (tmp_path / "full").glob("tokenizer*"):
        file.unlink()
    moeopt.export(Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2), tmp_path / "stock", model=tmp_path / "full")
    assert "value_head.weight" in load_file(tmp_path / "stock" / "model.safetensors")
    assert main(["verify", str(tmp_path / "stock"), "--model", str(tmp_path / "full"), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "bit for bit" in printed
    assert "largest difference 0 at" in printed


@pytest.mark.slow
def test_a_tampered_tensor_is_found(
    full: Any, plans: dict[str, Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moeopt.export(plans["prob"], tmp_path / "small", model=full)
    name = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    tampered(tmp_path / "small", name, lambda tensor: tensor + torch.eye(*tensor.shape, dtype=tensor.dtype) / 2)
    assert main(["verify", str(tmp_path / "small"), *QUICK]) == 1
    printed = capsys.readouterr().out
    assert f"not {name}" in printed
    assert "largest difference 0 at" not in printed
    assert "NO" in printed


@pytest.mark.slow
def test_code_that_is_not_moeopts_runs_only_when_it_is_trusted(
    full: Any, plans: dict[str, Plan], tmp_path: Path
) -> None:
    """And a checkpoint that does not load is not verified, which is no error of ours."""
    moeopt.export(plans["prob"], tmp_path / "small", model=full)
    code = tmp_path / "small" / "modeling_moeopt.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ExportError, match="not, byte for byte, what this moeopt ships"):
        verify(tmp_path / "small", **FEW)
    assert main(["verify", str(tmp_path / "small")]) == 2
    assert not (tmp_path / "ran").exists()
    tampered(tmp_path / "small", "model.norm.weight", lambda tensor: tensor[:-1].clone())
    outcome = verify(tmp_path / "small", trust_remote_code=True, **FEW)
    assert (tmp_path / "ran").exists()
    assert outcome.differing == ("model.norm.weight",)
    assert outcome.failure
    assert not outcome.ok


@pytest.mark.slow
def test_what_another_target_wrote_is_verified_by_a_plan_and_a_model(full: Any, tmp_path: Path) -> None:
    """Written as in docs/how-to/own-export.md: a configuration and tensors, and nothing that says whose they are."""
    plan = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)
    other = tmp_path / "other"
    other.mkdir()
    with Source(tmp_path / "full") as source:
        prepared = prepare(source, plan, "stock")
        state = {name: bytearray(tensor.nbytes) for name, tensor in prepared.layout.tensors.items()}
        for name, place, piece in prepared.layout.parts(source):
            state[name][place : place + len(piece)] = piece
    made = {
        name: torch.frombuffer(state[name], dtype=torch_dtype(tensor.dtype)).reshape(tensor.shape)
        for name, tensor in prepared.layout.tensors.items()
    }
    save_file(made, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(prepared.config))
    plan.save(tmp_path / "plan.safetensors")
    asked = ["verify", str(other), "--model", str(tmp_path / "full"), "--plan", str(tmp_path / "plan.safetensors")]
    assert main([*asked, *QUICK]) == 0
    tampered(other, "model.norm.weight", lambda tensor: tensor * 2)
    outcome = verify(other, model=tmp_path / "full", plan=plan, **FEW)
    assert outcome.differing == ("model.norm.weight",)
    assert not outcome.ok


def test_what_does_not_say_what_it_is_of_is_refused(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    for told in ({}, {"plan": plans["mixed-k"]}, {"model": tmp_path / "full"}):
        with pytest.raises(ExportError, match=r"lacks moeopt\.json .* --plan FILE\) and the full model \(model="):
            verify(tmp_path / "full", **told)
    with pytest.raises(ExportError, match=r"has no config\.json"):
        verify(tmp_path, model=tmp_path / "full", plan=plans["mixed-k"])
    moeopt.export(plans["mixed-k"], tmp_path / "small", model=full)
    plans["mixed-r"].save(tmp_path / "small" / "plan.safetensors")
    with pytest.raises(ExportError, match=r"is not the plan that its moeopt\.json names"):
        verify(tmp_path / "small")
    plans["mixed-k"].save(tmp_path / "small" / "plan.safetensors")
    (tmp_path / "small" / SOURCE).write_text(json.dumps({"source": str(tmp_path / "gone")}))
    with pytest.raises(ExportError, match="gone'; say it: model=, or --model"):
        verify(tmp_path / "small")
