"""Solution files released with EEP (arXiv 2407.00945); see `Plan.from_eep`."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.errors import PlanError
from moeopt.plan.checks import MOST_EXPERTS
from moeopt.plan.layer import LayerPlan
from moeopt.showing import first_line, line, shown


def read(path: str | os.PathLike[str], n_layers: int, k: int | None) -> list[LayerPlan]:
    """The layers of a solution file; raises PlanError as `Plan.from_eep`."""
    return _placed(_read_pth(path), str(path), n_layers, k)


def _read_pth(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not Path(path).is_file():
        raise PlanError(f"no EEP solution file at {str(path)!r}")
    import torch

    try:
        data = io.BytesIO(Path(path).read_bytes())
        if zipfile.is_zipfile(data) and any(part.compress_type for part in zipfile.ZipFile(data).infolist()):
            raise ValueError("it is compressed, as torch never writes one")
        data.seek(0)
        content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = line(first_line(error), 500)
        raise PlanError(f"{str(path)!r} cannot be read as a weights-only .pth file: {reason}") from None
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise PlanError(f"{str(path)!r} must hold a dictionary of tensors, got {type(content).__name__}")
    matrices = {}
    for name, tensor in content.items():
        shape = tuple(tensor.shape)
        if len(shape) != 2 or max(shape) > MOST_EXPERTS or tensor.is_complex():
            raise PlanError(
                f"{str(path)!r}: {shown(name)} must be an (r, n) matrix of real numbers, got shape {shown(shape)} of "
                f"{tensor.dtype}"
            )
        try:
            matrices[str(name)] = tensor.detach().float().numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised, without data
            raise PlanError(f"{str(path)!r}: {shown(name)} is no ordinary tensor: {line(str(error))}") from None
    return matrices


def _placed(content: Mapping[str, Any], path: str, n_layers: int, k: int | None) -> list[LayerPlan]:
    placed: dict[str, dict[int, str]] = {"layers": {}, "transfer": {}}
    defaults = {"layers": "others", "transfer": "others_transfer"}
    strangers = []
    for key in content:
        if key in defaults.values():
            continue
        match = re.fullmatch(r"(layers|transfer)\.(?:(\d{1,9})|\[(\d{1,9})-(\d{1,9})\])", key)
        first, last = (int(match[2] or match[3]), int(match[2] or match[4])) if match else (0, -1)
        if match is None or not first <= last < n_layers:
            strangers.append(key)
            continue
        for i in range(first, last + 1):
            if i in placed[match[1]]:
                raise PlanError(f"{path!r} gives layer {i} two matrices: {placed[match[1]][i]!r} and {key!r}")
            placed[match[1]][i] = key
    if strangers:
        named = line(", ".join(strangers[:9]), 500)
        raise PlanError(f"{path!r} has keys that name no layer of a {n_layers}-layer model: {named}")
    layers = []
    for i in range(n_layers):
        keys = {kind: placed[kind].get(i, default) for kind, default in defaults.items()}
        missing = [key for key in keys.values() if key not in content]
        if missing:
            raise PlanError(f"{path!r} has no matrix for layer {i}: neither its own key nor {' or '.join(missing)!r}")
        w_em, w_rm = content[keys["layers"]], content[keys["transfer"]]
        active = min(2, w_em.shape[0]) if k is None else k
        try:
            layers.append(LayerPlan(w_em.shape[1], active, w_em=w_em, w_rm=w_rm, router="prob", negative="eep"))
        except PlanError as error:
            where = f"{path!r}, layer {i} ({keys['layers']!r}, {keys['transfer']!r})"
            raise PlanError(f"{where}: {line(str(error), 500)}") from None
    return layers
