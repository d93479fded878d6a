"""Devices and types of weights, checked before any weight is read."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from moeopt.errors import ModelError, nearest
from moeopt.showing import first_line

PLACED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps of accelerate that are words."""


def free_bytes(device: torch.device) -> int:
    """Bytes free on a CUDA device, what torch holds in reserve included; elsewhere those of RAM."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    return int(psutil.virtual_memory().available)


def is_cuda(device: torch.device) -> bool:
    """Whether copies can be queued on streams of the device."""
    return device.type == "cuda"


def is_accelerator(device: torch.device) -> bool:
    """Whether kernels are queued on this device, so that launching and waiting for them cost, rather than its caches.

    True of every device but ``"cpu"`` and ``"meta"``.
    """
    return device.type not in ("cpu", "meta")


def check_device_map(device_map: Any) -> None:
    """Raise ModelError for a device map that names something else than devices that are here.

    Args:
        device_map: as for `moeopt.load`; None, a word, a device, or devices by module.
    """
    if device_map is None or device_map in PLACED:
        return
    if not isinstance(device_map, dict):
        check_device(device_map, "device_map", PLACED)
        return
    for module, device in device_map.items():
        if device != "disk":
            check_device(device, f"device_map[{module!r:.80}]", ("disk",))


def check_device(device: Any, what: str, words: tuple[str, ...] = ()) -> None:
    """Raise ModelError unless a device is one of PyTorch's, and here.

    Args:
        device: such as ``"cpu"``, ``"cuda:1"`` or 1.
        what: what to call it.
        words: what else might have been meant.
    """
    try:
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            raise TypeError
        parsed = torch.device(device)
    except (TypeError, RuntimeError):
        hint = nearest(device, [*words, "cpu", "cuda:0", "mps"]) if isinstance(device, str) else ""
        names = ", ".join(map(repr, (*words, "cpu", "cuda:0")))
        raise ModelError(f"{what} must be {names} or another device of PyTorch, got {device!r:.80}{hint}") from None
    if parsed.type == "meta":
        raise ModelError(f"{what} is {device!r}, a device that holds no weights")
    if parsed.type == "cuda":
        count = torch.cuda.device_count()
        if (parsed.index or 0) >= count:
            there = f"there are {count}, cuda:0 to cuda:{count - 1}" if count else "PyTorch sees no CUDA device"
            raise ModelError(f"{what} is {device!r}, and {there}; 'auto' or 'cpu' works here")
        return
    try:
        torch.empty(0, device=parsed)
    except Exception as error:  # each backend raises its own
        raise ModelError(f"{what} is {device!r}, which cannot be used here: {first_line(error):.200}") from None


def check_dtype(dtype: Any) -> None:
    """Raise ModelError unless weights can have this type: ``"auto"``, or a floating one of PyTorch, perhaps by name."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in ("auto", None) or (isinstance(named, torch.dtype) and named.is_floating_point):
        return
    hint = nearest(dtype, ["auto", "float32", "bfloat16", "float16"]) if isinstance(dtype, str) else ""
    raise ModelError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r:.80}{hint}")
