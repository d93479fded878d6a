"""Quantised checkpoints: experts go with their scales, byte for byte, and what is loaded is the patched original."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised_files
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeopt
from benchmarks.tiny_families import tiny_model
from moeopt.errors import ExportError, ModelError
from moeopt.evaluation import Evaluator
from moeopt.exporting import ExportedBytes, verify
from moeopt.models.names import NUMBERED
from moeopt.plan import DownProjections, LayerPlan, Plan
from moeopt.tasks.text import TextTask

KEPT = [[4, 1, 2], [0, 3, 5], [5, 4, 3]]
PRUNING = Plan.one_hot(KEPT, experts=6, k=2)
COMMON: dict[str, Any] = {
    "vocab_size": 300, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts_per_tok": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
}  # fmt: skip
Write = Callable[..., Path]


@pytest.fixture
def write(tiny_tokenizer: Any, tmp_path: Path) -> Write:
    """A function: a folder with 3 layers of 6 experts in a quantised format, of gpt-oss for MXFP4, else Qwen3-MoE."""

    def write(name: str, **options: Any) -> Path:
        build(name).save_pretrained(tmp_path / "full")
        tiny_tokenizer.save_pretrained(tmp_path / "full")
        quantised_files.quantise(tmp_path / "full", name, **options)
        return tmp_path / "full"

    return write


def build(name: str) -> Any:
    """The model in bfloat16 that `write` quantises."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mxfp4":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "layer_types": kinds}
            model: Any = GptOssForCausalLM(GptOssConfig(**COMMON, **shape, num_local_experts=6))
        else:
            shape = {"hidden_size": 32, "moe_intermediate_size": 64, "norm_topk_prob": True}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **shape, num_experts=6))
    return model.to(torch.bfloat16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None] * 5 % 250).logits


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def dense(router: Any) -> LayerPlan:
    rng = np.random.default_rng(0)
    w_em, w_rm = np.eye(6)[[4, 0, 2]] + 0.1 * rng.standard_normal((2, 3, 6))
    return LayerPlan(6, 2, w_em=w_em, w_rm=w_rm, router=router)


def refitted(hidden: int, inner: int) -> LayerPlan:
    whole = np.random.default_rng(0).standard_normal((3, hidden, inner)).astype(np.float32)
    return LayerPlan(6, 2, kept=(4, 1, 2), down=DownProjections(whole=whole))


KEEP = LayerPlan(6, 2, kept=(5, 1, 3))
PLANS: dict[str, Callable[[str], Plan]] = {
    "pruned": lambda name: PRUNING,
    "merged": lambda name: Plan((dense("logit"),) * 3),
    "merged-in-one": lambda name: Plan((KEEP, dense("logit"), KEEP)),
    "mapped": lambda name: Plan((dense("prob"), KEEP, KEEP)),
    "mapped-only": lambda name: Plan((LayerPlan(6, 2, kept=(5, 1, 3), w_rm=dense("prob").w_rm, router="prob"),) * 3),
    "refitted": lambda name: Plan((refitted(*((64, 32) if name == "mxfp4" else (32, 64))), KEEP, KEEP)),
}


LOADED = [
    *((name, kind) for name in ("fp8", "mxfp4") for kind in PLANS),
    *((name, "merged-in-one") for name in ("fp8-ue8m0", "mxfp8")),
    *((name, kind) for name in ("int4", "float8", "mxfp4-packed") for kind in ("pruned", "mapped-only")),
]


@pytest.mark.parametrize(("name", "kind"), LOADED)
def test_what_is_loaded_is_the_patched_original(name: str, kind: str, write: Write, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="dequantised to bfloat16"):
        full, _ = moeopt.load(write(name))
    for key, right in build(name).named_parameters():
        assert (full.get_parameter(key) - right).abs().max() <= 0.2 * right.abs().max(), key
    plan = PLANS[kind](name)
    with moeopt.patched(full, plan):
        patched = logits(full)
    moeopt.export(plan, tmp_path / "small", model=full)
    assert torch.equal(logits(moeopt.models.load_model(tmp_path / "small")), patched)
    settings = config_of(tmp_path / "small").get("quantization_config")
    attention_only = name == "mxfp4" and kind == "merged"  # and that is not quantised
    assert (settings is None) == attention_only
    record = json.loads((tmp_path / "small" / "moeopt.json").read_text())
    made = [f"model.layers.{i}.mlp.experts" for i, part in enumerate(plan.layers) if part.makes_experts]
    assert record.get("dequantised", []) == made
    assert ("no longer quantised" in (tmp_path / "small" / "README.md").read_text()) == bool(made)
    if (name, kind) == ("mxfp4", "pruned"):
        before, after = (load_file(place / "model.safetensors") for place in (tmp_path / "full", tmp_path / "small"))
        for key in (key for key in after if ".experts." in key):
            assert torch.equal(after[key], before[key][KEPT[int(key.split(".")[2])]]), key
    if kind == "merged-in-one":
        assert settings["modules_to_not_convert"][-1] == "model.layers.1.mlp.experts"


