"""A search tracked in MLflow, Weights & Biases or TensorBoard, by Optuna's own callbacks.

    pip install '.[tracking]'                       # optuna-integration and a light MLflow
    python studies/track.py [--to mlflow] [--small]
    pip install wandb && python studies/track.py --to wandb              # offline, unless WANDB_MODE says otherwise
    pip install tensorboard tensorflow && python studies/track.py --to tensorboard

A study of moeopt is an Optuna study, so a callback of the package optuna-integration is all there is to it. A trial's
loss is its metric; what moeopt notes of a trial (accuracy, layer_tokens, operator, ...) are MLflow's tags.

CI runs the one for MLflow, the lightest: Optuna's for TensorBoard needs TensorFlow. The others were run by hand, W&B
offline with wandb 0.31, TensorBoard with tensorboard 2.21.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

import moeopt

if TYPE_CHECKING:
    from moeopt.study import Callback


def mlflow(folder: Path) -> Callback:
    """A run a trial, in a local database; `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows them."""
    from optuna_integration.mlflow import MLflowCallback

    callback: Callback = MLflowCallback(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", metric_name="loss")
    return callback


def wandb(folder: Path) -> Callback:
    """One run for the search, a step a trial; `wandb sync FOLDER/wandb/offline-*` uploads an offline run."""
    os.environ.setdefault("WANDB_MODE", "offline")
    from optuna_integration.wandb import WeightsAndBiasesCallback

    options = {"project": "moeopt", "dir": str(folder)}
    callback: Callback = WeightsAndBiasesCallback(metric_name="loss", wandb_kwargs=options)
    return callback


def tensorboard(folder: Path) -> Callback:
    """`tensorboard --logdir FOLDER/tensorboard` shows it."""
    from optuna_integration.tensorboard import TensorBoardCallback

    callback: Callback = TensorBoardCallback(str(folder / "tensorboard"), metric_name="loss")
    return callback


TRACKERS: dict[str, Callable[[Path], Callback]] = {"mlflow": mlflow, "wandb": wandb, "tensorboard": tensorboard}


def main() -> None:
    args = arguments()
    if args.small:
        args.trials, args.limit = 4, 8
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    tracker = TRACKERS[args.to](args.out)
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    space = moeopt.PruneSpace.of(model, keep=4)
    objective = moeopt.Objective(model, tokenizer, moeopt.demo.skill_task(args.skill), space, limit=args.limit)
    study = moeopt.create_study(
        f"{args.skill}-8to4",
        objective=objective,
        storage=f"sqlite:///{args.out / 'track.db'}",
        sampler="tpe",
        load_if_exists=True,
    )
    moeopt.optimize(study, objective, n_trials=args.trials, callbacks=[tracker])
    print(f"{len(study.trials)} trials, best {study.best_value:.4f}, tracked by {args.to} in {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    parser.add_argument("--to", choices=TRACKERS, default="mlflow")
    parser.add_argument("--skill", default=moeopt.demo.DEFAULT_SKILL, choices=moeopt.demo.SKILLS)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--limit", type=int, default=48, help="search examples")
    parser.add_argument("--out", type=Path, default=Path("track-out"), help="folder of study and logs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
