"""Time and peak memory of applying a plan, against one forward pass of the same model.

    python benchmarks/apply_plan.py MODEL [--tokens 1536] [--keep 4] [--repeats 5]

Medians of paired runs in one process. "apply" is entering and leaving `moeopt.patched` and everything a plan adds to
the forward inside; merging is done anew each time, as for a trial whose every layer changed.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt.models import MergedCache
from moeopt.plan import LayerPlan, Plan


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, _ = moeopt.load(args.model)
    shape = moeopt.shape_of(model)
    rng = np.random.default_rng(0)
    rows = [sorted(rng.permutation(shape.experts)[: args.keep].tolist()) for _ in range(shape.layers)]
    pruned = Plan.one_hot(rows, experts=shape.experts, k=shape.k)
    noise = rng.normal(0, 0.065, (shape.layers, 2, args.keep, shape.experts))
    merged = Plan(
        tuple(
            LayerPlan(shape.experts, shape.k, w_em=layer.expert_matrix + w, w_rm=layer.router_matrix + m, router="prob")
            for layer, (w, m) in zip(pruned.layers, noise)
        )
    )
    ids = torch.randint(
        0, model.config.vocab_size, (args.tokens // 256, 256), generator=torch.Generator().manual_seed(0)
    )
    cache = MergedCache()
    cases: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "full model": nullcontext,
        f"one-hot, {args.keep} of {shape.experts}": lambda: moeopt.patched(model, pruned),
        "dense, merged anew": lambda: moeopt.patched(model, merged),
        "dense, merged before": lambda: moeopt.patched(model, merged, cache=cache),
        "dense, scratch": lambda: moeopt.patched(model, merged, storage="scratch"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        for name, context in cases.items():
            with Peak() as peak:
                started = time.perf_counter()
                with torch.inference_mode(), context():
                    model(input_ids=ids, logits_to_keep=1)
                elapsed = time.perf_counter() - started
            if repeat:
                seconds[name].append(elapsed)
                memory[name] = max(memory.get(name, 0.0), peak.mib)
    table = Table(title=f"{ids.numel()} tokens, {shape.layers} layers, median of {args.repeats}")
    for column in ("", "seconds", "over the full forward", "peak memory above the start, MiB"):
        table.add_column(column)
    bare = seconds["full model"]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, bare))
        table.add_row(name, f"{statistics.median(times):.3f}", f"{ratio:.3f}", f"{memory[name]:.0f}")
    Console().print(table)


class Peak:
    """The largest resident memory of this process inside the context, above that at its start."""

    def __enter__(self) -> Peak:
        self._process = psutil.Process()
        self._start = self._largest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._largest = max(self._largest, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = (self._largest - self._start) / 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
