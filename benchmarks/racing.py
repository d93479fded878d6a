"""Does racing find the winner that full evaluation finds, and what does it save?

    python benchmarks/racing.py [--skills caesar text] [--plans 120] [--races 200] [--error 0.05] [--small]

Plans of the demo model (4 of 8 experts kept; a third random, the others with one to three experts of a good plan
swapped, as a search makes them) are evaluated once on up to 512 search examples. Every race draws examples and their
order anew, and a sequence of candidates, random ones first; each candidate races against the best so far in rungs of
8, 16, 32, ... examples. "same winner" is the share of races that end with the plan of least mean loss, "wrong" the
share of truly better candidates that were pruned, "at a tie" the same after moving their losses to tie with the best,
"regret" the mean loss lost, "cost" the examples run over those of full evaluation. Peers: Optuna's WilcoxonPruner with
the same p at the same rungs, told one loss an example, and no pruner, which finds the winner by definition.

Measured, error rate 0.05, 120 plans, 200 races of 40 candidates:

| examples | caesar: same winner, cost, at a tie | Wilcoxon | text: same winner, cost, at a tie | Wilcoxon |
|---|---|---|---|---|
| 16  | 100%  .761 1.9% | 100%  .704 2.0% | 99.5% .762 3.6% | 100%  .818 1.4% |
| 32  | 99.5% .631 1.8% | 99.0% .508 8.9% | 98.0% .638 4.5% | 100%  .674 3.5% |
| 64  | 100%  .520 1.3% | 99.5% .387 16.7% | 99.0% .524 4.6% | 99.5% .549 6.1% |
| 128 | 100%  .418 2.1% | 100%  .312 27.5% | 98.5% .427 5.1% | 98.5% .447 10.8% |
| 256 | 100%  .339 1.8% | 99.5% .265 38.4% | 99.5% .351 4.4% | 97.5% .360 16.5% |
| 512 | 100%  .283 1.2% | 99.5% .239 45.5% | 100%  .290 2.8% | 96.5% .305 23.8% |

Racing saves a quarter at 16 examples, half at 64, two thirds at 256, and keeps the stated rate at a tie to within
simulation error; Wilcoxon, which tests ranks at every rung with the same p, does not. An example is a question of 44
tokens, or a window of 63.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import TrialState, create_trial
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import moeopt
from moeopt.demo import MODEL, skill_task
from moeopt.demo import rows as skill_rows
from moeopt.evaluation import Evaluation
from moeopt.plan import Plan
from moeopt.samplers.racing import RacingPruner, rung_sizes
from moeopt.tasks import Task, TextTask
from moeopt.trials import genome

FIRST = 8
"""Examples of the first rung."""

Array = NDArray[np.float64]
Prune = Callable[[Array], bool]
"""Losses (n,) so far of a candidate -> whether to stop."""
Racer = Callable[[Array, Array], Prune]
"""Losses (N,) of the incumbent, weights (N,) -> how candidates race against it."""


def main() -> None:
    args = arguments()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    torch.set_num_threads(1)
    console = Console(width=120)
    for skill in args.skills:
        with console.status(f"{skill}: evaluating {args.plans} plans"):
            losses, weights, random, tokens = evaluated(skill, args.plans, max(args.sizes), args.seed)
        table = Table(title=f"{skill}: {args.races} races of {args.candidates} candidates, error rate {args.error}")
        for column in ("examples", "tokens", "pruner", "same winner", "wrong", "regret", "cost", "at a tie"):
            table.add_column(column, justify="right")
        for size in [size for size in args.sizes if size <= losses.shape[1]]:
            for name, racer in pruners(args.error).items():
                races = Races()
                rng = np.random.default_rng(args.seed)
                for _ in range(args.races):
                    some = rng.permutation(losses.shape[1])[:size]
                    sequence = candidates(random, args.candidates, rng)
                    race(losses[sequence][:, some], weights[some], racer, races)
                table.add_row(str(size), f"{tokens * size / losses.shape[1]:,.0f}", name, *races.row())
            table.add_section()
        console.print(table)


def pruners(error: float) -> dict[str, Racer]:
    return {
        "racing": by_pruner(RacingPruner(error=error), each=False),
        "Wilcoxon": by_pruner(optuna.pruners.WilcoxonPruner(p_threshold=error), each=True),
        "none": lambda reference, weights: lambda losses: False,
    }


@dataclass
class Races:
    """Counts over all races of one pruner at one number of examples."""

    races: int = 0
    same: int = 0
    better: int = 0
    wrong: int = 0
    pruned_ties: int = 0
    run: int = 0
    full: int = 0
    regret: list[float] = field(default_factory=list)

    def row(self) -> list[str]:
        return [
            f"{self.same / self.races:.1%}",
            f"{self.wrong / max(1, self.better):.2%}",
            f"{np.mean(self.regret):.5f}",
            f"{self.run / self.full:.3f}",
            f"{self.pruned_ties / max(1, self.better):.1%}",
        ]


def race(losses: Array, weights: Array, racer: Racer, races: Races) -> None:
    """One race: `losses` (candidates, examples) in the order in which both are tried."""
    means = np.average(losses, axis=1, weights=weights)
    examples = losses.shape[1]
    rungs = sizes_of(examples)

    def run(candidate: Array, prune: Prune) -> int:
        """Examples at which it is pruned, or all."""
        return next((n for n in rungs[:-1] if prune(candidate[:n])), examples)

    best, prune = 0, racer(losses[0], weights)
    races.run += examples
    for i in range(1, len(losses)):
        n = run(losses[i], prune)
        races.run += n
        if means[i] < means[best]:
            races.better += 1
            races.wrong += int(n < examples)
            races.pruned_ties += int(run(losses[i] - means[i] + means[best], prune) < examples)
            if n == examples:
                best, prune = i, racer(losses[i], weights)
    winner = int(means.argmin())
    races.full += losses.size
    races.races += 1
    races.same += int(best == winner)
    races.regret.append(float(means[best] - means[winner]))


def sizes_of(examples: int) -> tuple[int, ...]:
    return rung_sizes(examples, max(1, int(np.log2(examples / FIRST)) + 1))


def by_pruner(pruner: optuna.pruners.BasePruner, *, each: bool) -> Racer:
    """Ask an Optuna pruner, on a study that holds the incumbent and a running trial.

    `each`: report every example's loss at its number, as Wilcoxon wants; else the running mean at every rung.
    """

    def racer(reference: Array, weights: Array) -> Prune:
        study = optuna.create_study(pruner=pruner)
        study.add_trial(frozen(reference, weights, each, TrialState.COMPLETE))
        return lambda losses: pruner.prune(study, frozen(losses, weights, each, TrialState.RUNNING))

    return racer


def frozen(losses: Array, weights: Array, each: bool, state: TrialState) -> optuna.trial.FrozenTrial:
    n = len(losses)
    scores = np.stack([losses, weights[:n], np.zeros(n)])
    if each:
        reported = {i: float(loss) for i, loss in enumerate(losses)}
    else:
        steps = [size for size in sizes_of(len(weights)) if size <= n]
        reported = {size: float(np.average(losses[:size], weights=weights[:size])) for size in steps}
    return create_trial(
        state=state,
        value=float(np.average(losses, weights=weights[:n])) if state == TrialState.COMPLETE else None,
        intermediate_values=reported,
        system_attrs=genome.pack(genome.SCORES, scores.reshape(-1).astype(np.float32)),
    )


def candidates(random: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A quarter random plans, then mutated ones."""
    first = rng.permutation(np.flatnonzero(random))[: count // 4]
    rest = rng.permutation(np.flatnonzero(~random))[: count - len(first)]
    return np.concatenate([first, rest])


def evaluated(skill: str, plans: int, limit: int, seed: int) -> tuple[Array, Array, NDArray[np.bool_], int]:
    """Losses (plans, examples), weights (examples,), which plans are random ones, and tokens of one evaluation."""
    model, tokenizer = moeopt.load(MODEL)
    shape = moeopt.shape_of(model)
    evaluator = moeopt.Evaluator(model, tokenizer, task_of(skill), limit=limit, batch_tokens=4096)
    rng = np.random.default_rng(seed)
    keep = shape.experts // 2
    evaluations: list[Evaluation] = []
    drawn: list[list[list[int]]] = []
    random = np.arange(plans) < plans // 3
    for is_random in random:
        if is_random:
            rows = [sorted(rng.permutation(shape.experts)[:keep].tolist()) for _ in range(shape.layers)]
        else:
            good = np.argsort([evaluation.loss for evaluation in evaluations])[:5]
            rows = [list(row) for row in drawn[rng.choice(good)]]
            for layer in rng.integers(shape.layers, size=rng.integers(1, 4)):
                rows[layer].remove(rng.choice(rows[layer]))
                others = [e for e in range(shape.experts) if e not in rows[layer]]
                rows[layer] = sorted([*rows[layer], int(rng.choice(others))])
        drawn.append(rows)
        evaluations.append(evaluator.evaluate(Plan.one_hot(rows, experts=shape.experts, k=shape.k)))
    losses = np.array([evaluation.losses for evaluation in evaluations], np.float64)
    return losses, evaluations[0].weights.astype(np.float64), random, evaluator.tokens


def task_of(skill: str) -> Task:
    """Text in windows of 64 tokens, so that there are some hundred."""
    return TextTask("text", search=skill_rows("text", "search"), window=64) if skill == "text" else skill_task(skill)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skills", nargs="+", default=["caesar", "text"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--plans", type=int, default=120)
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few plans, examples and races: seconds")
    args = parser.parse_args()
    if args.small:
        args.skills, args.sizes, args.plans, args.races, args.candidates = args.skills[:1], [16, 32], 12, 10, 10
    return args


if __name__ == "__main__":
    main()
