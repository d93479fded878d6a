"""What is measured on one model in this process: speed, peak memory, how tokens spread over experts."""

from __future__ import annotations

import ctypes
import gc
import inspect
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from moeopt.errors import ModelError
from moeopt.models import MoELayer

WARM_UP = 8
"""Tokens of the short run before a timed one."""
SAMPLE_EVERY = 0.002
"""Seconds between looks at the memory of this process."""


@torch.inference_mode()
def seconds(model: Any, ids: Tensor, new: int) -> tuple[float, float]:
    """Wall time of one forward pass over (batch, length) prompts that fills the KV cache, and of `new` greedy steps.

    The token that prefill gives is not counted: each step runs (batch, 1) tokens on the cache.

    Raises:
        ModelError: when the model returns no cache.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    synchronise(model)
    started = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, **last)
    token = output.logits[:, -1:].argmax(-1).to(ids.device)
    synchronise(model)
    filled = time.perf_counter()
    for _ in range(new):
        if output.past_key_values is None:
            raise ModelError(f"{type(model).__name__} returns no KV cache, so decoding with one cannot be timed")
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1).to(ids.device)
    synchronise(model)
    return filled - started, time.perf_counter() - filled


def warm_up(model: Any, ids: Tensor) -> None:
    """A short run, so that what a model computes once (merged experts, kernels) is not timed."""
    seconds(model, ids[:, :WARM_UP], 2)


def synchronise(model: nn.Module) -> None:
    """Wait for whatever the model's devices still compute."""
    for device in accelerators(model):
        torch.accelerator.synchronize(device)


def accelerators(model: nn.Module) -> list[torch.device]:
    """The devices that hold parameters, but the CPU; offloaded ones come to the device of the others."""
    return sorted({p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}, key=str)


def settled_bytes() -> int:
    """Bytes of RAM that this process holds alone, once it gave back what it no longer uses."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # where the C library is not glibc, which keeps much
        ctypes.CDLL(None).malloc_trim(0)
    return _private_bytes()


def _private_bytes() -> int:
    """Resident bytes but those of mapped files: the system drops these as it likes, and a read checkpoint is one."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


@dataclass
class Peak:
    """What `peak_memory` yields; `bytes` is set when the context closes."""

    bytes: int = 0


@contextmanager
def peak_memory(model: nn.Module, before: int) -> Iterator[Peak]:
    """The peak of a model's memory while the context is open, weights included.

    With a CUDA device it is what torch allocated at most, on all devices together. Without, it is the most of its own
    memory that this process was seen to hold, every 2 ms, less `before`: its `settled_bytes` before the model was
    loaded.
    """
    peak = Peak()
    devices = [device for device in accelerators(model) if device.type == "cuda"]
    settled_bytes()
    if devices:
        torch.cuda.empty_cache()
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        yield peak
        synchronise(model)
        peak.bytes = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        return
    seen, done = [_private_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_EVERY):
            seen[0] = max(seen[0], _private_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
    peak.bytes = max(seen[0], _private_bytes()) - before


@torch.inference_mode()
def expert_loads(model: Any, layers: Sequence[MoELayer], batches: Iterable[Tensor]) -> list[tuple[list[int], int]]:
    """For each layer, how many tokens each of its n experts ran for, and the tokens that its router saw.

    Experts of weight 0, which a token skips, and a checkpoint's novices do not count. Experts have the numbers that the
    router gives: under a plan that keeps experts, those of the full model.

    Args:
        batches: token ids, (batch, length) each, run one after another.
    """
    counts = [torch.zeros(layer.n, dtype=torch.int64) for layer in layers]
    seen = [0] * len(layers)

    def note(position: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, index = output
            ran = index[weights != 0].flatten().cpu()
            ran = ran[ran < len(counts[position])]  # a checkpoint's novices have the numbers behind its experts'
            counts[position] += torch.bincount(ran, minlength=len(counts[position]))
            seen[position] += len(index)

        return hook

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.router.register_forward_hook(note(i)).remove)
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    return [(count.tolist(), tokens) for count, tokens in zip(counts, seen)]
