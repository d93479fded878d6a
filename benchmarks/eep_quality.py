"""What EEP's search gains on one task: full model, random prunings, best pruning, best merging, search against test.

    python benchmarks/eep_quality.py MODEL --task text --data FILES --keep 4 --trials 400 --limit 6 \
        --test-tokens 20000 --storage sqlite:///quality.db

Prints one table. Test examples are never searched; differences carry a paired bootstrap interval over test examples.
The peers are `--random` prunings drawn like EEP's initial population, and the full model.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt.evaluation import Evaluation, Evaluator


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    console = Console(width=140)
    task = moeopt.tasks.get(args.task, data=args.data, **json.loads(args.task_options))
    model, tokenizer = moeopt.load(args.model)
    space = moeopt.EEPSpace.of(model, keep=args.keep, groups=args.groups, router="prob")
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit)
    study = moeopt.create_study(
        f"quality-{args.task}-{args.seed}",
        objective=objective,
        storage=args.storage,
        sampler="eep",
        seed=args.seed,
        load_if_exists=True,
        prune_until=args.prune_until,
    )
    started = time.perf_counter()
    moeopt.optimize(study, objective, n_trials=args.trials)
    seconds = time.perf_counter() - started

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pruned = [t for t in done if space.plan(t).is_one_hot]
    best_prune = min(pruned, key=lambda t: (t.value, t.number))
    rng = np.random.default_rng([args.seed, 2026])
    random_plans = [space.decode(space.sample(rng)) for _ in range(args.random)]
    searched = {
        "full": objective.evaluator.evaluate(None),
        "prune": objective.evaluator.evaluate(space.plan(best_prune)),
        "merge": objective.evaluator.evaluate(space.plan(study.best_trial)),
    }
    random_search = [objective.evaluator.evaluate(plan) for plan in random_plans]
    best_random = random_plans[int(np.argmin([e.loss for e in random_search]))]

    test = tested_evaluator(model, tokenizer, task, args.test_tokens)
    plans = {"full": None, "best random": best_random, "prune": space.plan(best_prune)}
    plans["merge"] = space.plan(study.best_trial)
    on_test = {name: test.evaluate(plan) for name, plan in plans.items()}
    small = tested_evaluator(model, tokenizer, task, args.random_test_tokens)
    random_test = [small.evaluate(plan) for plan in random_plans]

    table = Table(
        title=f"{args.task}: {space.shape.experts} -> {args.keep} experts, {len(done)} trials in {seconds:.0f} s"
    )
    for column in (
        "",
        "search loss",
        "search acc",
        "test loss",
        "test acc",
        "test - full [95%]",
        "test - best random [95%]",
    ):
        table.add_column(column)
    losses = np.array([e.loss for e in random_search])
    losses_test = np.array([e.loss for e in random_test])
    table.add_row("full model", *numbers(searched["full"]), *numbers(on_test["full"]), "", "")
    table.add_row(
        f"{args.random} random, mean ± sd",
        f"{losses.mean():.4f} ± {losses.std():.4f}",
        f"{np.mean([e.accuracy for e in random_search]):.3f}",
        f"{losses_test.mean():.4f} ± {losses_test.std():.4f} ({small.tokens} tokens)",
        f"{np.mean([e.accuracy for e in random_test]):.3f}",
        "",
        "",
    )
    rows = (
        ("best random (by search)", random_search[int(losses.argmin())], on_test["best random"]),
        (f"EEP prune (trial {best_prune.number})", searched["prune"], on_test["prune"]),
        (f"EEP prune + merge (trial {study.best_trial.number})", searched["merge"], on_test["merge"]),
    )
    for name, search, tested in rows:
        table.add_row(
            name,
            *numbers(search),
            *numbers(tested),
            interval(tested, on_test["full"]),
            interval(tested, on_test["best random"]) if tested is not on_test["best random"] else "",
        )
    console.print(table)
    console.print(
        f"search {objective.evaluator.tokens} tokens, test {test.tokens} tokens, groups {len(space.groups)}, "
        f"merge against prune on test: {interval(on_test['merge'], on_test['prune'])}"
    )


def tested_evaluator(model: Any, tokenizer: Any, task: Any, tokens: int) -> Evaluator:
    """An evaluator on the fewest test examples (a power of two) that make up so many tokens, or all there are."""
    limit = 8
    while True:
        evaluator = Evaluator(model, tokenizer, task, split="test", limit=limit)
        larger = Evaluator(model, tokenizer, task, split="test", limit=limit * 2)
        if evaluator.tokens >= tokens or larger.tokens == evaluator.tokens:
            break
        limit *= 2
    enough = int(np.ceil(limit * tokens / evaluator.tokens))
    return Evaluator(model, tokenizer, task, split="test", limit=min(limit, enough + 1))


def numbers(evaluation: Evaluation) -> tuple[str, str]:
    return f"{evaluation.loss:.4f}", f"{evaluation.accuracy:.3f}"


def interval(a: Evaluation, b: Evaluation) -> str:
    return str(moeopt.paired_bootstrap(a, b))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a Mixture-of-Experts checkpoint")
    parser.add_argument("--task", default="text")
    parser.add_argument("--data", help="file or folder of the task")
    parser.add_argument("--task-options", default="{}", help='JSON, such as {"suffixes": [".py"]}')
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--prune-until", type=int, default=100)
    parser.add_argument("--limit", type=int, default=6, help="search examples (text: windows of 256 tokens)")
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--test-tokens", type=int, default=20_000)
    parser.add_argument("--random-test-tokens", type=int, default=5_000)
    parser.add_argument("--storage", default="sqlite:///quality.db")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
