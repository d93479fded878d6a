"""Tiny models of every MoE type that the installed transformers has: random weights, and biases that are not zero.

A type's own default configuration is shrunk field by field, by the names of the fields, so that a type that a newer
transformers adds comes out too; `EXTRA` has what some types need beyond that.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

LAYERS, EXPERTS, ACTIVE, VOCABULARY = 3, 8, 2, 320
AUTO = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": AutoModelForCausalLM,
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": AutoModelForImageTextToText,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": AutoModelForSeq2SeqLM,
}
MOE = re.compile(r"class \w*(Experts?|MoE|MoeBlock|SparseMoeBlock|SparseMLP|CDMoE)\b\w*\(|use_experts_implementation")

SIZES: dict[str, Any] = {
    r"(unpadded_)?vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?|depth": LAYERS,
    r"num_local_experts|num_experts|n_routed_experts|moe_num_experts": EXPERTS,
    r"num_experts_per_tok(en)?|top_k_experts|moe_k|moe_topk|moe_top_k": ACTIVE,
    r"(moe_)?(num_|n_)shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"hidden_size|d_model|ple_embed_dim|text_hidden_size|out_hidden_size|projector_(in|out)put_dim|adapter_(in|out)_dim|adapter_input_size"
    r"|projector_hidden_size|projection_hidden_dim|moe_hidden_size|output_dim|hidden_dim": 32,
    r"\w*intermediate_size(_mlp)?|\w*ffn_hidden_size|\w*ffn_dim|d_ff|mlp_dim|share_expert_dim": 24,
    r"n_heads|num_heads|\w*attention_heads|linear_num_(key_|value_)?heads|(mamba_)?n(um)?_heads|index_n_heads": 4,
    r"\w*num_key_value_heads|kv_n_heads": 4,
    r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim": 8,
    r"\w*head_dim|d_kv|kv_channels|mamba_d_head": 16,
    r"\w*_rank|router_hidden_size|kv_lora_rank": 16,
    r"n_group|num_expert_group": 2,
    r"topk_group": 1,
    r"max_position_embeddings|model_max_length|max_seq_len": 256,
    r"(mamba_)?n_groups": 1,
    r"\w*d_state|ssm_state_size": 8,
    r"\w*chunk_size|attention_chunk_size|sliding_window(_size)?": 16,
    r"initializer_range": 0.2,
    r"hidden_size_per_layer_input": 8,
}
"""By the whole name of a field, what it becomes, where its default is a number above zero."""
TOKENS = re.compile(r"\w*_token_(id|index)|\w*_(id|index)$")

MROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA = {"enable_moe_block": True, "moe_intermediate_size": 24, "global_head_dim": 16}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma4": {f"text_config.{name}": size for name, size in GEMMA.items()},
    "gemma4_text": GEMMA,
    "glm4v_moe": {"text_config.rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "diffusion_gemma": {"text_config.global_head_dim": 16, "text_config.moe_intermediate_size": 24},
    "dots3_note": {"text_config.layer_types": ["indexed_attention"] * LAYERS},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * LAYERS},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 290},
    "step3p7": {"text_config.sliding_window": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "attention"]},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark": {"audio_config.hidden_sizes": [8] * LAYERS, "audio_config.depths": [1] * LAYERS},
    "qwen4_exp": {f"text_config.{name}": size for name, size in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "zaya": {"num_experts_per_tok": 1},
    "flint": {"mlp_only_layers": [0]},
    "doge": {"is_moe": True, "num_experts": 16},
}
"""What a type needs beside, by path in its configuration."""


@cache
def moe_types() -> dict[str, str]:
    """Every model type of transformers that generates text and whose code holds experts, and its class."""
    folder, types = Path(transformers.__file__).parent / "models", {}
    for model_type in CONFIG_MAPPING_NAMES:  # and those that are no language models of their own are parts of others
        names = [getattr(modeling_auto, mapping).get(model_type) for mapping in AUTO]
        name = next((name for name in names if name is not None), None)
        files = (folder / model_type_to_module_name(model_type)).glob("modeling_*.py")
        if name is not None and any(MOE.search(file.read_text(encoding="utf-8")) for file in files):
            types[model_type] = name if isinstance(name, str) else name[0]
    return types


def shrunk(config: Any) -> dict[str, Any]:
    """The fields of a default configuration, as a dictionary, that a tiny one changes."""
    changed: dict[str, Any] = {}
    layers = config.get("num_hidden_layers")
    for name, value in config.items():
        name = str(name)
        if isinstance(value, dict):
            inner = shrunk(value)
            if inner and name.endswith("config"):
                changed[name] = inner
        elif isinstance(value, list) and len(value) == layers:
            kinds = list(dict.fromkeys(value))
            changed[name] = ([*kinds[:-1], *[kinds[-1]] * LAYERS] if len(kinds) <= LAYERS else value)[:LAYERS]
        elif TOKENS.fullmatch(name) and isinstance(value, int) and value >= VOCABULARY:
            changed[name] = VOCABULARY - 1 - len(changed) % 40
        elif value is None and re.search(r"experts(_per_tok)?$|_experts$", name):
            changed[name] = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            if name == "head_dim" and value == config.get("qk_rope_head_dim"):
                size = 8
            if size is not None and not (name.endswith("group") and value == 1):
                changed[name] = size
    return changed


def tiny_config(model_type: str) -> Any:
    """A configuration of a type that makes a model in milliseconds."""
    kind = CONFIG_MAPPING[model_type]
    fields = shrunk(kind().to_dict())
    for path, value in EXTRA.get(model_type, {}).items():
        *parents, name = path.split(".")
        inner = fields
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return kind(**fields)


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of a type in eval mode, float32, whose every bias and correction is random."""
    config = tiny_config(model_type)
    autos = [auto for mapping, auto in AUTO.items() if model_type in getattr(modeling_auto, mapping)]
    # of a model of images and text the whole is saved, as it is released, whatever loads it
    auto = autos[-1] if config.get_text_config() is not config else autos[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and re.search(r"bias|correction|per_expert_scale", name):
                nn.init.normal_(tensor, mean=float(name.endswith("scale")), std=0.1)
            elif tensor.is_floating_point() and tensor.ndim > 1 and not tensor.any():
                nn.init.normal_(tensor, std=0.2)
    return model
