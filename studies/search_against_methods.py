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
2.3574. On WiC, r = 4, 128 test questions, full 1.2086: naee -.1175 [-.1415, -.0943], the best; frequency -.0860
[-.1023, -.0705]; m_smoe -.0562; hc_smoe +.0070 [-.0106, +.0252]; the mean of 2 random prunings 1.7025. On BoolQ, r = 4,
32 test questions, full 1.0664: hc_smoe -.0589 [-.0846, -.0327], the best on dev; naee -.0478 [-.0914, -.0056];
frequency +.0784; m_smoe +.1245; the better of 2 random prunings -.1050 [-.1747, -.0281], from hc_smoe not to be told
apart.

All methods, in float32, with `moeopt compare-methods`, on 1,530 search and 1,948 test tokens (8 windows, so that an
interval is of few) of other Python files; full model 1.9598. What differs from it by an interval is said so; SmolMoE's
experts being near copies, little does:

| | keep 6 | keep 4 | keep 2 |
|---|---|---|---|
| mean of random | 1.9613 | 1.9685 | |
| frequency | 1.9603 | 1.9680, +.0082 [+.0054, +.0113] | 1.9635 |
| reap | 1.9588 | 1.9591 | |
| naee | 1.9604 | 1.9615, +.0017 [+.0001, +.0030] | 1.9595 |
| hc_smoe | 1.9595 | 1.9575 | 1.9569 |
| m_smoe | 1.9606 | 1.9602 (best on dev) | |
| ean_mean, best on dev for keep 6 | 1.9581, -.0017 [-.0041, +.0005] | | |
| EEP, 78 trials, its best pruning | | 1.9574, -.0024 [-.0060, +.0012] | |
| EEP, 78 trials, after merging | | 1.9738, +.0140 [+.0071, +.0213] | |
| full, skipping (1.47 active); k = 1 | 1.9651; 1.9685, +.0087 [+.0007, +.0192] | | |
| naee, skipping; k = 1 | 1.9650; 1.9686 | 1.9637; 1.9686 | 1.9667; 1.9710, +.0112 [+.0023, +.0217] |
| hc_smoe, skipping; k = 1 | 1.9613; 1.9642 | 1.9594; 1.9608 | 1.9579; 1.9570 |

Here the merging that search loss liked best is worse on test than every row above it: `moeopt select` finds that out on
dev. On tasks the search does win. WiC, keep 4, `local` in 10 groups, 60 trials on 24 questions, 48 test questions, full
1.2703: search .8912, -.3791 [-.5028, -.2551]; it beats the best one-shot method, `naee_progressive` (1.1485), by .2573
[.1677, .3470] for 7 times its layer-tokens, and its best pruning does not. BoolQ, the same with 12 and 24 questions,
full 1.0941: search .8314, -.2626 [-.3553, -.1778]; it beats `hc_smoe_summed` (.9546, the best on dev) by .1231 [.0024,
.2545] for 11 times its layer-tokens, and its best pruning is worse than that, by .0721 [.0027, .1326].
Accuracy does not follow: WiC's is .479 for both, BoolQ's .500 for the full model and .417 for the search.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import optuna
from rich.console import Console

import moeopt
from moeopt.comparing import compare, view


def main() -> None:
    args = arguments()
    if args.small:
        args.trials, args.limit, args.test_limit, args.draws = 8, 6, 12, 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, tokenizer = moeopt.load(args.model, device_map=args.device_map)
    if args.task is None:
        task = moeopt.demo.skill_task(args.skill)
    else:
        task = moeopt.tasks.get(args.task, data=args.data, **json.loads(args.task_options))
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
    moeopt.optimize(study, objective, trials=args.trials)
    objective.evaluator.clear()
    found = compare(
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
    Console(width=140).print(view(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(moeopt.demo.MODEL), help="folder or hub name; default: the demo model")
    parser.add_argument("--device-map", default="auto")
    parser.add_argument("--skill", default=moeopt.demo.DEFAULT_SKILL, help="of the demo model, where no task is given")
    parser.add_argument("--task")
    parser.add_argument("--data", help="file or folder of the task")
    parser.add_argument("--task-options", default="{}", help='JSON, such as {"suffixes": [".py"]}')
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
