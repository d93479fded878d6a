"""How many tokens a forward pass takes: on a CPU 1,024, on an accelerator what a short measurement says."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeopt.evaluation.memory import free_bytes, ran_out
from moeopt.evaluation.runners import LayerMajor, Whole, hidden_dtype
from moeopt.models.devices import is_accelerator
from moeopt.models.layerwise import input_device, runs_on

if TYPE_CHECKING:
    from moeopt.tasks import Request

BATCH_TOKENS = 1024
"""Where nothing is measured: a CPU is not faster with more."""
SIZES = tuple(1024 << i for i in range(6))
"""Tokens a forward pass that are tried."""
NEAR = 0.05
"""The smallest size whose throughput is within so much of the best is taken: it leaves more memory."""
REPEATS = 3
WIDEST = 4096
"""Tokens a row has at most while it is measured."""

_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[object, int]] = weakref.WeakKeyDictionary()


def batch_tokens_for(runner: LayerMajor | Whole, model: nn.Module, requests: Sequence[Request]) -> int:
    """Padded tokens a forward pass for a model that bears no plan: 1,024 on a CPU, else found by `throughputs`.

    What is timed is one decoder layer with experts (a model that runs whole: all of it) on random tokens, in rows as
    long as the requests are on average. It is done, and said in a warning, once for a model and length of rows.
    """
    index = runner.parts.moe[len(runner.parts.moe) // 2] if isinstance(runner, LayerMajor) else None
    device = runs_on(model if index is None else runner.parts.layers[index])  # type: ignore[union-attr]
    if not is_accelerator(device):
        return BATCH_TOKENS
    width = max(1, min(WIDEST, round(sum(len(request.ids) for request in requests) / len(requests))))
    config: Any = model.config
    key = width, str(config._attn_implementation), str(getattr(config, "_experts_implementation", None))
    measured = _MEASURED.setdefault(model, {})
    if key not in measured:
        with ExitStack() as stack:
            run, fits = _timed(runner, model, index, width, device, stack)
            rates = throughputs(run, fits)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        measured[key] = chosen = smallest_near_best(rates)
        told = ", ".join(f"{size:,}: {rate:,.0f} tokens/s" for size, rate in rates.items())
        what = "the whole model" if index is None else "a layer"
        warnings.warn(
            f"batch_tokens is {chosen:,}, the fewest within {NEAR:.0%} of the best that {what} reached on {device} "
            f"({told or 'none fitted into memory'})",
            stacklevel=2,
        )
    return measured[key]


def throughputs(
    run: Callable[[int], int],
    fits: Callable[[int], bool],
    *,
    sizes: Sequence[int] = SIZES,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Tokens a second by tokens a forward pass, for rising sizes up to the first that does not fit.

    Args:
        run: runs about so many tokens, waits for the device, and returns how many they were.
        fits: whether a size is worth trying; asked after the sizes before it ran.
        sizes: rising.
        clock: seconds.
    """
    rates: dict[int, float] = {}
    for size in sizes:
        if not fits(size):
            break
        try:
            run(size)  # kernels are loaded and chosen, and memory is reserved, the first time
            seconds = []
            for _ in range(REPEATS):
                started = clock()
                tokens = run(size)
                seconds.append(clock() - started)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            break
        rates[size] = tokens / max(median(seconds), 1e-9)
    return rates


def smallest_near_best(rates: Mapping[int, float]) -> int:
    """The smallest size whose rate is within `NEAR` of the best; `BATCH_TOKENS` where none fitted."""
    best = max(rates.values(), default=0.0)
    return min((size for size, rate in rates.items() if rate >= (1 - NEAR) * best), default=BATCH_TOKENS)


def _timed(
    runner: LayerMajor | Whole, model: nn.Module, index: int | None, width: int, device: torch.device, stack: ExitStack
) -> tuple[Callable[[int], int], Callable[[int], bool]]:
    """`run` and `fits` for `throughputs`; `stack` holds the layer's weights in place."""
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    begun: dict[int, Callable[[], Tensor]] = {}
    there = None
    if index is not None:
        assert isinstance(runner, LayerMajor)
        there = stack.enter_context(runner.parts.loaded(index))
    peak = [0]

    def begin(size: int) -> Callable[[], Tensor]:
        ids = torch.randint(vocabulary, (max(1, size // width), width), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
        if isinstance(runner, LayerMajor) and index is not None:
            hidden, calls = runner.parts.begin(inputs)
            hidden = hidden.to(device, hidden_dtype(model))
            return lambda: calls[index](runner.parts.layers[index], hidden, there)
        options = {"logits_to_keep": 1} if runner._keeps_logits else {}  # type: ignore[union-attr]
        return lambda: model(**inputs, use_cache=False, **options).logits  # type: ignore[no-any-return]

    def run(size: int) -> int:
        if size not in begun:
            begun.clear()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            peak[0] = -_allocated(device)
            begun[size] = begin(size)
        begun[size]()
        _wait_for(device)
        return max(1, size // width) * width

    def fits(size: int) -> bool:
        """Whether twice what the size before took is less than half of what is free: experts are merged beside it."""
        if device.type != "cuda" or not begun:
            return True
        return 2 * (peak[0] + int(torch.cuda.max_memory_allocated(device))) <= free_bytes(device) // 2

    return run, fits


def _allocated(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def _wait_for(device: torch.device) -> None:
    """Until all that was queued on the device is done."""
    getattr(torch, device.type).synchronize()
