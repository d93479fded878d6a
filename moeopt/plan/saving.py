"""Plan files: safetensors with JSON metadata.

Down projections and novices are written in two bytes a number where that loses nothing: as float16, or as uint16 that
are the upper halves of float32, which is bfloat16, a dtype that numpy lacks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moeopt import __version__
from moeopt.errors import PlanError
from moeopt.files import MALFORMED, write_atomically
from moeopt.plan.down import DownProjections
from moeopt.plan.layer import LayerPlan
from moeopt.showing import line, shown

FORMAT = "moeopt-plan"
FORMAT_VERSION = 3
"""Of files that hold down projections, novices, orders of neurons or a merge that is not linear; of those that hold an
alias or skip it is 2, of others 1."""
MATRICES = ("w_em", "w_rm", "neurons")
TENSOR = re.compile(rf"layers\.\d+\.({'|'.join(MATRICES)}|novices|down\.(whole|left|right))")


def write(layers: Sequence[LayerPlan], path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write the layers of a plan, and JSON about it; a file of that name is replaced whole."""
    records, tensors = [], {}
    for i, layer in enumerate(layers):
        records.append(
            {
                "experts": layer.experts,
                "k": layer.k,
                "kept": list(layer.kept) if layer.kept is not None else None,
                "router": layer.router,
                "negative": layer.negative,
                **({"skip": layer.skip} if layer.skip else {}),
                **({"merge": layer.merge} if layer.merge != "linear" else {}),
            }
        )
        for name in MATRICES:
            matrix = getattr(layer, name)
            if matrix is not None:
                tensors[f"layers.{i}.{name}"] = np.ascontiguousarray(matrix)
        for name, array in _numbers(layer).items():
            tensors[f"layers.{i}.{name}"] = _narrow(array)
    version = 2 if any(x.skip or x.router == "alias" for x in layers) else 1
    version = FORMAT_VERSION if any(x.beyond_matrices for x in layers) else version
    metadata = {"format": FORMAT, "version": str(version), "moeopt": __version__, "layers": json.dumps(records)}
    if about:
        metadata["about"] = json.dumps(about)
    write_atomically(Path(path), save(tensors, metadata=metadata))


def about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write` was told about a plan; empty where that was nothing."""
    try:
        with safe_open(str(path), framework="np") as file:
            text = (file.metadata() or {}).get("about", "{}")
        value = json.loads(text)
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise PlanError(f"what {str(path)!r} says about its plan cannot be read ({line(str(error), 500)})") from None
    if not isinstance(value, dict):
        raise PlanError(f"what {str(path)!r} says about its plan must be a JSON object, got {shown(value)}")
    return value


def read(path: str | os.PathLike[str]) -> tuple[LayerPlan, ...]:
    """The layers that `write` wrote, if any; raises PlanError as `Plan.load`."""
    if not Path(path).is_file():
        raise PlanError(f"no plan file at {str(path)!r}")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if TENSOR.fullmatch(name)}
    except (SafetensorError, OSError, *MALFORMED) as error:
        reason = line(str(error), 500)
        raise PlanError(f"{str(path)!r} is not a plan: it cannot be read as a safetensors file ({reason})") from None
    if metadata.get("format") != FORMAT:
        raise PlanError(f"{str(path)!r} is a safetensors file, but not a moeopt plan")
    if metadata.get("version") not in {str(version) for version in range(1, FORMAT_VERSION + 1)}:
        by = f"was written by moeopt {shown(metadata['moeopt'])}, it " if "moeopt" in metadata else ""
        raise PlanError(
            f"{str(path)!r} {by}has plan format version {shown(metadata.get('version'))}; this is moeopt "
            f"{__version__}, which reads 1 to {FORMAT_VERSION}"
        )
    try:
        records = json.loads(metadata["layers"])
        layers = tuple(
            LayerPlan(
                experts=record["experts"],
                k=record["k"],
                kept=None if record["kept"] is None else tuple(record["kept"]),
                **{name: tensors.pop(f"layers.{i}.{name}", None) for name in MATRICES},
                router=record["router"],
                negative=record["negative"],
                skip=record.get("skip", 0.0),
                down=_down(tensors, f"layers.{i}.down."),
                merge=record.get("merge", "linear"),
                novices=_taken(tensors, f"layers.{i}.novices"),
            )
            for i, record in enumerate(records)
        )
        matrices = sum(getattr(p, name) is not None for p in layers for name in MATRICES)
        placed = matrices + sum(len(_numbers(p)) for p in layers)
    except PlanError as error:
        raise PlanError(f"{str(path)!r}: {line(str(error), 500)}") from None
    except MALFORMED as error:
        raise PlanError(f"{str(path)!r} has malformed plan metadata: {shown(error)}") from None
    if tensors or placed != len(names):
        unplaced = shown(sorted(tensors or names), 500)
        raise PlanError(f"{str(path)!r} holds tensors that its metadata does not place: {unplaced}")
    return layers


def _numbers(layer: LayerPlan) -> dict[str, NDArray[np.float32]]:
    """Down projections and novices, by the name that they have in a file."""
    down = {} if layer.down is None else layer.down.arrays
    arrays = {**{f"down.{name}": array for name, array in down.items()}, "novices": layer.novices}
    return {name: array for name, array in arrays.items() if array is not None}


def _down(tensors: dict[str, NDArray[Any]], prefix: str) -> DownProjections | None:
    arrays = {name: _taken(tensors, prefix + name) for name in ("whole", "left", "right")}
    return DownProjections(**arrays) if any(array is not None for array in arrays.values()) else None


def _taken(tensors: dict[str, NDArray[Any]], name: str) -> NDArray[np.float32] | None:
    """What `_narrow` made of an array, wide again, and out of `tensors`; None where there is none."""
    return _wide(tensors.pop(name)) if name in tensors else None


def _narrow(array: NDArray[np.float32]) -> NDArray[Any]:
    # bits rather than values, so that -0.0 survives; bfloat16 first, as most models are
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        half = array.astype("<f2")
    return half if (half.astype(np.float32) == array).all() else np.ascontiguousarray(array)


def _wide(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype == np.uint16:
        return (array.astype("<u4") << 16).view("<f4")
    return array.astype(np.float32)
