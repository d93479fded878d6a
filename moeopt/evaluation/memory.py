"""How much memory is left, and whether an error says that there was none."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from moeopt.models import MoELayer
from moeopt.plan import Plan

SAID = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def ran_out(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out, on a device or in RAM."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in SAID)


def free_bytes(device: torch.device) -> int:
    """Bytes free on a CUDA device, what torch holds in reserve included; elsewhere those of RAM."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    return int(psutil.virtual_memory().available)


def merged_bytes(layers: Sequence[MoELayer], plan: Plan) -> int:
    """Bytes of the merged experts that a plan needs, all layers together."""
    total = 0
    for layer, part in zip(layers, plan.layers):
        if part.makes_experts:
            whole = sum(p.nbytes for p in layer.experts.parameters(recurse=False))
            total += whole * part.kept_experts // layer.n
    return total
