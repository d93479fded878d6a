"""How much memory is left, and whether an error says that there was none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeopt.models import MoELayer
from moeopt.models.devices import free_bytes as free_bytes
from moeopt.plan import Plan

SAID = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def ran_out(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out, on a device or in RAM."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in SAID)


def merged_bytes(layers: Sequence[MoELayer], plan: Plan) -> int:
    """Bytes of the merged experts that a plan needs, all layers together."""
    total = 0
    for layer, part in zip(layers, plan.layers):
        if part.makes_experts:
            whole = sum(p.nbytes for p in layer.experts.parameters(recurse=False))
            total += whole * part.kept_experts // layer.n
    return total
