"""How small may the shipped model be, and how good: a front of loss and bytes in under a minute.

    python studies/front.py [--small] [--out front.png]

Five skills at once. Experts of each layer stand in `loss_aware`'s order; how many of them each layer keeps, 2 to 8, is
searched by TPE, which minimises the mean loss and the bytes of the checkpoint. Its front is judged on dev beside the
full model and plans of `reap` and `loss_aware` that keep the same number in every layer. `front.png` is the picture.

100 trials, seed 0, under a minute on one core, 150 dev questions; 95% intervals of the difference to the full model
(7.03 MB, loss 0.342). At 3.71 MB +0.078 [+0.056, +0.101], where four experts in every layer cost +0.111 [+0.081,
+0.142] by `loss_aware`; at 2.88 MB +0.273 [+0.218, +0.336] and +0.452 [+0.317, +0.597]. One of the 16 points is beaten
by a plan with one number for all layers: seven experts by `reap`, at 6.2 MB. `front.png` shows it all.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import optuna
import torch
from rich.console import Console

import moeopt
from moeopt import methods, report
from moeopt.results.front import front_of
from moeopt.tasks import MixtureTask

KEEP = (2, 8)
SKILLS = ("add", "sort", "caesar", "dates", "roman")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    parser.add_argument("--out", type=Path, default=Path("front.png"), help="a .png, .html, .csv or .json file")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trials, limit, dev = (8, 10, 10) if args.small else (args.trials, 60, 150)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # its matrices are too small to share
    started = time.perf_counter()
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    task = MixtureTask({skill: (moeopt.demo.skill_task(skill), 1) for skill in SKILLS})
    order = methods.ranking("loss_aware", methods.Calibration(model, tokenizer, task, limit=limit))
    space = moeopt.PruneSpace.of(model, keep=KEEP, order=order)
    objective = moeopt.Objective(model, tokenizer, task, space, limit=limit, objectives=("loss", "bytes"))
    uniform = [space.decode(space.with_counts(space.start(), keep)) for keep in range(KEEP[0], KEEP[1])]
    study = moeopt.create_study(
        "trade-off", objective=objective, storage=None, sampler=args.sampler, seed=args.seed, warm_starts=uniform
    )
    moeopt.optimize(study, objective, n_trials=trials)
    keeps = (4,) if args.small else None
    front = front_of(study, objective, dev_limit=dev, methods=("reap", "loss_aware"), keeps=keeps)
    report.save(front, args.out)
    console = Console(width=130)
    console.print(report.view(front))
    console.print(f"{args.out}, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
