"""Experts that the model's class does not read are not exported beside a config that says another number of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeopt
from moeopt.exporting import verify
from moeopt.exporting.source import Stored
from moeopt.exporting.unread import disagreeing, unread, without_prediction
from moeopt.plan import Plan

FEW = {"sequences": 1, "length": 8, "new_tokens": 2}
N, H = 8, 32


def glm(folder: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    """A GLM-4.5 of three layers, the first one dense; returns its tensors."""
    config = Glm4MoeConfig(
        vocab_size=len(tokenizer) + 16, hidden_size=H, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=N,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
    )  # fmt: skip
    torch.manual_seed(0)
    Glm4MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def qwen(folder: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer) + 16, hidden_size=H, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=N,
        num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): t.clone() for name, t in tensors.items() if name.startswith(old)}


def stacked(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    """A layer with its experts in one tensor."""
    layer = {name: t for name, t in renamed(tensors, old, new).items() if ".experts." not in name}
    for kind in ("gate", "up", "down"):
        parts = [tensors[f"{old}mlp.experts.{j}.{kind}_proj.weight"] for j in range(N)]
        layer[f"{new}mlp.experts.{kind}_proj"] = torch.stack(parts)
    return layer


BLOCKS = {
    "a layer too many": lambda t, last: renamed(t, last, "model.layers.3.") | {
        "model.layers.3.eh_proj.weight": torch.zeros(H, 2 * H), "model.layers.3.enorm.weight": torch.zeros(H),
    },
    "two, one dense": lambda t, last: renamed(t, last, "model.layers.3.") | {
        "model.layers.4.mlp.up_proj.weight": torch.zeros(48, H), "model.layers.4.hnorm.weight": torch.zeros(H),
    },
    "mtp": lambda t, last: renamed(t, last, "mtp.layers.0.") | {
        "mtp.fc.weight": torch.zeros(H, 2 * H), "mtp.norm.weight": torch.zeros(H),
    },
    "ernie": lambda t, last: renamed(t, last, "model.mtp_block.0.") | {
        "model.mtp_emb_norm.0.weight": torch.zeros(H), "model.mtp_linear_proj.0.weight": torch.zeros(H, 2 * H),
    },
    "stacked": lambda t, last: stacked(t, last, "mtp.layers.0."),
    "stacked, other names": lambda t, last: {
        "model.nextn.moe.w1": torch.zeros(N, 24, H), "model.nextn.moe.b": torch.zeros(N, 24),
        "model.nextn.norm.weight": torch.zeros(H),
    },
    "a router alone": lambda t, last: {"model.layers.3.mlp.gate.weight": torch.zeros(N, H)},
    "a router alone, other names": lambda t, last: {"model.layers.3.ffn.selector.weight": torch.zeros(N, H)},
    "a correction alone": lambda t, last: {"model.layers.3.mlp.gate.e_score_correction_bias": torch.zeros(N)},
}  # fmt: skip
OTHERS = {
    "vision_tower.blocks.0.attn.qkv.weight": torch.ones(3 * 16, 16), "value_head.weight": torch.ones(3),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "vision_tower.shared_experts.up.weight": torch.ones(4, 4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "form", "make"),
    [(block, ("stock", "custom")[i % 2], (glm, qwen)[i // 2 % 2]) for i, block in enumerate(BLOCKS)],
)
def test_a_block_for_multi_token_prediction_is_left_out_and_everyone_is_told(
    block: str, form: Any, make: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    tensors = make(full, tiny_tokenizer)
    last = max(match[0] for name in tensors if (match := re.match(r"model\.layers\.\d+\.", name)))
    added = BLOCKS[block](tensors, last)
    save_file(tensors | added | OTHERS, full / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((full / "config.json").read_text()) | {"num_nextn_predict_layers": 1, "use_mtp": True}
    (full / "config.json").write_text(json.dumps(config))
    plan = Plan.one_hot([[0, 2, 4, 6]] * 2, experts=N, k=2)
    with pytest.warns(UserWarning, match=r"left out: .*no multi-token prediction; copied as they are: .*value_head"):
        out = moeopt.export(plan, tmp_path / "out", model=full, form=form)
    written, told = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert not added.keys() & written.keys()
    assert OTHERS.keys() <= written.keys()
    assert told["num_nextn_predict_layers"] == 0
    assert told["use_mtp"] is False
    record = json.loads((out / "moeopt.json").read_text())
    assert record["left_out"]
    assert all(any(name.startswith(root) for root in record["left_out"]) for name in added)
    assert set(record["copied_unread"]) == {"vision_tower", "value_head", "model.layers.1.self_attn.rotary_emb"}
    assert "Left out: " in (out / "README.md").read_text()
    if block in ("a layer too many", "ernie"):
        verification = verify(out, **FEW)
        assert verification.ok
        assert any("left out" in line for line in verification.lines())


@pytest.mark.slow
def test_verify_finds_a_block_that_is_there_and_a_config_that_says_so(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tensors = glm(tmp_path / "full", tiny_tokenizer)
    added = renamed(tensors, "model.layers.2.", "model.layers.3.")
    save_file(tensors | added, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"left out: model\.layers\.3 "):
        out = moeopt.export(Plan.one_hot([[0, 2, 4, 6]] * 2, experts=N, k=2), tmp_path / "out", model=tmp_path / "full")
    told = json.loads((out / "config.json").read_text())
    written = load_file(out / "model.safetensors")
    save_file(written | added, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(told | {"num_nextn_predict_layers": 1}))
    verification = verify(out, **FEW)
    assert set(verification.differing) == added.keys()
    assert verification.config[0] == "num_nextn_predict_layers is 1, not 0"
    assert "model.layers.3.mlp.experts holds 8 experts, config.json says 4" in verification.config
    assert "model.layers.3.mlp.gate.weight routes to 8 experts, config.json says 4" in verification.config
    assert not verification.ok


def test_a_dense_block_is_copied_and_said(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """MiMo's, which no number of experts has to do with."""
    tensors = qwen(tmp_path / "full", tiny_tokenizer)
    dense = {"model.mtp_layers.0.mlp.up_proj.weight": torch.ones(48, H)}
    save_file(tensors | dense, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    plan = Plan.one_hot([[0, 2, 4, 6]] * 2, experts=N, k=2)
    with pytest.warns(UserWarning, match=r"copied as they are: model\.mtp_layers, which the model's class does not"):
        out = moeopt.export(plan, tmp_path / "out", model=tmp_path / "full")
    assert dense.keys() <= load_file(out / "model.safetensors").keys()
    assert "num_nextn_predict_layers" not in json.loads((out / "config.json").read_text())


@given(
    block=st.sampled_from(
        ["model.layers.9", "mtp", "mtp.layers.0", "model.mtp_block.0", "language_model.mtp.3", "nextn"]
    ),
    inner=st.sampled_from(["mlp", "block_sparse_moe", "feed_forward", "ffn", "moe"]),
    experts=st.sampled_from(["experts.{}.w1.weight", "experts.w13", "expert_{}.up", "local_experts.{}.up.weight"]),
    router=st.sampled_from(["gate.weight", "router.weight", "gate.wg.weight", "router.layer.weight"]),
    n=st.sampled_from([4, 8, 60, 128]),
)
def test_whatever_its_names_a_block_goes_whole_and_nothing_else(
    block: str, inner: str, experts: str, router: str, n: int
) -> None:
    hidden = 96
    read = {
        f"model.layers.{i}.mlp.experts.{j}.w1.weight": Stored("F32", (24, hidden)) for i in (0, 1) for j in range(n)
    }
    read |= {f"model.layers.{i}.mlp.gate.weight": Stored("F32", (n, hidden)) for i in (0, 1)}
    read |= {"language_model.embed.weight": Stored("F32", (300, hidden))}
    shape = (24, hidden) if "{}" in experts else (n, 24, hidden)
    added = {f"{block}.{inner}.{experts.format(j)}": Stored("F32", shape) for j in range(n)}
    added |= {f"{block}.{inner}.{router}": Stored("F32", (n, hidden)), f"{block}.norm.weight": Stored("F32", (hidden,))}
    others = {"vision.conv.weight": Stored("F32", (n + 1, 3, 14, 14)), "v_head.weight": Stored("F32", (1, hidden))}
    outcome = unread(read | added | others, read.keys(), n, hidden)
    assert outcome.tensors == added.keys()
    assert set(outcome.copied) == {"vision", "v_head"}
    assert outcome.prediction
    config = {"num_experts": n, "hidden_size": hidden}
    assert disagreeing(config, read) == []
    smaller = {"num_experts": n - 1, "hidden_size": hidden}
    assert len(disagreeing(smaller, read)) == 4
    assert disagreeing(smaller, added)


def test_a_config_promises_no_block_that_is_not_there(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """transformers saves no block for multi-token prediction and keeps the key, by which servers look for one."""
    glm(tmp_path / "full", tiny_tokenizer)
    assert json.loads((tmp_path / "full" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.warns(UserWarning, match="config.json has num_nextn_predict_layers of 0"):
        small = moeopt.export(
            Plan.one_hot([[0, 2, 5]] * 2, experts=N, k=2), tmp_path / "small", model=tmp_path / "full"
        )
    assert json.loads((small / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert verify(small, model=tmp_path / "full", **FEW).ok


def test_a_config_says_in_its_own_words_that_there_is_no_prediction() -> None:
    config: dict[str, Any] = {
        "mtp_num_hidden_layers": 1, "num_mtp_modules": 3, "use_mtp": True, "mtp_layer_types": ["moe"],
        "mtp_loss_scaling_factor": 0.1, "text_config": {"num_mtp_layers": 2, "num_hidden_layers": 4},
        "mtp_config": {"num_nextn_predict_layers": 1},
    }  # fmt: skip
    without_prediction(config)
    assert config == {
        "mtp_num_hidden_layers": 0, "num_mtp_modules": 0, "use_mtp": False, "mtp_layer_types": [],
        "mtp_loss_scaling_factor": 0.1, "text_config": {"num_mtp_layers": 0, "num_hidden_layers": 4},
        "mtp_config": {"num_nextn_predict_layers": 0},
    }  # fmt: skip
    plain: dict[str, Any] = {"text_config": {}}
    without_prediction(plain)
    assert plain == {"text_config": {"num_nextn_predict_layers": 0}}