@pytest.mark.filterwarnings("ignore:.*no longer quantised")
@pytest.mark.parametrize("name", ["fp8", "mxfp4", "int4"])
def test_bytes_are_counted_without_writing(name: str, write: Write, tmp_path: Path) -> None:
    """Also where merged experts are no longer quantised, layers differ, or one expert is stored otherwise."""
    odd = "model.layers.1.mlp.experts.3.up_proj"
    folder = write(name, skipped=lambda layer: layer == odd)
    count = ExportedBytes(folder)
    plans = [make(name) for kind, make in PLANS.items() if name != "int4" or kind in ("pruned", "mapped-only")]
    without = Plan.one_hot([[0, 1, 2]] * 3, experts=6, k=2)
    for i, plan in enumerate([*plans, without]):
        small = load_file(moeopt.export(plan, tmp_path / f"small-{i}", model=folder) / "model.safetensors")
        assert count(plan) == sum(tensor.nbytes for tensor in small.values()), i
    assert (count(without) == count(PRUNING)) == (name == "mxfp4")  # which has all experts in one tensor
    if name == "int4":
        with pytest.raises(ExportError, match="cannot be written in"):
            count(PLANS["merged"](name))


@pytest.mark.parametrize("name", quantised_files.WRITERS)
def test_experts_keep_their_bytes(name: str, write: Write, tmp_path: Path) -> None:
    """Also where one of them is not quantised, which config.json then says of its new number."""
    odd = "model.layers.1.mlp.experts.3.up_proj"
    folder = write(name, skipped=lambda layer: layer == odd)
    moeopt.export(PRUNING, tmp_path / "small", model=folder)
    full, small = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "small"))
    original, expected = build(name), {}
    for key, tensor in full.items():
        layer = int(key.split(".")[2]) if "layers." in key else 0
        if key.endswith("mlp.gate.weight"):
            expected[key] = tensor[KEPT[layer]]
        elif ".experts." not in key:
            expected[key] = tensor
        elif (expert := int(key.split(".")[5])) in KEPT[layer]:
            new = KEPT[layer].index(expert)
            expected[key.replace(f"experts.{expert}.", f"experts.{new}.")] = tensor
    assert small.keys() == expected.keys()
    for key, tensor in small.items():
        assert (tensor.dtype, tensor.shape) == (expected[key].dtype, expected[key].shape)
        assert torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8)), key
        if key.endswith("qweight") and ".experts." in key:  # from bytes to numbers, by a loop over bits
            stem = key.removesuffix("qweight")
            numbers = quantised_files.unpacked({k.removeprefix(stem): t for k, t in small.items() if stem in k}, name)
            layer, expert = (int(key.split(".")[i]) for i in (2, 5))
            right = original.get_submodule(f"model.layers.{layer}.mlp.experts")
            gate, up = right.gate_up_proj[KEPT[layer][expert]].chunk(2)
            right = {"gate": gate, "up": up, "down": right.down_proj[KEPT[layer][expert]]}[key.split(".")[6][:-5]]
            assert (numbers - right).abs().max() <= 0.51 * small[f"{stem}scales"].max(), key
    was, now = (json.dumps(config_of(place)["quantization_config"]) for place in (folder, tmp_path / "small"))
    assert re.sub(r"\$\"", '"', now) == re.sub(r"(experts\\*\.)3", r"\g<1>1", was) != was


