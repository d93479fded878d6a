"""What one-shot methods cost, in forward passes of the full model over the calibration tokens.

    python benchmarks/methods_cost.py MODEL --data FILES [--tokens 3072] [--keep 4 6] [--repeats 3] [--threads 1]

The forward pass is the full model over the calibration batches, without logits. Each method is run alone, `--repeats`
times in turn with it, and the table has the median of the paired ratios, in CPU seconds of the process. NAEE as
published runs the layer once for each kept set, C(n, r) times, on stored inputs: that is timed on a few sets and
layers, `brute force`, and scaled up.

SmolMoE (30 layers, 8 experts, top-2, bf16), 1,536 tokens of Python text, one thread, medians of 2, a forward pass being
4.7 CPU seconds; experts take some 85 % of a forward pass, so that running all eight for every token takes 3.6 of them:

| | r = 4 | r = 6 |
|---|---|---|
| frequency | 1.00 | 1.04 |
| reap | 1.79 | 1.80 |
| naee | 2.86 (2.85 to 2.87) | 3.03 (3.02 to 3.03) |
| naee_progressive (before naee was made 9 % cheaper) | 5.33 | 5.27 |
| output_fit (likewise) | 3.60 | 3.32 |
| brute force (70 and 28 sets) | 49.4 | 20.9 |

With many experts (random weights, hidden size 32, top-8, half of the experts kept, 4k tokens, CPU seconds of one
thread, model included): naee 169 at 48 layers of 128 experts, in 1.0 GB, where it had not ended after 900 s; at 2
layers of 128, output_fit 9, ream 2, loss_aware 69 (7 ways of adding up, each searched); at 2 layers of 256, naee 23,
output_fit 31. On FineMoE (32 experts, r = 16 and 8) naee's sets are those that all swaps give, in a fifth of the
time.

The goal of 3 is met at r = 4, and at r = 6, where naee does the same work, within what repeats differ by.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from math import comb
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt import methods
from moeopt.methods.kept_sets import kept_sets
from moeopt.plan import LayerPlan, Plan

DEFAULT = ["frequency", "reap", "naee", "naee_progressive", "hc_smoe", "output_fit"]
WINDOW = 256
SETS = 3
"""Kept sets that brute force is timed on."""


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = moeopt.load(args.model)
    task = moeopt.tasks.get("text", data=args.data, window=WINDOW, fractions=(1.0, 0.0, 0.0))
    calibration = methods.Calibration(model, tokenizer, task, limit=-(-args.tokens // WINDOW))
    ratios: dict[tuple[str, int], list[float]] = {}
    forwards: list[float] = []
    calibration.run(lambda seen: None)
    for _ in range(args.repeats):
        forwards.append(cpu(lambda: calibration.run(lambda seen: None)))
        for keep in args.keep:
            for name in args.methods:
                spent = cpu(partial(methods.plan, name, calibration, keep=keep))
                ratios.setdefault((name, keep), []).append(spent / forwards[-1])
    for keep in args.keep:
        sets = comb(calibration.shape.experts, keep)
        seconds = statistics.median(enumeration(calibration, keep) for _ in range(args.repeats))
        ratios["brute force", keep] = [seconds / SETS * sets / statistics.median(forwards)]
    table = Table(
        title=f"{calibration.tokens} tokens, {calibration.shape.layers} layers; a forward pass: "
        f"{statistics.median(forwards):.1f} CPU seconds, {args.threads} threads, median of {args.repeats}"
    )
    for column in ("method", *(f"forward passes at r = {keep}" for keep in args.keep)):
        table.add_column(column)
    for name in (*args.methods, "brute force"):
        table.add_row(name, *(spread(ratios[name, keep]) for keep in args.keep))
    Console(width=130).print(table)


def enumeration(calibration: methods.Calibration, keep: int) -> float:
    """CPU seconds that NAEE's enumeration takes for `SETS` kept sets: the MoE blocks alone, on every layer's inputs."""
    shape = calibration.shape
    inputs: list[list[torch.Tensor]] = [[] for _ in calibration.layers]
    calibration.run(lambda seen: inputs[seen.layer.index].append(seen.hidden))
    sets = kept_sets(shape.experts, keep)

    def run() -> None:
        for number in np.random.default_rng(0).choice(len(sets), SETS, replace=False):
            part = LayerPlan(shape.experts, min(keep, shape.k), kept=sets[number])
            with moeopt.patched(calibration.model, Plan((part,) * shape.layers)), torch.inference_mode():
                for layer, hidden in zip(calibration.layers, inputs):
                    for states in hidden:
                        layer.block(states[None])

    return cpu(run)


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a Mixture-of-Experts checkpoint")
    parser.add_argument("--data", required=True, help="any text: a file or folder")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--keep", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--methods", nargs="+", choices=list(methods.METHODS), default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
