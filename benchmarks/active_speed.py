"""How much faster a model is with fewer active experts: k = 1, dynamic skipping, alone and with pruning.

    python benchmarks/active_speed.py MODEL --data FILES [--keep 4] [--prompt 256] [--new 32] [--batch 1 8]

Prefill is one forward pass over a batch of prompts that fills the KV cache; decode is one token at a time after it,
greedy. Betas are calibrated on other windows of the same data. Every variant runs in turn with the full model, and the
tables of `moeopt.profile` have the median of the paired ratios of tokens per second, this over the full model's, wall
time.

SmolMoE (bf16, 30 layers, 8 experts, top-2), prompts of 256 tokens of Python text, 16 new, one thread, medians of 3,
decoding by `generate`, which did not yet go through `moeopt.profile`:

| | active | prefill over full, batch 1, 4 | decode over full, batch 1, 4 |
|---|---|---|---|
| full | 2 | 276, 314 tokens/s | 10.1, 21.8 tokens/s |
| full, skipping | 1.45, 1.52 | 1.13, 1.14 | 1.10 (1.09 to 1.16), 1.04 (0.82 to 1.10) |
| full, k = 1 | 1 | 1.33, 1.46 | 1.31 (1.21 to 1.44), 0.97 (0.68 to 1.25) |
| r = 4 | 2 | 1.06, 1.02 | 1.01 (0.82 to 1.02), 1.11 (0.64 to 1.38) |
| r = 4, skipping | 1.46, 1.52 | 1.18, 1.32 | 1.04 (1.01 to 1.25), 1.10 (0.77 to 1.28) |
| r = 4, k = 1 | 1 | 1.52, 1.74 | 1.22 (1.14 to 1.22), 1.35 (1.11 to 1.35) |

Skipping a quarter of the experts' work speeds prefill up by a seventh, k = 1 by a third to a half. Decoding on a CPU is
bound by the overhead of thirty small layers, and its ratios scatter; they say little at batch 4.

The same checkpoints as they deploy, exported with `moeopt export` and set side by side with

    moeopt profile FULL R4 R2 K1 SKIP R4-SKIP R2-SKIP --trust-remote-code --data FILES --batch 1,8 --new-tokens 24

two threads, medians of 5 paired repeats (range), skipping calibrated by NAEE's rule on 3,726 search tokens:

| | parameters | active | active experts | weights, GiB | peak, GiB | load imbalance |
|---|---|---|---|---|---|---|
| full | 692 M | 214 M | 2 | 1.289 | 1.476 | 1.16 |
| r = 4 | 373 M | 214 M | 2 | .696 | .770 | .54 |
| r = 2 | 214 M | 214 M | 2 | .399 | .412 | 0 |
| k = 1 | 692 M | 135 M | 1 | 1.289 | 1.457 | 1.30 |
| skipping | 692 M | 172 M | 1.47 | 1.289 | 1.520 | 1.23 |
| r = 4, skipping | 373 M | 172 M | 1.47 | .696 | .864 | .60 |
| r = 2, skipping | 214 M | 174 M | 1.50 | .399 | .565 | .13 |

| over full | prefill, batch 1 | prefill, batch 8 | decode, batch 1 | decode, batch 8 |
|---|---|---|---|---|
| full, tokens/s | 604 | 860 | 23.4 | 66.6 |
| r = 4 | 1.06 (1.02-1.12) | 1.03 (.91-1.24) | 1.01 (.99-1.02) | 1.06 (1.04-1.12) |
| r = 2 | 1.73 (1.56-1.84) | 1.17 (1.08-1.21) | 1.05 (.92-1.12) | 1.61 (1.60-1.71) |
| k = 1 | 1.23 (1.17-1.38) | 1.69 (1.61-1.79) | 1.26 (1.21-1.36) | 1.39 (1.35-1.47) |
| skipping | 1.10 (1.03-1.20) | 1.28 (1.28-1.42) | 1.00 (.96-1.11) | 1.14 (1.09-1.25) |
| r = 4, skipping | 1.13 (1.11-1.20) | 1.40 (1.35-1.47) | 1.01 (.99-1.06) | 1.18 (1.10-1.20) |
| r = 2, skipping | 1.35 (1.31-1.41) | 1.51 (1.45-1.63) | 1.04 (.99-1.10) | 1.44 (1.34-1.53) |

Load imbalance is the coefficient of variation of the experts' tokens, mean over layers: pruning evens the load out,
fewer active experts make it less even.
"""

from __future__ import annotations

import argparse
import gc

import torch
from rich.console import Console

import moeopt
from moeopt import methods, report
from moeopt.plan import Plan


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    task = moeopt.tasks.get("text", data=args.data, window=args.prompt)
    plans = variants(args, task)
    gc.collect()
    made = moeopt.profile(
        {"full": args.model},
        plans=plans,
        batch=args.batch,
        prompt_length=[args.prompt],
        new_tokens=args.new,
        repeats=args.repeats,
        task=task,
        threads=args.threads,
    )
    Console(width=130).print(report.view(made))


def variants(args: argparse.Namespace, task: moeopt.tasks.Task) -> dict[str, Plan]:
    """Fewer active experts in every way, alone and with pruning."""
    model, tokenizer = moeopt.load(args.model)
    calibration = methods.Calibration(model, tokenizer, task, limit=args.calibration)
    shape = calibration.shape
    full = Plan.identity(shape.layers, shape.experts, shape.k)
    pruned = methods.plan("naee", calibration, keep=args.keep)
    return {
        "full, skipping": methods.skipping(full, calibration),
        "full, k = 1": full.with_k(1),
        f"r = {args.keep}": pruned,
        f"r = {args.keep}, skipping": methods.skipping(pruned, calibration),
        f"r = {args.keep}, k = 1": pruned.with_k(1),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a Mixture-of-Experts checkpoint")
    parser.add_argument("--data", required=True, help="any text: a file or folder")
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=12, help="windows to calibrate on")
    parser.add_argument("--prompt", type=int, default=256, help="tokens a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
