"""What a search costs, in layer-tokens, to reach the loss that EEP as published reaches after 400 full trials.

    python benchmarks/search_cost.py [--skill caesar] [--seeds 3]
    python benchmarks/search_cost.py --model MODEL --task text --data FILES --limit 6 --seeds 1 --share 0.25

A layer-token is one token through one decoder layer. EEP as published (`redraw=0`) pays for every trial in full, for
one equal to an earlier one, too; "redrawn" draws such proposals again. The others pay what their trials cost with
prefix reuse, and "warm" ones the passes of the one-shot methods that they start from: `soft_activation_all`, and for
EEP four more, in place of its random solutions. Every method is stopped at `--share` of the 400 full trials'
layer-tokens. All search the same space, on the same examples; each seed has its own target. Seconds of EEP are those of
a trial run in full, times their number; those of the others are what their trials took, without sampler and storage
(see scaling.py). Test losses, on examples that no search saw, are compared at equal layer-tokens, with a paired
bootstrap interval over test examples.

Measured so far. SmolMoE, Python text, 1,530 search tokens, every layer its own group, seed 0: EEP as published ends at
2.4120 (full model 2.4199; at 10 % of its layer-tokens 2.4155). "local, warm" has that after 0.8 % of layer-tokens and
0.6 % of the seconds, most of it the start (2.4127 by soft activation alone), and is at 2.4097 after 10 %, 2.4058 after
20 %. On test, 10,193 tokens, the two do not differ at equal layer-tokens: +0.0009 [-0.0034, +0.0054] at 10 %, +0.0030
[-0.0015, +0.0073] at 20 %. Much of what a search gains on so few tokens is luck: noise of 1e-3 in W_RM moves the bf16
loss by 1e-3.

The same in 10 groups of layers (`--groups 10`), where EEP does better: as published it ends at 2.4037, after 97 % of
its layer-tokens, 22 of its 400 proposals being duplicates; at 10 % it has 2.4217. "local, warm" has that after 19.2 %
of layer-tokens and 22 % of seconds (2.4073 at 10 %, 2.4004 at 25 %): a factor of five, not ten. Cold, `local` is at
2.4153 after 10 %, 2.4062 after 25 %, and never there. On test, 10,193 tokens, this minus EEP at 10 % and 25 %: cold
-0.0079 [-0.0121, -0.0038] and -0.0066 [-0.0105, -0.0028], better; warm -0.0014 [-0.0049, +0.0022] and -0.0044
[-0.0092, +0.0001], no difference.

Demo model, caesar, 2,799 search tokens (`--limit 64`), three seeds, median (range); EEP as published ends at 0.0796
(0.0546 to 0.0812):

| | layer-tokens to get there, % | seconds, % | loss at 10 % | at the end (25 %) | test, this - EEP, at 25 %, by seed |
|---|---|---|---|---|---|
| eep, redrawn (full trials) | 10.0 (8.2, 11.8; one never) | 9.7 | .0675 | .0312 (at 100 %) | -.030, -.061, -.031 |
| local | 19.0 (12.4 to 19.6) | 24.5 | .3198 | .0208 | -.041, -.107, -.042 |
| local, warm | 0.5 | 0.2 | .0255 | .0240 | -.039, -.103, -.045 |
| blockcmaes, warm | 0.5 | 0.3 | .0258 | .0243 | -.036, -.100, -.033 |
| local, warm, raced | 0.5 | 0.2 | .0250 | .0212 | -.042, -.103, -.045 |
| eep, warm | 0.4 | 0.6 | .0201 | .0198 | -.044, -.110, -.044 |
| eep, redrawn, band 0.1 (full trials) | 8.2 (8.2 to 9.2) | 7.8 | .0320 | .0208 (at 100 %) | -.043, -.105, -.043 |
| eep, redrawn, band 0.03 (full trials) | 8.2 (8.2 to 8.8) | 7.8 | .0472 | .0211 (at 100 %) | -.044, -.109, -.012 |

The start by soft activation is at EEP's loss at once, and every warm search is better on test in all seeds, at 10 % and
at 25 % of the layer-tokens (all intervals below 0). Cold, `local` needs a fifth and is worse on test at 10 %. EEP's
band of parents matters more than redrawing: with 0.1 standard deviations of the initial losses in place of 0.3 it is
there after 8 %, cold, and better on test at 10 % in all seeds. The default stays 0.3, since on SmolMoE, where random
prunings differ little, a merge phase with the narrow band was worse on test (+0.0136 [+0.0095, +0.0177], one seed).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt.evaluation import Evaluator

PUBLISHED = "eep as published"


@dataclass(frozen=True)
class Method:
    """How a method is set up.

    Args:
        sampler, options: as for `moeopt.create_study`.
        warm: one-shot methods whose plans are enqueued.
        full: whether every trial is paid for in full.
        rungs: of the objective; above 1, trials are raced.
    """

    sampler: str
    options: dict[str, Any]
    warm: tuple[str, ...] = ()
    full: bool = False
    rungs: int = 1


WARM = ("soft_activation_all",)
WARM_EEP = ("soft_activation_all", "soft_activation", "frequency", "ean", "naee")
METHODS = {
    PUBLISHED: Method("eep", {"redraw": 0}, full=True),
    "eep, redrawn": Method("eep", {}, full=True),
    "eep, redrawn, band 0.1": Method("eep", {"band": 0.1}, full=True),
    "eep, redrawn, band 0.03": Method("eep", {"band": 0.03, "crossover_band": 0.03}, full=True),
    "eep, redrawn, prefix reuse": Method("eep", {}),
    "eep, warm": Method("eep", {"initial": len(WARM_EEP)}, warm=WARM_EEP),
    "local": Method("local", {}),
    "local, warm": Method("local", {}, warm=WARM),
    "blockcmaes, warm": Method("blockcmaes", {}, warm=WARM),
    "local, warm, raced": Method("local", {}, warm=WARM, rungs=4),
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(width=150)
    model, tokenizer = moeopt.load(args.model)
    if args.task is None:
        task = moeopt.demo.skill_task(args.skill)
    else:
        task = moeopt.tasks.get(args.task, data=args.data, **json.loads(args.task_options))
    space = moeopt.EEPSpace.of(model, keep=args.keep, groups=args.groups)
    test = Evaluator(model, tokenizer, task, split="test", limit=args.test_limit)
    objectives = {
        rungs: moeopt.Objective(model, tokenizer, task, space, limit=args.limit, rungs=rungs, prefix_memory=2 << 30)
        for rungs in sorted({METHODS[name].rungs for name in args.methods} | {1})
    }
    evaluator = objectives[1].evaluator
    full_trial = evaluator.tokens * evaluator.layers

    runs: dict[tuple[str, int], Run] = {}
    for seed in range(args.seeds):
        for name in dict.fromkeys([PUBLISHED, *args.methods]):
            method = METHODS[name]
            study = moeopt.create_study(
                f"{task.name} {name} {seed}",
                objective=objectives[method.rungs],
                storage=args.storage,
                sampler=method.sampler,
                seed=seed,
                pruner="racing" if method.rungs > 1 else None,
                load_if_exists=True,
                warm_starts=method.warm,
                **method.options,
            )
            run = Run(study, method, full_trial)
            objectives[method.rungs].evaluator.clear()
            if method.full:
                moeopt.optimize(study, objectives[method.rungs], n_trials=args.trials)
            else:
                run.spend(objectives[method.rungs], args.share * args.trials * full_trial, args.most)
            runs[name, seed] = run
            console.print(f"{study.study_name}: {len(study.trials)} trials, best {study.best_value:.4f}", style="dim")

    budget = args.trials * full_trial
    table = Table(
        title=f"{task.name}, {args.keep} of {space.shape.experts} experts, {evaluator.tokens} search tokens in "
        f"{evaluator.examples} examples: to reach the loss of EEP as published after {args.trials} full trials"
    )
    for column in ("", "reached", "layer-tokens, % of EEP's", "seconds, % of EEP's", "best loss at 10 %", "at the end"):
        table.add_column(column)
    for name in dict.fromkeys([PUBLISHED, *args.methods]):
        shares: list[float] = []
        times: list[float] = []
        tenth: list[float] = []
        last: list[float] = []
        for seed in range(args.seeds):
            published, run = runs[PUBLISHED, seed], runs[name, seed]
            cost = run.reaching(published.study.best_value)
            if cost is not None:
                shares.append(100 * cost[0] / budget)
                times.append(100 * cost[1] / (args.trials * published.full_seconds()))
            tenth.append(run.best_within(0.1 * budget).value or 0.0)
            last.append(run.study.best_value)
        table.add_row(
            name, f"{len(shares)} of {args.seeds}", *(spread(x, 1) for x in (shares, times)),
            *(spread(x, 4) for x in (tenth, last)),
        )  # fmt: skip
    console.print(table)

    table = Table(
        title=f"test loss at equal layer-tokens, {test.tokens} tokens in {test.examples} examples; "
        f"full model: {test.evaluate(None).loss:.4f}"
    )
    for column in ("", "seed", "at % of EEP's", "EEP as published", "this", "this - EEP [95%]"):
        table.add_column(column)
    for name in args.methods:
        for seed in range(args.seeds):
            for share in (0.1, args.share):
                limit = share * budget
                theirs, ours = (
                    test.evaluate(space.plan(runs[key, seed].best_within(limit))) for key in (PUBLISHED, name)
                )
                gap = moeopt.paired_bootstrap(ours, theirs)
                difference = str(gap)
                table.add_row(
                    name, str(seed), f"{100 * share:.0f}", f"{theirs.loss:.4f}", f"{ours.loss:.4f}", difference
                )
    console.print(table)


class Run:
    """A method's study, and what its trials cost.

    Args:
        study: with or without trials.
        method: how it was set up.
        full_trial: layer-tokens of a trial run in full.
    """

    def __init__(self, study: optuna.Study, method: Method, full_trial: int) -> None:
        self.study, self.method, self.full_trial = study, method, full_trial

    def spend(self, objective: moeopt.Objective, budget: float, most: int) -> None:
        """Search until the layer-tokens are spent, or there are `most` trials."""

        def stop(study: optuna.Study, trial: FrozenTrial | None = None) -> None:
            if self.spent() >= budget:
                study.stop()

        if self.spent() < budget:
            moeopt.optimize(self.study, objective, n_trials=most, callbacks=[stop])

    def spent(self) -> int:
        costs = [cost for _, cost, _ in self.costs()]
        return costs[-1] if costs else 0

    def costs(self) -> Iterator[tuple[FrozenTrial, int, float]]:
        """Every finished trial, with the layer-tokens and seconds spent when it ended."""
        spent, seconds = 0, 0.0
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                spent += trial.user_attrs.get("calibration_layer_tokens", 0)
                spent += self.full_trial if self.method.full else trial.user_attrs.get("layer_tokens", self.full_trial)
                seconds += self.full_seconds() if self.method.full else trial.user_attrs.get("seconds", 0.0)
                yield trial, spent, seconds

    def full_seconds(self) -> float:
        """The median of the trials that were run in full."""
        trials = self.study.get_trials(deepcopy=False)
        whole = [t for t in trials if t.user_attrs.get("layer_tokens") == self.full_trial]
        return statistics.median(t.user_attrs["seconds"] for t in whole) if whole else 0.0

    def reaching(self, loss: float) -> tuple[int, float] | None:
        """Layer-tokens and seconds spent when a trial first had at most this loss."""
        for trial, spent, seconds in self.costs():
            if trial.state.name == "COMPLETE" and trial.value is not None and trial.value <= loss:
                return spent, seconds
        return None

    def best_within(self, budget: float) -> FrozenTrial:
        """The best trial of those that ended within the budget (the first one at any rate)."""
        done = [(t, spent) for t, spent, _ in self.costs() if t.state.name == "COMPLETE"]
        within = [t for t, spent in done if spent <= budget] or [done[0][0]]
        return min(within, key=lambda t: (t.value, t.number))


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(moeopt.demo.MODEL), help="folder or hub name; default: the demo model")
    parser.add_argument("--skill", default=moeopt.demo.DEFAULT_SKILL, help="of the demo model, where no task is given")
    parser.add_argument("--task")
    parser.add_argument("--data", help="file or folder of the task")
    parser.add_argument("--task-options", default="{}", help='JSON, such as {"suffixes": [".py"]}')
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--groups", type=int, help="default: every layer is its own")
    parser.add_argument("--limit", type=int, default=100, help="search examples (text: windows of 256 tokens)")
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[1:], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=400, help="full trials of EEP")
    parser.add_argument("--share", type=float, default=0.25, help="of their layer-tokens that the others may spend")
    parser.add_argument("--most", type=int, default=2000, help="trials of the others")
    parser.add_argument("--storage", default="sqlite:///search_cost.db")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
