"""Numbers of a config that no checkpoint has: refused before anything of that size is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from moeopt.errors import ModelError
from moeopt.models.weight_files import tensor_names, weight_files
from moeopt.plan.checks import MOST_EXPERTS

MOST_LAYERS = 4096
COUNTS = (
    (re.compile(r"(layers?|blocks?|depths?)$"), MOST_LAYERS),
    (re.compile(r"experts$"), MOST_EXPERTS),
    (re.compile(r"(labels|heads|groups?|modules|codebooks)$"), 1 << 16),
)
"""By the end of its key, what a whole number may be at most: a config makes a list or a module for each."""
LAYERS = re.compile(r"(num_)?(hidden_)?layers|n_layers?")
"""Keys of the number of layers of the model itself."""


def check_counts(config: dict[str, Any], folder: Path) -> None:
    """Raise ModelError for a number of layers, experts or the like that would take forever to build.

    Args:
        config: what config.json holds.
        folder: the checkpoint's, whose tensors limit the number of layers, where it is here and they can be counted.
    """
    tensors = len(tensor_names(folder)) if folder.is_dir() else 0
    for path, value in _numbers(config):
        key = path.rpartition(".")[2]
        most = next((most for pattern, most in COUNTS if pattern.search(key)), None)
        if most is not None and value > most:
            raise ModelError(f"its config.json says {path} = {value}, and moeopt takes at most {most}")
        if tensors and value > tensors and LAYERS.fullmatch(path.removeprefix("text_config.")):
            raise ModelError(f"its config.json says {path} = {value}, and it holds {tensors} tensors")


def check_size(model: nn.Module, folder: Path) -> None:
    """Raise ModelError where a checkpoint's files are too small to hold the model that its config describes.

    Args:
        model: on the meta device.
        folder: the checkpoint's; nothing is checked where it has no weights, or is not here.
    """
    files = [file for file in weight_files(folder)[0] if file.is_file()] if folder.is_dir() else []
    bits = 8 * sum(file.stat().st_size for file in files)
    parameters = sum(p.numel() for p in model.parameters())
    if files and parameters > bits:
        raise ModelError(
            f"the weights of {str(folder)!r} cannot be loaded: by config.json they are {parameters} parameters, and "
            f"the files hold {bits // 8} bytes"
        )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers by their path in nested objects, such as text_config.num_hidden_layers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