def altered(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.mlp.experts.3.up_proj"
GATE = "model.layers.1.mlp.gate"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "unknown": (
        "int4",
        lambda s: s.update({f"{EXPERT}.weight_mask": torch.ones(2)}),
        f"'{EXPERT}.weight_mask' is beside the tensors of experts",
    ),
    "of-a-router": (
        "fp8",
        lambda s: s.update({f"{GATE}.weight_mask": torch.ones(2)}),
        f"'{GATE}.weight_mask' is beside the tensors of a router",
    ),
    "no-scale": ("fp8", lambda s: s.pop(f"{EXPERT}.weight_scale_inv"), "is stored as F8_E4M3 without the"),
    "no-scales": ("gptq", lambda s: s.pop(f"{EXPERT}.scales"), f"'{EXPERT}.scales' is missing"),
    "no-shape": ("int4", lambda s: s.pop(f"{EXPERT}.weight_shape"), "they differ in .weight_shape"),
    "no-expert": ("awq", lambda s: [s.pop(f"{EXPERT}.{end}") for end in ("qweight", "qzeros", "scales")], "incomplete"),
    "router": (
        "fp8",
        lambda s: s.update(quantised_files.fp8(s.pop(f"{GATE}.weight"), f"{GATE}.", (6, 16))),
        f"'{GATE}.weight_scale_inv' is of a router that is quantised by fp8, whose rows cannot be selected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_are_not_understood_are_refused(damage: str, write: Write, tmp_path: Path) -> None:
    name, change, message = DAMAGES[damage]
    with pytest.raises(ExportError, match=re.escape(message)):
        moeopt.export(PRUNING, tmp_path / "small", model=altered(write(name), change))
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_what_a_format_cannot_hold_is_refused_before_any_work(write: Write, tmp_path: Path) -> None:
    folder = write("gptq")
    with pytest.raises(ExportError, match=r"layer 1 of the plan has experts of new weights.*quantised by gptq"):
        moeopt.export(PLANS["merged-in-one"]("gptq"), tmp_path / "small", model=folder)
    with pytest.raises(ExportError, match="needs a class of its own, which transformers cannot load weights of gptq"):
        moeopt.export(PLANS["mapped-only"]("gptq"), tmp_path / "small", model=folder)
    with pytest.raises(ModelError, match="quantised by gptq, and transformers has no experts"):
        moeopt.load(folder)
    moeopt.export(PRUNING, tmp_path / "small", model=folder)
    verified = verify(tmp_path / "small")
    assert verified.failure is not None
    assert (verified.differing, verified.config, verified.ok) == ((), (), False)
    config = config_of(folder)
    config["quantization_config"]["quant_method"] = "novel"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="quantised by 'novel', and moeopt knows"):
        moeopt.export(PRUNING, tmp_path / "other", model=folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("int8", "stored as int-quantized"), ("int4-zero", "zero points"), ("nvfp4", "stored as nvfp4")],
)
def test_experts_that_transformers_would_get_wrong_are_not_loaded(
    name: str, reason: str, write: Write, tmp_path: Path
) -> None:
    folder = write(name)
    with pytest.raises(ModelError, match=reason):
        moeopt.load(folder)
    with pytest.raises(ExportError, match="cannot load weights of compressed-tensors such as these"):
        moeopt.export(PLANS["mapped-only"](name), tmp_path / "small", model=folder)


def test_experts_and_scales_in_one_tensor_are_pruned_and_not_loaded(write: Write, tmp_path: Path) -> None:
    def fuse(state: dict[str, torch.Tensor]) -> None:
        """Experts of layer 0 as one tensor with one tensor of scales."""
        for end in ("weight", "weight_scale_inv"):
            down, gate, up = (
                torch.stack([state.pop(f"model.layers.0.mlp.experts.{i}.{leaf}_proj.{end}") for i in range(6)])
                for leaf in ("down", "gate", "up")
            )
            suffix = end.removeprefix("weight")
            state[f"model.layers.0.mlp.experts.gate_up_proj{suffix}"] = torch.cat([gate, up], 1)
            state[f"model.layers.0.mlp.experts.down_proj{suffix}"] = down

    folder = altered(write("fp8"), fuse)
    with pytest.raises(ModelError, match=r"does not read scales such as .*_proj_scale_inv"):
        moeopt.load(folder)
    with pytest.raises(ModelError, match=r"without its tensor .*_proj_scale_inv"):
        moeopt.load(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    moeopt.export(PRUNING, tmp_path / "small", model=folder)
    full, small = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "small"))
    fused = [key for key in small if ".layers.0." in key and ".experts." in key]
    assert len(fused) == 4
    for key in fused:
        assert torch.equal(small[key].view(torch.uint8), full[key][KEPT[0]].view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "float8", "mxfp4"])
def test_a_search_on_a_quantised_checkpoint_is_verified(name: str, write: Write, tmp_path: Path) -> None:
    """With scales of activations, which dequantised weights do not need."""

    def add_inputs(state: dict[str, torch.Tensor]) -> None:
        layers = [key.removesuffix("_proj.weight") for key in state if key.endswith("_proj.weight")]
        state |= {f"{layer}_proj.input_scale": torch.ones(1) for layer in layers}

    with pytest.warns(UserWarning, match="dequantised"):
        full, tokenizer = moeopt.load(altered(write(name), add_inputs if name == "float8" else lambda state: None))
    task = TextTask("toy", search=["one text that is long enough", "another one, also long"], window=32)
    objective = moeopt.Objective(full, tokenizer, task, moeopt.PruneSpace.of(full, keep=3))
    study = moeopt.create_study(objective=objective, storage=None, sampler="local", warm_starts=["reap"])
    moeopt.optimize(study, objective, n_trials=3)
    moeopt.export(study.best_trial, tmp_path / "small", study=study, model=full)
    small, _ = moeopt.load(tmp_path / "small")
    evaluated = Evaluator(small, tokenizer, task).evaluate()
    assert evaluated.loss == study.best_trial.value
    assert verify(tmp_path / "small").ok


