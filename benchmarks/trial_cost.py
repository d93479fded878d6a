"""What a trial costs, over the bare forward of a stock checkpoint with r experts a layer on the same tokens.

    python benchmarks/trial_cost.py MODEL --data FILES [--tokens 1536 16384] [--keep 4] [--repeats 3] [--threads 1]

The bare forward is the exported pruning, reloaded by transformers: all batches, all logits, nothing scored. A trial is
`Evaluator.evaluate` of a plan that is new to it, scoring included. Cases run in turn, `--repeats` times; the table has
medians and the median of the paired ratios. Peers: EEP's released procedure (every new expert summed up in Python loops
over copies on the CPU, then the whole state dict loaded into the small model, then the forward), written anew from its
description; and the limits of the machine, measured in the same run: the forward's multiplications at the speed of a
large matrix product, the merge's bytes at the speed of a copy. `--profile` adds what an average trial, one that changes
a merged plan from the middle layer on, spends its time on. `--cpu-time` counts the process's CPU seconds instead of
those on the wall, for one thread on a machine that others use.

Measured on SmolMoE (30 layers, bf16, r = 4 of 8), one thread, `--cpu-time`, over the bare forward. The first column is
one repeat on a quiet machine, the others two repeats while two other jobs ran, which raises what waits for memory:

| | 16,285 tokens (31.9 s) | 16,285 (53.4 s) | 1,530 (5.4 s) |
|---|---|---|---|
| one-hot | 1.015 | 1.07 | 1.05 |
| dense, every layer merged anew | 0.991 | 1.05 | 1.14 |
| lazy, a quarter of the layers changed | 0.989 | 1.02 | 1.01 |
| scratch | 0.996 | 1.04 | 1.05 |
| first changed layer 7, 15, 22, 29 | 0.80, 0.56, 0.34, 0.15 | 0.85, 0.60, 0.38, 0.16 | 0.79, 0.55, 0.36, 0.15 |
| EEP's released procedure | 1.009 (+742 MiB) | 1.10 (+747 MiB) | 1.69 (+970 MiB) |
| limit: the forward at a large product's speed | 0.55 | 0.66 | 0.59 |
| limit: merging at a copy's bandwidth | 0.002 | 0.001 | 0.013 |

Of the goals at 16k tokens, dense 1.03 and scratch 1.05 are met on a quiet machine (1.05 and 1.04 on a busy one, whose
repeats differ by as much); one-hot 1.00 is missed by 0.015 to 0.07: the log-softmax, which the bare forward does not
do, and smaller batches in cache. Peak memory above the start, activations of all batches included, was 48 to 72 MiB for
scratch, less than the bare forward's 96; a layer of merged experts is 20 MiB, and a test holds scratch to one such.
What an average trial, dense from the middle layer on, spends its time on: matrix products 75 % (experts, projections,
head), attention 9 %, the elementwise product and silu of the experts 5 %; log-softmax 2 %, merging's copies 1.5 %.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import moeopt
from moeopt.evaluation import Evaluator
from moeopt.plan import LayerPlan, Plan

DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Where the plan of a prefix trial first differs, as a share of the layers; 1 is the last layer."""


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = moeopt.load(args.model)
    task = moeopt.tasks.get("text", data=args.data, window=args.window, fractions=(1.0, 0.0, 0.0))
    shape = moeopt.shape_of(model)
    rng = np.random.default_rng(0)
    rows = [sorted(rng.permutation(shape.experts)[: args.keep].tolist()) for _ in range(shape.layers)]
    pruned = Plan.one_hot(rows, experts=shape.experts, k=shape.k)
    with tempfile.TemporaryDirectory() as folder:
        small = AutoModelForCausalLM.from_pretrained(moeopt.export(pruned, Path(folder) / "small", model=model)).eval()
    small.set_experts_implementation(model.config._experts_implementation)
    console = Console(width=130)
    if args.cpu_time:
        Case.clock = staticmethod(time.process_time)
    for tokens in args.tokens:
        console.print(measure(model, tokenizer, task, small, pruned, tokens, args.repeats))
        if args.profile:
            limit = -(-tokens // args.window)
            console.print(profiled(Evaluator(model, tokenizer, task, limit=limit), pruned))


def profiled(evaluator: Evaluator, pruned: Plan) -> Table:
    """The operators that an average trial spends its time in, by torch's profiler."""
    dense = Dense(pruned)
    evaluator.evaluate(dense.last)
    plan = dense.changed(from_layer=len(pruned.layers) // 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        evaluator.evaluate(plan)
    rows = sorted(profiler.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    total = sum(row.self_cpu_time_total for row in rows)
    table = Table(title=f"{evaluator.tokens} tokens: a dense plan new from layer {len(pruned.layers) // 2} on")
    for column in ("operator", "calls", "seconds", "%"):
        table.add_column(column)
    for row in rows[:8]:
        seconds, share = row.self_cpu_time_total / 1e6, row.self_cpu_time_total / total
        table.add_row(row.key, str(row.count), f"{seconds:.3f}", f"{100 * share:.1f}")
    return table


def measure(model: Any, tokenizer: Any, task: Any, small: Any, pruned: Plan, tokens: int, repeats: int) -> Table:
    def evaluator(**options: Any) -> Evaluator:
        limit = -(-tokens // task.window)
        return Evaluator(model, tokenizer, task, limit=limit, **options)

    plain, scratch = evaluator(prefix_memory=0), evaluator(prefix_memory=0, merged_weights="scratch")
    reusing = evaluator(prefix_memory=4 << 30)
    dense = Dense(pruned)
    layers = len(pruned.layers)
    batches = [batch.inputs(torch.device("cpu"), model.dtype) for batch in plain.batches]

    def bare() -> None:
        with torch.inference_mode():
            for inputs in batches:
                small(**inputs, use_cache=False)

    released = EEPReleased(model, small)

    def eep() -> None:
        released.load(dense.new())
        bare()

    cases: dict[str, Case] = {
        "bare forward, stock r experts": Case(bare),
        "one-hot": Case(lambda: plain.evaluate(pruned)),
        "dense, every layer merged anew": Case(lambda: plain.evaluate(dense.new())),
        "lazy: dense, a quarter of the layers changed": Case(
            lambda: plain.evaluate(dense.changed(from_layer=layers - layers // 4)), lambda: plain.evaluate(dense.last)
        ),
        "scratch: dense, one layer merged at a time": Case(lambda: scratch.evaluate(dense.new())),
    }
    for depth in DEPTHS:
        first = min(layers - 1, int(depth * layers))
        cases[f"prefix: dense, first changed layer {first} of {layers}"] = Case(
            lambda first=first: reusing.evaluate(dense.changed(from_layer=first, width=1)),  # type: ignore[misc]
            lambda: reusing.evaluate(dense.last),
        )
    cases["EEP's released procedure"] = Case(eep)

    for _ in range(repeats + 1):
        for case in cases.values():
            case.run()
    bare_times = cases["bare forward, stock r experts"].seconds[1:]
    one_layer = sum(p.nbytes for p in moeopt.moe_layers(model)[0].experts.parameters()) * pruned.layers[0].kept_experts
    one_layer //= pruned.layers[0].experts
    table = Table(
        title=f"{plain.tokens} tokens, {layers} layers, median of {repeats}; {torch.get_num_threads()} threads"
    )
    for column in ("", "seconds", "over the bare forward (range)", "peak memory above the start, MiB"):
        table.add_column(column)
    for name, case in cases.items():
        times = case.seconds[1:]
        ratios = [a / b for a, b in zip(times, bare_times)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        table.add_row(name, f"{statistics.median(times):.3f}", ratio, f"{max(case.peaks[1:]):.0f}")
    flops, speed = forward_flops(small, plain.tokens, task.window), gemm_peak(model.dtype)
    merged, bandwidth = merge_bytes(model, pruned), copy_bandwidth()
    bare_time = statistics.median(bare_times)
    for name, limit in (
        (f"limit: {flops / 1e12:.2f} TFLOP at a large product's {speed / 1e9:.0f} GFLOP/s", flops / speed),
        (f"limit of merging: {merged / 2**20:.0f} MiB at a copy's {bandwidth / 2**30:.1f} GiB/s", merged / bandwidth),
    ):
        table.add_row(name, f"{limit:.3f}", f"{limit / bare_time:.3f}", "")
    table.add_row("one layer of merged experts", "", "", f"{one_layer / 2**20:.0f}")
    return table


class Case:
    """Something to time, with its preparation, which is not timed."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, act: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> None:
        self.act, self.prepare = act, prepare
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def run(self) -> None:
        self.prepare()
        gc.collect()
        with Peak() as peak:
            started = self.clock()
            self.act()
            self.seconds.append(self.clock() - started)
        self.peaks.append(peak.mib)


class Dense:
    """Merged plans around a pruning: entries with noise of EEP's scale, 0.065."""

    def __init__(self, pruned: Plan) -> None:
        self.pruned, self.rng = pruned, np.random.default_rng(1)
        self.last = pruned
        self.new()

    def new(self) -> Plan:
        return self.changed(from_layer=0)

    def changed(self, from_layer: int, width: int | None = None) -> Plan:
        """The plan before, with new noise in `width` layers from `from_layer` on."""
        end = len(self.pruned.layers) if width is None else from_layer + width
        pairs = enumerate(zip(self.last.layers, self.pruned.layers))
        self.last = Plan(tuple(self._noisy(base) if from_layer <= i < end else old for i, (old, base) in pairs))
        return self.last

    def _noisy(self, base: LayerPlan) -> LayerPlan:
        w_em, w_rm = (
            m + self.rng.normal(0, 0.065, m.shape).astype(np.float32) for m in (base.expert_matrix, base.router_matrix)
        )
        return LayerPlan(base.experts, base.k, w_em=w_em, w_rm=w_rm, router="prob")


class EEPReleased:
    """A plan's experts as EEP's released code makes them; the router keeps the pruning's rows, which costs the same."""

    def __init__(self, model: Any, small: Any) -> None:
        self.small = small
        self.experts = [
            {name: [t.clone() for t in p.detach().cpu()] for name, p in layer.experts.named_parameters()}
            for layer in moeopt.moe_layers(model)
        ]
        self.names = [layer.name for layer in moeopt.moe_layers(model)]

    def load(self, plan: Plan) -> None:
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.small.state_dict().items()}
        for prefix, tensors, layer in zip(self.names, self.experts, plan.layers):
            for name, sources in tensors.items():
                merged: list[Tensor] = []
                for row in layer.expert_matrix:
                    total = torch.zeros_like(sources[0])
                    for weight, source in zip(row.tolist(), sources):
                        total += weight * source
                    merged.append(total)
                state[f"{prefix}.experts.{name}"] = torch.stack(merged)
        self.small.load_state_dict(state)


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
        while not self._done.wait(0.005):
            self._largest = max(self._largest, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = (self._largest - self._start) / 2**20


def forward_flops(model: Any, tokens: int, window: int) -> float:
    """Multiplications and additions of a forward: two a weight and token, k of r experts, attention over the window."""
    layers = moeopt.moe_layers(model)
    experts = sum(p.numel() * layer.k / layer.n for layer in layers for p in layer.experts.parameters())
    whole = sum(p.numel() for p in model.parameters())
    dense = whole - sum(p.numel() for layer in layers for p in layer.experts.parameters())
    config = model.config
    if not config.tie_word_embeddings:
        dense -= model.get_input_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * head_dim * window * len(layers)  # half of q k' and of a v: causal
    return float(2 * tokens * (dense + experts + attention))


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a square product, the best of several."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2.0 * size**3 / fastest(lambda: a @ b)


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes read and written a second by a copy of a large tensor, the best of several."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / fastest(lambda: target.copy_(source))


def merge_bytes(model: Any, pruned: Plan) -> int:
    """Bytes that merging every layer reads and writes at least."""
    layers = zip(moeopt.moe_layers(model), pruned.layers)
    return sum(
        p.nbytes + p.nbytes * plan.kept_experts // layer.n for layer, plan in layers for p in layer.experts.parameters()
    )


def fastest(act: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return min(times)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a Mixture-of-Experts checkpoint")
    parser.add_argument("--data", required=True, help="any text: a file or folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1536, 16384])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
