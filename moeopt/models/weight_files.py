"""Which files of a folder hold a checkpoint's weights, as transformers chooses among them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moeopt.errors import ModelError

INDEX = "model.safetensors.index.json"
FORMS = (("model.safetensors", INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""A single file and, where there is none, the index of several; in the order in which transformers looks for them."""


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, whether they exist or not, and the name of the file of every tensor by an index.

    Every index in the folder is checked, also one that is not used. Both are empty where there are no weights.

    Raises:
        ModelError: when an index is not one, or names a file outside of its folder.
    """
    indexes = [file for end in ("safetensors", "bin") for file in sorted(folder.glob(f"*.{end}.index.json"))]
    maps = {index.name: _weight_map(index) for index in indexes}
    for single, index in FORMS:
        if (folder / single).is_file():
            return [folder / single], {}
        if index in maps:
            return sorted({folder / file for file in maps[index].values()}), maps[index]
    return [], {}


def tensor_names(folder: Path) -> list[str]:
    """Names of a checkpoint's tensors, by its index or the header of its file; none where they cannot be told.

    Raises:
        ModelError: as `weight_files`.
    """
    files, named = weight_files(folder)
    if named or len(files) != 1 or files[0].suffix != ".safetensors":
        return list(named)
    try:
        with safe_open(str(files[0]), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []  # loading it says what is wrong


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted({file for file in weight_map.values() if Path(file).name != file or file in ("", "..")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{str(index)!r} is not an index of weight files: {error!r}") from None
    if outside:
        raise ModelError(f"{str(index)!r} names weight files outside of its folder: {', '.join(outside[:5])}")
    return weight_map
