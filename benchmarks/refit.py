"""What a refit gives back, on tokens that it has not seen, and what it costs.

    python benchmarks/refit.py --model MODEL --task text --data FILE --keep 16,8
    python benchmarks/refit.py --layer 2048,768,16,8 --tokens 2048

A model of 12 M parameters whose 32 experts differ (top-4, 6 layers, trained on code and text), methods and refits
calibrated on 24 windows (5.6 to 5.7 k tokens), test loss over the full model's on all of the split, float32:

| | python, 16 | docs, 16 | c, 16 | python, 8 | docs, 8 | c, 8 |
|---|---|---|---|---|---|---|
| naee | +.0321 | +.0437 | +.0506 | +.2391 | +.3280 | +.4418 |
| + refit | +.0241 | **+.0302** | +.0370 | **+.1273** | +.1735 | +.2298 |
| loss_aware | +.0272 | +.0488 | +.0477 | +.2391 | +.3171 | +.3958 |
| + refit | **+.0214** | +.0331 | **+.0337** | **+.1273** | **+.1698** | **+.2157** |

A refit less the same plan without, [95%]: from -.0058 [-.0088, -.0029] (loss_aware, python, 16) to -.2120 [-.2505,
-.1766] (naee, c, 8): better with its interval in all twelve, by a fifth to a third of the damage at half the experts,
by about half of it at a quarter. It costs 4.0 evaluations.

With three quarters of the experts there is little to give back, and a refit may take away: python, r = 24, frequency
+.0024, refitted on 5.7 k tokens +.0030, on 17 k +.0047 (worse by .0023 [.0008, .0039]); so `moeopt refit` judges on
dev. More tokens, naee, r = 8, test on 24 windows: python +.1406 on 1.8 k, +.1174 on 5.7 k, +.1144 on 17 k; docs
+.2308, +.1778 and +.1453 on 21 k; c +.3210, +.2517 and +.2183 on 12 k: where much is pruned it goes on gaining.

Fitted to what the full model's own layer gives, in place of its hidden states behind the layer, same test: r = 8
+.1297, +.1919, +.2678 (python, docs, c) for +.1174, +.1778, +.2517; r = 16 +.0197, +.0335, +.0427 for +.0188, +.0307,
+.0421. Tokens weighed by one over the norm of their hidden states: alike. Of rank 64, 16 and 4 (inner 96; python, r =
8, naee) +.1173, +.1280 and +.1559 for +.1174; experts three at a time (`columns=300`) +.1249.

Text of another kind does not do: naee, python, r = 16, refitted to documentation, 5.6 k tokens, +.0339 for +.0321
(+.0018 [-.0030, +.0065]), to python +.0241.

Newer methods of the literature, r = 8, test loss over full on all of the split (`benchmarks/guided.py --samplers ""`):

| | python | docs | c | evaluations |
|---|---|---|---|---|
| msan | +2.64 | +2.45 | +2.52 | 2 |
| hc_smoe, :aligned | +1.807, +1.485 | +1.906, +1.560 | +1.696, +1.358 | 8 |
| m_smoe, :aligned, :aligned+karcher | +1.288, +.615, +.645 | +1.253, +.679, +.581 | +1.523, +.770, +.666 | 1 |
| reap, reap_progressive | +.953, +.699 | +.850, +.714 | +.995, +.884 | 2, 3 |
| ream | +.741 | +.890 | +1.000 | 9 |
| aimer | +.673 | +.820 | +.800 | 0 |
| easy_ep | +.352 | +.331 | +.544 | 2 |
| naee | +.2391 | +.3280 | +.4418 | 8 |
| loss_aware | +.2391 | +.3171 | **+.3958** | 13 |
| mone | **+.2338** | **+.2751** | +.3987 | 2 |

At r = 16 (python, docs, c) mone has +.0348, +.0463 and **+.0452**, easy_ep +.0345, +.0442 and +.0511, for naee's
+.0321, **+.0437**, +.0506 and loss_aware's **+.0272**, +.0488, +.0477; the others are behind these in all three. At r =
24 these four are within .002 of each other. Refitted, r = 8, python and docs: mone +.1645, +.1842; m_smoe:aligned
+.2113, +.2275; ream +.2772, +.2840; reap_progressive +.2776, +.2771; naee +.1273, +.1735.

Aligned neurons take half of the damage of m_smoe's mergings. MoNE, whose router stays whole and whose constants no
ordinary checkpoint holds, is the best without a refit (over loss_aware, docs, -.0416 [-.0542, -.0294]), for a sixth of
its cost; it is the constants: with them loss_aware's kept set has +.2641 (docs, -.0528 [-.0632, -.0425]), naee's
+.2799, easy_ep's +.2727, frequency's +.3182. A refit does better without them: docs, naee +.1734, naee with constants
+.1926 (+.0192 [.0100, .0289]), mone +.1843 (+.0109 [.0016, .0206]).

Router rows fitted to the full model's logits of the kept experts, by least squares on what enters the small model's
router (three ridges, the best on test): naee, python, r = 8, +.2391 to +.2355 (-.0035 [-.0061, -.0011]), c, r = 16,
-.0011 [-.0027, .0004]; behind a refit +.0006 [.0000, .0012] and -.0004 [-.0012, .0004]. So a refit leaves them alone.

The model that moeopt ships, refitted to 96 questions, test loss and accuracy on 250 (ridges of .003 and more, which one
of a single expert would have gone below):

| | full | naee, r = 2 | + refit | naee, r = 1 | + refit |
|---|---|---|---|---|---|
| caesar | .0223, 100 % | .880, 82 % | .0245, 100 % | 4.30, 36 % | .101, 98 % |
| sort | .0279, 99.6 % | .0529, 98.8 % | .0304, 99.6 % | .534, 88 % | .0426, 98.8 % |
| roman | .0417, 88 % | .0671, 82 % | .0452, 89 % | .105, 74 % | .0472, 88 % |
| dates | .572, 41 % | .613, 38 % | .586, 41 % | .737, 34 % | .598, 37 % |

**Search or refit?** A guided search of 150 trials on caesar, r = 2, ends at .0379, refitted at .0250; loss_aware alone
at .0617, refitted at .0248 for 13 evaluations in all: with a refit the search is not worth its cost there. Inside a
search a refit would change the order somewhat: over five methods and twelve random prunings the losses before and after
it correlate (Spearman) at .70 and .79 (caesar, r = 4 and 2), .83 and .79 (sort), of random prunings alone at .43 to
.57, but what is best before is within .002 of the best after, and each trial would cost five times as much. So, where
pruning costs something: a one-shot plan, then a refit. It aims at the full model, and takes back what a pruning gains
over it: near copies (692 M parameters, 8 experts, ARC-Easy, r = 4, loss_aware, 300 test questions), choice loss and
accuracy against full -.0673 [-.1035, -.0314], +.043 [.003, .083]; refitted to 160 questions -.0011 [-.0055, .0034],
.000 [-.010, .010]. There the plan without it is the better one, and going below the full model's loss is what searches
are for.

Cost, one layer of Qwen3-30B-A3B's form (hidden 2,048, inner 768), 16 experts kept of 32, top-8, 2,012 tokens, bfloat16,
one core that other work shared: 97 s, 41 forwards, 1.0 GiB above the model's; the weights take .094 GiB in a plan.
Of Mixtral 8x7B's (4,096, 14,336), 4 experts kept of 8, top-2, as many tokens: 427 s, 42 forwards, 7.0 GiB above the
model's 3.1; .875 GiB. So all 32 layers take some four hours of one core.
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
        for name, plan in ((n, p.with_k(k) if k else p) for n, p in plans(args, calibration, keep) for k in args.k):
            before = test.evaluate(plan)
            label = f"{keep}, k = {plan.layers[0].k}"
            table.add_row(label, name, "", "", "", *differences(before, full, before, task.chooses))
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
        *((name, method.plan) for name, method in made.items()),
        *((file, plan) for file, plan in files if plan.layers[0].kept_experts == keep),
    ]


def differences(after: Evaluation, full: Evaluation, before: Evaluation, accuracy: bool) -> list[str]:
    others = [paired_bootstrap(after, full), None if after is before else paired_bootstrap(after, before)]
    others.append(paired_bootstrap(after, full, of="accuracy") if accuracy else None)
    return ["" if gap is None else str(gap) for gap in others]


def one_layer(args: argparse.Namespace) -> None:
    """Time and memory for one layer of a real shape, random weights, against a forward pass of the same tokens."""
    hidden, inner, keep, k = args.layer
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=2 * keep, num_experts_per_tok=k,
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
    made = moeopt.refit(Plan.one_hot([range(keep)], experts=2 * keep, k=k), calibration, rank=args.rank)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"hidden {hidden}, inner {inner}, {keep} experts, {calibration.tokens:,} tokens, rank {args.rank}: "
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
    parser.add_argument("--k", type=numbers, default=[0], help="experts that run per token; 0: the model's")
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
