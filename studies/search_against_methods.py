"""Is a search worth it? One, started from one-shot methods, against all of them, on examples that none has seen.

    python studies/search_against_methods.py [--small] [--trials 100] [--out search-against-methods]
    python studies/search_against_methods.py --model MODEL --task text --data FILES --groups 10

The same as `moeopt search --warm-start ...` and `moeopt compare-methods --study ...`; resumable.

SmolMoE (692 M parameters, 8 experts, top-2), Python text, 8 -> 4, methods calibrated on 3,072 search tokens. Test:
5,100 tokens, full model 2.3359. The search is EEP in 10 groups of layers, 400 trials on 1,530 of the search tokens
(benchmarks/search_cost.py).

| | active | search | dev | test | test - full [95%] | layer-tokens |
|---|---|---|---|---|---|---|
| mean of 20 random (sd .006) | 2 | 2.4447 | 2.2710 | 2.3409 | | |
| best of 20 random | 2 | 2.4370 | 2.2570 | 2.3316 | -.0043 [-.0086, -.0002] | |
| frequency, soft_activation | 2 | 2.4309 | 2.2612 | 2.3339 | -.0020 [-.0070, +.0023] | 92 k |
| ean | 2 | 2.4322 | 2.2605 | 2.3336 | -.0023 [-.0055, +.0006] | 184 k |
| reap | 2 | 2.4380 | 2.2630 | 2.3350 | -.0009 [-.0042, +.0023] | 184 k |
| naee | 2 | 2.4354 | 2.2587 | 2.3344 | -.0015 [-.0043, +.0011] | 369 k |
| naee_progressive | 2 | 2.4363 | 2.2586 | 2.3346 | -.0013 [-.0049, +.0018] | 553 k |
| output_fit | 2 | 2.4369 | 2.2581 | 2.3335 | -.0024 [-.0055, +.0002] | 369 k |
| m_smoe | 2 | 2.4295 | 2.2568 | 2.3309 | -.0050 [-.0080, -.0021] | 92 k |
| m_smoe_summed | 2 | 2.4542 | 2.2753 | 2.3468 | +.0109 [+.0036, +.0179] | 92 k |
| hc_smoe | 2 | 2.4309 | 2.2545 | 2.3264 | -.0095 [-.0124, -.0066] | 369 k |
| hc_smoe_summed | 2 | 2.4395 | 2.2624 | 2.3308 | -.0051 [-.0088, -.0015] | 369 k |
| search, pruning only | 2 | 2.4309 | 2.2508 | 2.3238 | -.0121 [-.0167, -.0071] | 15.1 M |
| search | 2 | 2.4205 | 2.2489 | 2.3178 | -.0181 [-.0228, -.0132] | 15.1 M |
| full, skipping | 1.47 | 2.4457 | 2.2700 | 2.3447 | +.0088 [+.0055, +.0120] | |
| full, k = 1 | 1 | 2.4493 | 2.2734 | 2.3494 | +.0135 [+.0097, +.0170] | |
| naee, skipping | 1.48 | 2.4419 | 2.2690 | 2.3412 | +.0053 [+.0013, +.0091] | |
| naee, k = 1 | 1 | 2.4465 | 2.2746 | 2.3482 | +.0123 [+.0076, +.0170] | |
| hc_smoe, skipping | 1.47 | 2.4321 | 2.2581 | 2.3313 | -.0046 [-.0075, -.0020] | |
| hc_smoe, k = 1 | 1 | 2.4338 | 2.2592 | 2.3332 | -.0027 [-.0058, +.0002] | |

The search beats the best one-shot method, `hc_smoe` (chosen on dev), on test by 0.0086 [0.0048, 0.0123], for 41 times
its layer-tokens; its best pruning does not, by 0.0026 [-0.0012, +0.0065], but is the best of the prunings. Of one-shot
prunings none differs from the full model on test: SmolMoE's experts are near copies of each other, and averaging them
helps. Aliased picks are better than summed probabilities for both clusterings.

At r = 2 (no search): frequency 2.3208, -.0151 [-.0212, -.0101] against the full model; ean 2.3224; m_smoe 2.3234, the
best on dev; hc_smoe 2.3261; output_fit 2.3292; naee 2.3319, -.0040 [-.0103, +.0019]; reap 2.3401; mean of 8 random
2.3574. At r = 6, on 1,948 test tokens of other files, no method differs from the full model (1.957 to 1.966 against
1.9598).

Four more domains, bf16, 8 -> 4: `moeopt search --sampler local --groups 10 --trials 100 --warm-start
frequency,naee,reap`, then `moeopt compare-methods --study`. English documentation and C headers: 16 windows to search
(3,603 and 2,409 tokens), 40 each in dev and test (8,962 and 9,638 tokens of test); BoolQ 48, 96 and 96 questions; WiC
96, 192 and 190. Loss on test, with the 95% interval of the difference from the full model:

| | documentation | C headers | BoolQ | WiC |
|---|---|---|---|---|
| full | 3.1334 | 1.9014 | 1.1130 | 1.2346 |
| mean of 5 random | 3.1424 | 1.9247 | 1.0830 | 1.6876 |
| best of 6 random | -.0061 [-.0096 -.0027] | +.0013 [-.0044 +.0068] | -.0958 [-.1600 -.0411] | +.0778 [.0551 .1015] |
| frequency | -.0055 [-.0087 -.0022] | -.0095 [-.0126 -.0065] * | +.0749 [.0290 .1404] | -.0892 [-.1026 -.0764] |
| soft_activation | -.0043 [-.0076 -.0010] * | -.0090 [-.0121 -.0058] | +.1074 [.0591 .1745] | -.1019 [-.1165 -.0879] |
| reap | -.0015 [-.0045 +.0016] | -.0006 [-.0032 +.0020] | +.0632 [.0230 .1045] | +.0393 [.0282 .0502] |
| naee | -.0014 [-.0034 +.0008] | -.0016 [-.0038 +.0005] | -.0279 [-.0582 +.0093] * | -.1260 [-.1465 -.1058] * |
| naee_progressive | -.0013 [-.0034 +.0009] | -.0019 [-.0044 +.0006] | -.0186 [-.0486 +.0167] | -.1120 [-.1298 -.0943] |
| ean_mean | +.0051 [.0010 .0092] | +.0006 [-.0023 +.0034] | +.1533 [.0430 .2626] | +.1058 [.0883 .1235] |
| m_smoe | -.0021 [-.0042 -.0000] | -.0019 [-.0040 +.0005] | +.1633 [.1252 .2115] | -.0555 [-.0688 -.0424] |
| hc_smoe | -.0002 [-.0023 +.0019] | -.0014 [-.0042 +.0015] | -.0049 [-.0203 +.0115] | -.0031 [-.0151 +.0088] |
| search, pruning | -.0090 [-.0129 -.0051] | -.0092 [-.0121 -.0063] | -.0761 [-.1077 -.0462] | -.1074 [-.1210 -.0943] |
| search | -.0100 [-.0145 -.0053] | -.0091 [-.0124 -.0060] | -.2857 [-.3762 -.2031] | -.4568 [-.5387 -.3748] |
| search - its * | -.0056 [-.0085 -.0027] | +.0004 [-.0012 +.0019] | -.2578 [-.3648 -.1733] | -.3308 [-.3977 -.2643] |
| layer-tokens over * | 59 | 44 | 17 | 16 |

* the best one-shot method on dev, which the last interval is against. The search beats it on documentation, BoolQ and
WiC, and on C headers there is no difference: frequency, which the search started from, is that good there. Which
one-shot method is best changes with the domain. Accuracy does not follow the loss: BoolQ .500 for the full model, .490
for naee, .458 for the search; WiC .489, .489, .505; what the search finds is calibration, not knowledge. An earlier
search of 78 trials on 1,530 tokens of Python in float32 chose a merge that was worse than the full model on test by
.0140 [.0071, .0213]: `moeopt select` finds that out on dev.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _subject
import optuna
from rich.console import Console

import moeopt
from moeopt import report
from moeopt.results.method_comparison import compare


def main() -> None:
    args = arguments()
    if args.small:
        args.trials, args.limit, args.test_limit, args.draws = 8, 6, 12, 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, tokenizer, task = _subject.load(args)
    space = moeopt.EEPSpace.of(model, keep=args.keep, groups=args.groups)
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit)
    starts = args.warm_start.split(",") if args.warm_start else []
    study = moeopt.create_study(
        f"{task.name} {space.shape.experts} to {args.keep}, from {args.warm_start or 'random'}",
        objective=objective,
        storage=args.storage,
        warm_starts=starts,
        load_if_exists=True,
        **({"initial": len(starts), "prune_until": max(len(starts) + 1, args.trials // 4)} if starts else {}),
    )
    moeopt.optimize(study, objective, n_trials=args.trials)
    objective.evaluator.clear()
    comparison = compare(
        model,
        tokenizer,
        task,
        keep=[args.keep],
        draws=args.draws,
        limit=args.limit,
        test_limit=args.test_limit,
        study=study,
        out=args.out,
    )
    report.save(comparison, args.out)
    Console(width=140).print(report.view(comparison))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _subject.add_arguments(parser)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--groups", type=int, help="default: every layer is its own")
    parser.add_argument("--warm-start", default="soft_activation,naee,ean,frequency", help="one-shot methods")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--limit", type=int, default=48, help="search examples")
    parser.add_argument("--test-limit", type=int, default=300, help="dev and test examples")
    parser.add_argument("--draws", type=int, default=20, help="random prunings")
    parser.add_argument("--storage", default="sqlite:///search_against_methods.db")
    parser.add_argument("--out", type=Path, default=Path("search-against-methods"))
    parser.add_argument("--small", action="store_true", help="a quick run of everything")
    return parser.parse_args()


if __name__ == "__main__":
    main()
