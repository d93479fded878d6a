"""Four optimisers on one pruning space: EEP, CMA-ES, TPE and a Nevergrad optimiser, over several seeds.

    python studies/compare_samplers.py [--small] [--skill caesar] [--seeds 3] [--trials 120]

All share the objective, so that a study differs from the next in its sampler and seed alone; each is its own study in
one storage, resumable. The winner of each is scored once on test examples, against the full model.

Skill `caesar`, 100 trials, 48 search questions, best search loss of seeds 0, 1 and 2: eep 0.0323, 0.0494, 0.0220; cmaes
0.0210, 0.0343, 0.0240; tpe 0.0269, 0.0202, 0.0215. Three seeds do not rank them. The comparison was stopped before it
reached the Nevergrad optimiser's later seeds, random search and the test split: run it for those.
"""

from __future__ import annotations

import argparse

import numpy as np
import optuna
from rich.console import Console
from rich.table import Table

import moeopt

SAMPLERS = ("eep", "cmaes", "tpe", "nevergrad:TwoPointsDE", "random")


def main() -> None:
    args = arguments()
    if args.small:
        args.seeds, args.trials, args.limit, args.test_limit = 1, 10, 8, 16
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, tokenizer = moeopt.load(args.model)
    task = moeopt.demo.skill_task(args.skill)
    space = moeopt.PruneSpace.of(model, keep=4, encoding="scores")
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit)
    test = moeopt.Evaluator(model, tokenizer, task, split="test", limit=args.test_limit)
    full = test.evaluate(None)

    table = Table(
        title=f"{args.skill}: 8 -> 4, {args.trials} trials, {args.seeds} seeds; full model {full.loss:.4f} on test"
    )
    for column in ("sampler", "best search loss: mean (range)", "test loss: mean (range)", "test - full, seed 0 [95%]"):
        table.add_column(column)
    for sampler in SAMPLERS:
        searched, tested = [], []
        for seed in range(args.seeds):
            options = {"prune_until": args.trials} if sampler == "eep" else {}
            study = moeopt.create_study(
                f"{args.skill}-{sampler}-{seed}",
                objective=objective,
                storage=args.storage,
                sampler=sampler,
                seed=seed,
                load_if_exists=True,
                **options,
            )
            moeopt.optimize(study, objective, trials=args.trials)
            searched.append(study.best_value)
            tested.append(test.evaluate(space.plan(study.best_trial)))
        difference = moeopt.paired_bootstrap(tested[0], full)
        table.add_row(
            sampler,
            spread(searched),
            spread([evaluation.loss for evaluation in tested]),
            f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]",
        )
    Console(width=130).print(table)


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    parser.add_argument("--model", default=str(moeopt.demo.MODEL))
    parser.add_argument("--skill", default=moeopt.demo.DEFAULT_SKILL, choices=moeopt.demo.SKILLS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--limit", type=int, default=100, help="search examples")
    parser.add_argument("--test-limit", type=int, default=300, help="test examples")
    parser.add_argument("--storage", default="sqlite:///compare.db")
    return parser.parse_args()


if __name__ == "__main__":
    main()
