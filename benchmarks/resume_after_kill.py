"""Kill a study with SIGKILL in the middle of a trial, resume it, and hold it against an uninterrupted one.

    python benchmarks/resume_after_kill.py [--model MODEL] [--trials 100] [--kill-at 57]

For every sampler: two studies in SQLite files, one killed inside the objective of trial `--kill-at`. They must agree in
every finished trial's plan and loss, slot by slot; the limit is equality. Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt.trials import genome

SAMPLERS = (
    "eep", "cmaes", "tpe", "random", "nevergrad:DE", "nevergrad:OnePlusOne", "nevergrad:PSO", "nevergrad:NGOpt",
    "nevergrad:CMA",
)  # fmt: skip


def main() -> int:
    args = arguments()
    if args.child:
        run(args)
        return 0
    table = Table(title=f"killed in trial {args.kill_at} of {args.trials}, then resumed")
    for column in ("sampler", "finished", "plans equal", "losses equal", "retried"):
        table.add_column(column)
    good = True
    for sampler in args.samplers or SAMPLERS:
        with tempfile.TemporaryDirectory() as folder:
            child(args, sampler, f"{folder}/whole.db", -1)
            assert child(args, sampler, f"{folder}/killed.db", args.kill_at, check=False) == -signal.SIGKILL
            child(args, sampler, f"{folder}/killed.db", -1)
            whole, killed = finished(f"{folder}/whole.db"), finished(f"{folder}/killed.db")
            dead = optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/killed.db").trials[args.kill_at]
        plans = sum(whole[slot][0] == killed.get(slot, (None, None))[0] for slot in whole)
        losses = sum(whole[slot][1] == killed.get(slot, (None, None))[1] for slot in whole)
        good = good and plans == losses == len(killed) == args.trials and dead.state == TrialState.FAIL
        table.add_row(sampler, f"{len(killed)}/{args.trials}", str(plans), str(losses), str(args.kill_at in killed))
        Console().print(f"{sampler}: {plans} of {len(whole)} plans equal")
    Console().print(table)
    return 0 if good else 1


def child(args: argparse.Namespace, sampler: str, database: str, kill_at: int, *, check: bool = True) -> int:
    command = [sys.executable, str(Path(__file__)), "--child", "--samplers", sampler, "--database", database]
    command += [
        "--model",
        args.model,
        "--trials",
        str(args.trials),
        "--kill-at",
        str(kill_at),
        "--limit",
        str(args.limit),
    ]
    return subprocess.run(command, check=check).returncode


def run(args: argparse.Namespace) -> None:
    """One process of a study, which kills itself while trial `kill_at` is being evaluated."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, tokenizer = moeopt.load(args.model)
    task = moeopt.demo.skill_task(moeopt.demo.DEFAULT_SKILL)
    kind = moeopt.EEPSpace if args.samplers[0] == "eep" else moeopt.PruneSpace
    space = kind.of(model, keep=4)
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit)
    options: dict[str, Any] = {"initial": 20, "prune_until": 60} if args.samplers[0] == "eep" else {}
    study = moeopt.create_study(
        "s",
        objective=objective,
        storage=f"sqlite:///{args.database}",
        sampler=args.samplers[0],
        load_if_exists=True,
        **options,
    )

    def killed_inside(trial: optuna.Trial) -> float | tuple[float, ...]:
        if trial.number == args.kill_at:
            race = objective.evaluator.race

            def kill(plan: Any, earlier: Any) -> Any:
                next(race(plan, earlier))
                os.kill(os.getpid(), signal.SIGKILL)

            objective.evaluator.race = kill  # type: ignore[method-assign, assignment]
        return objective(trial)

    moeopt.optimize(study, killed_inside, n_trials=args.trials)


def finished(database: str) -> dict[int, tuple[str, float | None]]:
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{database}")
    done = study.get_trials(states=(TrialState.COMPLETE,))
    return {genome.origin(t)["slot"]: (genome.origin(t)["plan"], t.value) for t in done}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(moeopt.demo.MODEL))
    parser.add_argument("--samplers", nargs="+", default=None)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kill-at", type=int, default=57)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--database", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
