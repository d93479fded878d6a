"""Names for a model: what a study remembers in order to refuse another one."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from moeopt.models.layers import materialised

SAMPLES = 64
VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def describe(model: nn.Module) -> dict[str, str]:
    """A small JSON description: name or path, architecture, hash of the config, fingerprint of the weights."""
    config = getattr(model, "config", None)
    return {
        "name_or_path": str(getattr(config, "_name_or_path", "")),
        "architecture": type(model).__name__,
        "config_hash": config_hash(model),
        "weights": weights_hash(model),
    }


def fingerprint(model: nn.Module) -> str:
    """32 hex digits that change with the model's config, and with nearly every change of its weights.

    Where the model lies, on which devices, and the version of transformers do not matter.
    """
    return hashlib.sha256(f"{config_hash(model)}{weights_hash(model)}".encode()).hexdigest()[:32]


def config_hash(model: nn.Module) -> str:
    """32 hex digits of the model's config, without paths, versions and dtype."""
    config = getattr(model, "config", None)
    fields = config.to_dict() if config is not None else {}
    stable = {name: value for name, value in fields.items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_hash(model: nn.Module) -> str:
    """32 hex digits of name, shape, dtype and 64 evenly spaced values of every parameter.

    Offloaded parameters are read from where they lie, whole.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        digest.update(_sample(materialised(model, name)).numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:32]


def _sample(tensor: Tensor) -> Tensor:
    step = tensor.numel() // SAMPLES | 1  # odd, so that it walks through columns too
    return tensor.reshape(-1)[::step][:SAMPLES].to("cpu", torch.float32)
