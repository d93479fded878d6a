"""What a refit gives back, on tokens that it has not seen, and what it costs.

python benchmarks/refit.py --model MODEL --task text --data FILE --keep 16,8
python benchmarks/refit.py --layer 4096,14336,4,2 --tokens 2048 --rank 32
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig, MixtralForCausalLM

import moeopt
from moeopt import methods
from moeopt.evaluation import Evaluation, paired_bootstrap
from moeopt.plan import Plan

GIB = 1 << 30


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.layer:
        one_layer(args)
    else:
        quality(args)


def quality(args: argparse.Namespace) -> None:
    """Every method's plan with and without a refit, by how many examples the refit looks at."""
    model, tokenizer = moeopt.load(args.model, dtype=torch.float32)
    task = moeopt.tasks.get(args.task, data=args.data, **json.loads(args.task_options))
    parts = model, tokenizer, task
    test = moeopt.Evaluator(*parts, split="test", limit=args.test_limit, score=args.score)
    full = test.evaluate(None)
    calibration = methods.Calibration(*parts, limit=args.limit, score=args.score)
    sources = {str(n): methods.Calibration(*parts, limit=n) for n in args.refit_limits}
    if args.agnostic:
        other = moeopt.tasks.get("text", data=args.agnostic)
        sources["agnostic"] = methods.Calibration(model, tokenizer, other, limit=args.limit)
    console = Console(width=150)
    console.print(f"full {full.loss:.4f}, accuracy {full.accuracy:.3f}; methods see {calibration.tokens:,} tokens")
    table = Table(
        "keep", "plan", "tokens", "evaluations", "seconds", "test - full", "- without refit", "accuracy - full"
    )
    for keep in args.keep:
        for name, plan in plans(args, calibration, keep):
            before = test.evaluate(plan)
            table.add_row(str(keep), name, "", "", "", *differences(before, full, before, task.chooses))
            for source, looked in sources.items():
                made = moeopt.refit(plan, looked, rank=args.rank)
                after = test.evaluate(made.plan)
                cost = made.layer_tokens / looked.tokens / looked.decoder_layers
                row = f"  + refit, {source}", f"{looked.tokens:,}", f"{cost:.1f}", f"{made.seconds:.0f}"
                table.add_row("", *row, *differences(after, full, before, task.chooses))
                test.clear()
            console.print(table)


def plans(args: argparse.Namespace, calibration: methods.Calibration, keep: int) -> list[tuple[str, Plan]]:
    """One-shot plans, and plans of files."""
    made = methods.plans(args.methods, calibration, keep=keep)
    files = [(file, Plan.load(file)) for file in args.plans]
    return [
        *((name, one.plan) for name, one in made.items()),
        *((file, plan) for file, plan in files if plan.layers[0].kept_experts == keep),
    ]


def differences(one: Evaluation, full: Evaluation, before: Evaluation, accuracy: bool) -> list[str]:
    others = [paired_bootstrap(one, full), None if one is before else paired_bootstrap(one, before)]
    others.append(paired_bootstrap(one, full, of="accuracy") if accuracy else None)
    return ["" if i is None else f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}]" for i in others]


def one_layer(args: argparse.Namespace) -> None:
    """Time and memory for one layer of a real shape, random weights, against a forward pass of the same tokens."""
    hidden, inner, kept, k = args.layer
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=2 * kept, num_experts_per_tok=k,
        num_hidden_layers=1, vocab_size=512, num_attention_heads=hidden // 64, num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    text = moeopt.tasks.TextTask(
        "text", search=["".join(chr(33 + (i * j) % 90) for i in range(500)) for j in range(1, 400)], window=256
    )
    tokenizer = moeopt.models.load_tokenizer(moeopt.demo.MODEL)
    calibration = methods.Calibration(model, tokenizer, text, limit=args.tokens // 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    calibration.run(lambda seen: None)
    forward = time.perf_counter() - started
    made = moeopt.refit(Plan.one_hot([range(kept)], experts=2 * kept, k=k), calibration, rank=args.rank)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"hidden {hidden}, inner {inner}, {kept} experts, {calibration.tokens:,} tokens, rank {args.rank}: "
        f"{made.seconds:.0f} s, {made.seconds / forward:.0f} forwards; peak memory {(peak - before) / GIB:.2f} GiB "
        f"above the model's {before / GIB:.2f}; the plan takes {made.plan.nbytes / GIB:.3f} GiB"
    )


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--task", default="text")
    parser.add_argument("--data")
    parser.add_argument("--task-options", default="{}", help="JSON")
    parser.add_argument("--score", default="likelihood")
    parser.add_argument("--keep", type=numbers, default=[4])
    parser.add_argument(
        "--methods", type=lambda text: [w for w in text.split(",") if w], default=["naee", "loss_aware"]
    )
    parser.add_argument("--plans", nargs="*", default=[], help="plan files, such as a search's best")
    parser.add_argument("--limit", type=int, default=24, help="examples or windows that methods look at")
    parser.add_argument("--refit-limits", type=numbers, default=[24], help="that a refit looks at, a row each")
    parser.add_argument("--agnostic", help="text to refit to in place of the task")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--layer", type=numbers, help="hidden, inner, experts kept, k: cost of one layer of that shape")
    parser.add_argument("--tokens", type=int, default=2048, help="with --layer")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