ENTRIES = {
    "the same for all": ({"ignore": ["re:.*mlp.gate$", r"re:.*\.experts\.\d+\.up_proj", "lm_head", "Linear"]}, None),
    "whole": (
        {"ignore": [f"model.layers.0.mlp.experts.{i}.up_proj" for i in (0, 1, 4)] + ["model.layers.2.mlp.experts.5"]},
        {"ignore": [f"model.layers.0.mlp.experts.{i}.up_proj" for i in (1, 0)] + ["model.layers.2.mlp.experts.0"]},
    ),
    "in another model": (
        {"ignore": ["language_model.model.layers.0.mlp.experts.4.up_proj", "model.layers.9.mlp.experts.4.up_proj"]},
        {"ignore": ["language_model.model.layers.0.mlp.experts.0.up_proj", "model.layers.9.mlp.experts.4.up_proj"]},
    ),
    "in all layers": (
        {"ignore": ["experts.5.up_proj"]},
        {"ignore": ["model.layers.1.mlp.experts.2.up_proj", "model.layers.2.mlp.experts.0.up_proj"]},
    ),
    "by an expression": (
        {"ignore": [r"re:model.layers\.[01]\..*experts\.[13]\.up_proj"]},
        {"ignore": ["model.layers.0.mlp.experts.1.up_proj", "model.layers.1.mlp.experts.1.up_proj"]},
    ),
    "as keys": (
        {"dynamic": {r"+:.*experts\.4\.up_proj": {"bits": 8}, r"-:.*experts\.(0|2)\.down_proj": {}}},
        {
            "dynamic": {
                r"+:model\.layers\.0\.mlp\.experts\.0\.up_proj$": {"bits": 8},
                r"+:model\.layers\.2\.mlp\.experts\.1\.up_proj$": {"bits": 8},
                r"-:model\.layers\.0\.mlp\.experts\.2\.down_proj$": {},
                r"-:model\.layers\.1\.mlp\.experts\.0\.down_proj$": {},
            }
        },
    ),
}


@pytest.mark.parametrize("entries", ENTRIES)
def test_lists_name_experts_by_their_new_numbers(entries: str, write: Write, tmp_path: Path) -> None:
    folder, (was, now) = write("gptq"), ENTRIES[entries]
    config = config_of(folder)
    config["quantization_config"] |= {"dynamic": {}} | was
    (folder / "config.json").write_text(json.dumps(config))
    moeopt.export(PRUNING, tmp_path / "small", model=folder)
    assert config_of(tmp_path / "small")["quantization_config"] == config["quantization_config"] | (now or was)


def test_experts_that_a_tool_split_are_pruned(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Qwen3-VL-MoE, whose own checkpoints have all experts of a layer in one tensor, as AWQ files of it are."""
    model = tiny_model("qwen3_vl_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")

    def split(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            tensor, stem = state.pop(key).transpose(1, 2), key.rpartition(".")[0]
            leaves = ("gate", "up") if "gate_up" in key else ("down",)
            for leaf, experts in zip(leaves, tensor.chunk(len(leaves), 1)):
                for i, expert in enumerate(experts):
                    state[f"{stem}.{i}.{leaf}_proj.weight"] = expert.contiguous()

    folder = altered(tmp_path / "full", split)
    quantised_files.quantise(folder, "awq", skipped=lambda layer: ".experts." not in layer)
    shape = moeopt.models.check_checkpoint(folder)
    plan = Plan.one_hot([[4, 1, 2]] * shape.layers, experts=shape.experts, k=shape.k)
    moeopt.export(plan, tmp_path / "small", model=folder)
    full, small = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "small"))
    experts = [key for key in small if ".experts." in key]
    assert len(experts) == shape.layers * 3 * 3 * 3
    for key in experts:
        i = int(NUMBERED.search(key)[1])
        assert torch.equal(small[key], full[key.replace(f"experts.{i}.", f"experts.{[4, 1, 2][i]}.")])
    with pytest.raises(ModelError, match="quantised by awq"):
        moeopt.load(folder)
    last = f"language_model.layers.1.mlp.experts.{shape.experts - 1}.up_proj"
    altered(folder, lambda state: [state.pop(key) for key in list(state) if last in key])
    with pytest.raises(ExportError, match=r"incomplete.*up_proj"):
        moeopt.export(plan, tmp_path / "other", model=folder)
