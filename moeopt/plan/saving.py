"""Plan files: safetensors with JSON metadata."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeopt import __version__
from moeopt.errors import PlanError
from moeopt.files import MALFORMED, write_atomically
from moeopt.plan.layer import LayerPlan
from moeopt.showing import line, shown

FORMAT = "moeopt-plan"
FORMAT_VERSION = 2
"""Of files that hold an alias or skip; others are written as version 1."""


def write(layers: Sequence[LayerPlan], path: str | os.PathLike[str]) -> None:
    """Write the layers of a plan; a file of that name is replaced whole."""
    from safetensors.numpy import save

    records, tensors = [], {}
    for i, layer in enumerate(layers):
        kept = list(layer.kept) if layer.kept is not None else None
        records.append(
            {
                "experts": layer.experts,
                "k": layer.k,
                "kept": kept,
                "router": layer.router,
                "negative": layer.negative,
                **({"skip": layer.skip} if layer.skip else {}),
            }
        )
        for name in ("w_em", "w_rm"):
            matrix = getattr(layer, name)
            if matrix is not None:
                tensors[f"layers.{i}.{name}"] = np.ascontiguousarray(matrix)
    version = FORMAT_VERSION if any(x.skip or x.router == "alias" for x in layers) else 1
    metadata = {"format": FORMAT, "version": str(version), "moeopt": __version__, "layers": json.dumps(records)}
    write_atomically(Path(path), save(tensors, metadata=metadata))


def read(path: str | os.PathLike[str]) -> tuple[LayerPlan, ...]:
    """The layers that `write` wrote, if any; raises PlanError as `Plan.load`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise PlanError(f"no plan file at {str(path)!r}")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if re.fullmatch(r"layers\.\d+\.w_(em|rm)", name)}
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
                w_em=tensors.pop(f"layers.{i}.w_em", None),
                w_rm=tensors.pop(f"layers.{i}.w_rm", None),
                router=record["router"],
                negative=record["negative"],
                skip=record.get("skip", 0.0),
            )
            for i, record in enumerate(records)
        )
        placed = sum((p.w_em is not None) + (p.w_rm is not None) for p in layers)
    except PlanError as error:
        raise PlanError(f"{str(path)!r}: {line(str(error), 500)}") from None
    except MALFORMED as error:
        raise PlanError(f"{str(path)!r} has malformed plan metadata: {shown(error)}") from None
    if tensors or placed != len(names):
        unplaced = shown(sorted(tensors or names), 500)
        raise PlanError(f"{str(path)!r} holds tensors that its metadata does not place: {unplaced}")
    return layers
