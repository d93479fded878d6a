"""Tiny quantised checkpoints: linear layers written by the format's own package, or by its published layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]
"""The tensors of one linear layer, by the last part of their names."""


def fp8(weight: Tensor, prefix: str = "", block: tuple[int, int] = (16, 16), scale_fmt: str | None = None) -> Parts:
    """Blocks with a float32 scale each, by transformers' own operation (DeepSeek-V3 has 128 x 128)."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})
    return {prefix + name.removeprefix("x."): tensor for name, tensor in made.items()}


def compressed(format: str, **arguments: Any) -> Callable[[Tensor], Parts]:
    """A function that writes a linear layer as the compressed-tensors package does."""

    def write(weight: Tensor) -> Parts:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        args = QuantizationArgs(**arguments)
        groups = weight.float().unflatten(-1, (-1, args.group_size or weight.shape[1]))
        state = {"weight": weight}
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(weight.amin().float()[None], weight.amax().float()[None])
        lows, highs = groups.amin(-1), groups.amax(-1)
        scale, zero = calculate_qparams(lows, highs, args, global_scale=state.get("weight_global_scale"))
        state["weight_scale"] = scale if args.scale_dtype else scale.to(weight.dtype)
        state |= {} if args.type == "float" else {"weight_zero_point": zero}
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
        return BaseCompressor.get_value_from_registry(format).compress(state, scheme)

    return write


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {**INT4, "symmetric": True}),
    "int4-zero": ("pack-quantized", {**INT4, "symmetric": False}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4-packed": (
        "mxfp4-pack-quantized",
        {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "float8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
}


def rtn(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits by rounding to nearest: whole numbers (out, in), scales float16 and zero points (out, groups)."""
    groups = weight.float().unflatten(1, (-1, math.gcd(16, weight.shape[1])))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().clamp(min=2**-14)
    zero = (-low / scale.float()).round().clamp(0, 15)
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    return numbers.flatten(1).int(), scale, zero.int()


def packed(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of four bits in each int32 along a dimension, the one at `order[i]` in bits 4i to 4i + 3."""
    eights = numbers.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)[..., list(order)].long()
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(weight: Tensor) -> Parts:
    """As AutoAWQ's WQLinear_GEMM: qweight int32 (in, out / 8), qzeros (groups, out / 8), scales (groups, out)."""
    numbers, scale, zero = rtn(weight)
    return {
        "qweight": packed(numbers.T, 1, AWQ_ORDER).contiguous(),
        "qzeros": packed(zero.T, 1, AWQ_ORDER).contiguous(),
        "scales": scale.T.contiguous(),
    }


def gptq(weight: Tensor) -> Parts:
    """As AutoGPTQ's QuantLinear: qweight int32 (in / 8, out), qzeros (groups, out / 8), less 1, scales, g_idx (in,)."""
    numbers, scale, zero = rtn(weight)
    return {
        "qweight": packed(numbers.T, 0).contiguous(),
        "qzeros": packed((zero.T - 1) % 16, 1).contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // 16,
    }


def mxfp4(weight: Tensor) -> Parts:
    """As gpt-oss: of experts (n, in, out), blocks uint8 (n, out, in / 32, 16), low four bits first, and exponents + 127
    uint8 (n, out, in / 32): OCP Microscaling Formats, E2M1 numbers with a scale E8M0 for each 32."""
    from transformers.integrations.mxfp4 import FP4_VALUES

    groups = weight.transpose(1, 2).float().unflatten(2, (-1, 32))
    exponent = groups.abs().amax(-1).clamp(min=2**-100).log2().floor() - 2  # 2 is the exponent of 4, the largest power
    values = torch.tensor(FP4_VALUES)
    numbers = ((groups * (-exponent).exp2()[..., None]).clamp(-6, 6)[..., None] - values).abs().argmin(-1)
    low, high = numbers.unflatten(-1, (16, 2)).unbind(-1)
    return {"_blocks": (low | high << 4).to(torch.uint8), "_scales": (exponent + 127).to(torch.uint8)}


def fp8_with_exponents(weight: Tensor) -> Parts:
    """Scales that are powers of two, in float8_e8m0fnu, as DeepSeek-V3.1 and on."""
    return fp8(weight, scale_fmt="ue8m0")


def mxfp8(weight: Tensor) -> Parts:
    """A scale for 16 numbers of a row (32 in OCP's format), its exponent + 127 in uint8."""
    return {
        name: t.view(torch.uint8) if "scale" in name else t for name, t in fp8(weight, "", (1, 16), "ue8m0").items()
    }


def unpacked(parts: Parts, name: str) -> Tensor:
    """The numbers of a linear layer of "awq" or "gptq", float32 (out, in), by a loop over bits."""
    columns = torch.stack([parts["qzeros"] >> 4 * i & 15 for i in range(8)], -1)
    if name == "awq":
        rows = torch.stack([parts["qweight"] >> 4 * i & 15 for i in range(8)], -1)
        numbers, zeros = (words[..., [AWQ_ORDER.index(i) for i in range(8)]].flatten(1) for words in (rows, columns))
        group = torch.arange(len(numbers)) // (len(numbers) // len(zeros))
    else:
        rows = torch.stack([parts["qweight"] >> 4 * i & 15 for i in range(8)], 1)
        numbers, zeros, group = rows.flatten(0, 1), (columns.flatten(1) + 1) % 16, parts["g_idx"]
    return ((numbers - zeros[group]) * parts["scales"].float()[group]).T


WRITERS: dict[str, Callable[[Tensor], Parts]] = {
    "fp8": fp8,
    "fp8-ue8m0": fp8_with_exponents,
    "mxfp8": mxfp8,
    "awq": awq,
    "gptq": gptq,
    **{name: compressed(format, **arguments) for name, (format, arguments) in COMPRESSED.items()},
}


def settings(name: str, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a format; `ignore` are names of linear layers that are not converted."""
    if name in ("fp8", "fp8-ue8m0", "mxfp8"):
        method, _, scale_fmt = name.partition("-")
        block = [1, 16] if name == "mxfp8" else [16, 16]
        fixed = {"quant_method": method, "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block}
        return {**fixed, **({"scale_fmt": scale_fmt} if scale_fmt else {}), "modules_to_not_convert": ignore}
    if name == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head", *ignore]}
    four = {"bits": 4, "group_size": 16}
    if name == "awq":
        return {"quant_method": "awq", "version": "gemm", "zero_point": True, **four, "modules_to_not_convert": ignore}
    if name == "gptq":
        dynamic = {"-:" + layer.replace(".", r"\."): {} for layer in ignore}
        return {"quant_method": "gptq", "desc_act": False, "sym": False, **four, "dynamic": dynamic}
    format, arguments = COMPRESSED[name]
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def quantise(folder: Path, name: str, skipped: Callable[[str], bool] = lambda layer: False) -> None:
    """Rewrite a checkpoint of one file in a format: all linear layers but routers, the head and those `skipped`."""
    state = load_file(folder / "model.safetensors")
    written, ignore = {}, []
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if name == "mxfp4":
            experts = key.endswith(("gate_up_proj", "down_proj"))
            written |= {key + end: part for end, part in mxfp4(tensor).items()} if experts else {key: tensor}
        elif not key.endswith(".weight") or tensor.ndim != 2 or "embed" in key:
            written[key] = tensor
        elif layer.endswith(("gate", "lm_head")) or skipped(layer):
            written[key] = tensor
            ignore.append(layer)
        else:
            written |= {f"{layer}.{part}": value.contiguous() for part, value in WRITERS[name](tensor).items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings(name, ignore)}))
