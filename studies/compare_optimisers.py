"""Optimisers on one search space over repeated seeds, and what may be concluded from it.

    python studies/compare_optimisers.py [--small] [--seeds 5] [--trials 100] [--out compare-optimisers]
    python studies/compare_optimisers.py --model MODEL --task boolq --data FILES --optimisers eep,local,random

One study for every optimiser and seed; started again, it does the rest. Every study ends with `moeopt.select`.

The demo model, `caesar`, 8 -> 4 experts in 6 layers of their own, `--seeds 5 --trials 60 --test-limit 100`. Median over
seeds (range) of the best search loss at 363k layer-tokens, the budget that every study reached, and at 60 trials;
median test loss of what `select` chose; seeds that reached .0678 within 363k:

| optimiser | 363k layer-tokens | 60 trials | test | reached |
|---|---|---|---|---|
| nevergrad:NGOpt | .0205 (all seeds) | .0205 | .0200 | 5 |
| cmaes | .0359 (.0339-.1637) | .0335 (.0258-.0418) | .0318 | 4 |
| tpe | .0460 (.0219-.1379) | .0288 (.0219-.0460) | .0296 | 4 |
| nevergrad:TwoPointsDE | .0826 (.0284-.2625) | .0366 (.0215-.0992) | .0316 | 2 |
| local | .1254 (.0218-.9694) | .0271 (.0204-.9694) | .0310 | 2 |
| nevergrad:PSO | .1262 (.0246-.1621) | .1262 (.0246-.1516) | .1210 | 1 |
| eep | .1281 (.0678-.2144) | .0668 (.0222-.1037) | .0729 | 1 |
| random | .1281 (.0678-.2144) | .0828 (.0237-.2144) | .0866 | 1 |

That all are equal is refuted (Friedman, p = .002 and .004). No order of any two can be concluded, on search or on test:
an exact paired test of 5 seeds gives no p below .0625, and 28 pairs take 11 seeds. EEP's first 30 trials are random
draws, the same as random's, and 363k layer-tokens hold little more. NGOpt found the same plan from every seed, so that
its five studies are hardly five draws.

SmolMoE, WiC, 8 -> 4 in 10 groups, `--optimisers eep,local,cmaes,random --seeds 5 --trials 24 --limit 24 --top 3
--test-limit 48`, at 477k layer-tokens: local .799 (.755-.827), cmaes .938 (.838-.938), eep = random 1.006 (.897-1.100);
on test .927, 1.139, 1.096, 1.096. That all are equal is refuted (p = .002), local was first with every seed, and still
no order of two can be concluded: 6 pairs take 8 seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _subject
import optuna
from rich.console import Console

import moeopt
from moeopt.report.optimiser_comparison import save, view
from moeopt.results.optimiser_comparison import compare

OPTIMISERS = "eep,local,cmaes,tpe,nevergrad:NGOpt,nevergrad:TwoPointsDE,nevergrad:PSO,random"


def main() -> None:
    args = arguments()
    if args.small:
        args.optimisers, args.seeds, args.trials, args.limit, args.test_limit = "eep,local,random", 2, 4, 8, 12
    console = Console(width=130)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, tokenizer, task = _subject.load(args)
    space = moeopt.PruneSpace.of(model, keep=args.keep, groups=args.groups)
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit, rungs=args.rungs)
    studies = []
    # Seed by seed, so that what there is when it is stopped can be compared.
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.optimisers.split(","):
            study = moeopt.create_study(
                f"{task.name}-{space.shape.experts}to{args.keep}-{name}-seed{seed}",
                objective=objective,
                storage=args.storage,
                sampler=name,
                seed=seed,
                pruner="racing" if args.rungs > 1 else None,
                load_if_exists=True,
                **({"budget": args.trials} if name.startswith("nevergrad:") else {}),
            )
            moeopt.optimize(study, objective, n_trials=args.trials)
            moeopt.select(study, objective, top=args.top, dev_limit=args.test_limit, test_limit=args.test_limit)
            console.print(f"{study.study_name}: {study.best_value:.4f}", markup=False, soft_wrap=True)
            studies.append(study)
    comparison = compare(studies)
    save(comparison, args.out)
    console.print(view(comparison))
    console.print(f"{args.out} has the page, index.html, and all numbers.", markup=False, soft_wrap=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    _subject.add_arguments(parser)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--groups", type=int, help="of layers that keep the same experts; default: none do")
    parser.add_argument("--optimisers", default=OPTIMISERS, help=f"names between commas; default: {OPTIMISERS}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="to divide the seeds among processes")
    parser.add_argument("--trials", type=int, default=100, help="of every study; Nevergrad's plan for so many")
    parser.add_argument("--rungs", type=int, default=1, help="race trials over so many rungs")
    parser.add_argument("--limit", type=int, default=48, help="search examples")
    parser.add_argument("--top", type=int, default=5, help="plans of a study that are judged on dev")
    parser.add_argument("--test-limit", type=int, default=200, help="dev and test examples")
    parser.add_argument("--storage", default="sqlite:///compare_optimisers.db")
    parser.add_argument("--out", type=Path, default=Path("compare-optimisers"), help="folder of the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
