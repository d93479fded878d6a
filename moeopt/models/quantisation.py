"""Loading quantised checkpoints: transformers dequantises those that it can, the others are refused before any work."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig

from moeopt.errors import ModelError
from moeopt.models.weight_files import tensor_names

DEQUANTISING = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""By quantisation method, the class of transformers whose `dequantize` makes floats of the weights as they load."""
NO_EXPERTS = ("awq", "gptq", "auto-round")
"""Methods whose experts transformers has no modules for."""
SCALES = re.compile(
    r"(_scale_inv|weight_scale|weight_packed|weight_zero_point|g_idx|qweight|qzeros|_blocks|_scales|absmax)$"
)
"""Ends of names of tensors without which a weight is not what it was."""
UNREAD_FP8 = re.compile(r"\.experts\.(\w+_scale_inv|.*\.weight_scale)$")
"""Scales of FP8 experts that transformers 5.23 does not read: of all in one tensor, or by another name."""


@dataclass(frozen=True)
class StoredQuantised:
    """How a checkpoint is quantised.

    Args:
        source: its name.
        method: by which, such as ``"fp8"``; None: it is not.
        settings: the `quantization_config` of its config.json.
    """

    source: str
    method: str | None
    settings: dict[str, Any]

    @classmethod
    def read(cls, source: Any, **hub: Any) -> StoredQuantised:
        """That of a checkpoint which `moeopt.models.gate.admit` let pass."""
        config = PreTrainedConfig.get_config_dict(source, **hub)[0]
        for part in (config, config.get("text_config")):
            settings = part.get("quantization_config") if isinstance(part, dict) else None
            if isinstance(settings, dict) and settings:
                return cls(str(source), str(settings.get("quant_method")), settings)
        return cls(str(source), None, {})

    @property
    def _names(self) -> list[str]:
        """Names of its tensors, where it is a folder here."""
        folder = Path(self.source).expanduser()
        return tensor_names(folder) if folder.is_dir() else []

    def dequantising(self, is_dense: Callable[[], bool]) -> Any:
        """What makes transformers dequantise it as it loads, as `quantization_config`; None: nothing to do.

        Args:
            is_dense: tells whether the model has no experts; asked only where those could not be loaded.

        Raises:
            ModelError: when it has experts that transformers cannot load, or a package is missing.
        """
        reason = None
        if self.method in NO_EXPERTS:
            reason = "transformers has no experts to load such weights into"
        elif self.method == "compressed-tensors":
            reason = why_not_compressed(self.settings)
        elif self.method == "fp8" and (names := [name for name in self._names if UNREAD_FP8.search(name)]):
            reason = f"transformers does not read scales such as {names[0]!r}"
        if reason is not None and not is_dense():
            raise ModelError(
                f"{self.source!r} is quantised by {self.method}, and {reason}: search on the unquantised checkpoint, "
                "or one in FP8, and export the plan from this one: moeopt.export(plan, folder, model=...)"
            )
        name = DEQUANTISING.get(self.method or "")
        try:
            return None if name is None else getattr(transformers, name)(dequantize=True)
        except ImportError as error:
            raise ModelError(f"{self.source!r} is quantised by {self.method}: {error}") from None

    def say_dequantised(self, model: Any) -> None:
        """Warn that weights take more memory than the files say."""
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        dtype = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"{self.source!r} is quantised by {self.method}; its weights were dequantised to {dtype} and take "
            f"{size:.2f} GiB in memory: sizes and speeds are those of {dtype}. A plan that keeps experts is exported "
            "in the checkpoint's own form",
            stacklevel=4,
        )

    def say_partly_quantised(self, model: Any) -> None:
        """Warn where a model was quantised as it loaded, and its experts were not."""
        experts = {
            module: None for m in model.modules() if isinstance(module := getattr(m, "experts", None), nn.Module)
        }
        floats = [p for module in experts for p in module.parameters() if p.ndim > 2 and p.is_floating_point()]
        size = sum(p.numel() * p.element_size() for p in floats if p.dtype.itemsize > 1) / 2**30
        if self.method is None and size:
            warnings.warn(
                f"{self.source!r} was quantised as it was loaded, but for its experts, which transformers has no "
                f"quantised form for: they take {size:.2f} GiB. An export is of the checkpoint as it is stored",
                stacklevel=4,
            )

    def check_scales(self, model: nn.Module, unexpected: Iterable[str]) -> None:
        """Raise ModelError where a module was loaded without scales that the checkpoint has for it."""
        modules = {name for name, _ in model.named_modules()} if self.method else set()
        for name in sorted(unexpected):
            owner = re.sub(r"\.experts\.\d+\..*", ".experts", name.rpartition(".")[0])
            if owner in modules and SCALES.search(name):
                raise ModelError(
                    f"transformers loads {self.source!r} without its tensor {name!r}, so that weights would be wrong: "
                    "search on the unquantised checkpoint and export its plan from this one"
                )


def why_not_compressed(settings: dict[str, Any]) -> str | None:
    """Why experts of compressed-tensors are not those of the checkpoint once transformers has loaded them.

    By trial of 5.23, which gives NVFP4 experts other numbers and says nothing: what was not seen to be right is not
    loaded.
    """
    if "dequantize" not in inspect.signature(transformers.CompressedTensorsConfig).parameters:
        return f"transformers {transformers.__version__} does not dequantise such experts, as 5.23 does"
    schemes: dict[bool, list[Any]] = {True: [], False: []}
    for group in (settings.get("config_groups") or {}).values():
        weights, stored_as = group.get("weights") or {}, group.get("format") or settings.get("format")
        kind = weights.get("type"), weights.get("num_bits"), stored_as
        if kind[0] == "int" and stored_as == "pack-quantized":
            if not weights.get("symmetric", True):
                return "transformers does not read the zero points of experts (symmetric: false)"
            if weights.get("actorder") not in (None, False, "static", "weight"):
                return f"transformers does not read the order of experts' columns (actorder: {weights['actorder']})"
        elif kind == ("float", 8, "float-quantized"):
            if weights.get("strategy") not in ("channel", "tensor"):
                return f"transformers does not read scales of experts by {weights.get('strategy')}"
        elif kind != ("float", 4, "mxfp4-pack-quantized"):
            return f"transformers does not read experts stored as {stored_as}"
        of_experts = any("experts" in str(target) for target in group.get("targets") or [])
        schemes[of_experts].append((weights, stored_as))
    if any(scheme != same[0] for same in schemes.values() for scheme in same):
        return "transformers reads experts of one scheme only, and config_groups has several"
    return None
