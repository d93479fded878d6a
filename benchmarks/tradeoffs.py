"""Fronts of size and loss: one-shot methods, allocation, budgets by ranking, EvoESAP, NSGA-II and guided.

    python -m benchmarks.tradeoffs --model PATH --task arc_easy --data FOLDER --score choice --sizes 3,4,6
    python -m benchmarks.tradeoffs --model PATH --data src/ --sizes 6,8,12,16,24 --seeds 0,1,2
    python -m benchmarks.tradeoffs --small

Every approach gives a plan for each size, as many bytes as uniform plans of so many experts a layer have:

- uniform: `reap`, `frequency`, `ean`, `loss_aware`, the same number of experts in every layer, calibrated on search;
- `loss_aware_budgets`: as many experts in all, of each layer what its predicted loss asks for, in one pass;
- `budgets by ranking`: counts of every layer over a fixed ranking, by TPE, of loss and bytes;
- `evoesap`: EvoESAP's procedure, counts over the ranking of REAP by the acceptance of speculative decoding, a study a
  size, each with its share of the layer-tokens, about a third of them before the first child;
- `nsgaii`, `guided`: counts and choice, of loss and bytes, from the plans of `loss_aware_budgets` at all sizes.

Searches have the layer-tokens of `--evaluations` passes of the full model each; what rankings and warm starts cost in
calibration, a pass or two, is not counted. Of a study's trials that of least loss on search, of those no larger, is
judged on test. Hypervolumes on search are of the trials after shares of the layer-tokens, those on test of the judged
plans and the full model, between bounds that all share. Studies are kept in `--out`: the same command goes on there.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

import moeopt
from moeopt import methods
from moeopt.demo.skills import MODEL
from moeopt.demo.task import skill_task
from moeopt.models import Sizes
from moeopt.plan import Plan
from moeopt.report.figures import front as figure
from moeopt.report.figures import write_html, write_png
from moeopt.report.tables import csv_of
from moeopt.statistics import Floats, Interval, paired_bootstrap
from moeopt.study import finished
from moeopt.trials.front import completed, points
from moeopt.trials.hypervolume import Bounds, curve

UNIFORM = ("reap", "frequency", "ean", "loss_aware")
BUDGETS, RANKED, EVOESAP = "loss_aware_budgets", "budgets by ranking", "evoesap"
SEARCHES = (RANKED, EVOESAP, "nsgaii", "guided")
SHARES = (0.25, 0.5, 1.0)
OBJECTIVES = ("loss", "bytes")


@dataclass(frozen=True)
class Judged:
    """A plan on test: its loss less the full model's, and the mean accuracy's difference where the task has options."""

    approach: str
    seed: int | None
    keep: int
    counts: list[int]
    bytes: int
    gap: Interval
    accuracy: Interval


class Bench:
    """A model and a task, and what approaches make of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = moeopt.load(args.model, dtype=getattr(torch, args.dtype))
        self.task = skill_task("caesar") if args.small else moeopt.tasks.get(args.task, data=args.data)
        self.parts = self.model, self.tokenizer, self.task
        self.seen = moeopt.Evaluator(*self.parts, limit=args.limit, score=args.score)
        self.test = moeopt.Evaluator(*self.parts, split="test", limit=args.test_limit, score=args.score)
        whole = self.seen.evaluate(None)
        self.full, self.budget = self.test.evaluate(None), args.evaluations * whole.layer_tokens
        self.calibration = methods.Calibration(*self.parts, limit=args.limit, score=args.score)
        self.shape, self.sized = self.calibration.shape, Sizes(self.model)
        self.keep, self.layers, self.sizes = (self.shape.k, self.shape.experts), self.shape.layers, sorted(args.sizes)
        self.storage = f"sqlite:///{args.out / 'tradeoffs.db'}"
        self.ranking = cache(lambda name: methods.ranking(name, self.calibration))
        self.allocated: list[Plan] = []
        self.curves: dict[str, tuple[Floats, Floats]] = {}  # layer-tokens and points of studies of loss and bytes

    def judged(self) -> Iterator[Judged]:
        """Every approach at every size, one-shot ones first."""
        for keep in self.sizes:
            for name, made in methods.plans([*UNIFORM], self.calibration, keep=keep).items():
                yield self.judge(name, None, keep, made.plan)
        for keep in self.sizes:
            plan = methods.allocate("loss_aware", self.calibration, total=keep * self.layers)
            self.allocated.append(plan)
            yield self.judge(BUDGETS, None, keep, plan)
        for seed in self.args.seeds:
            for name in self.args.searches:
                for keep, plan in self.evoesap(seed) if name == EVOESAP else self.chosen(name, seed):
                    yield self.judge(name, seed, keep, plan)

    def judge(self, approach: str, seed: int | None, keep: int, plan: Plan) -> Judged:
        result = self.test.evaluate(plan)
        counts = [layer.kept_experts for layer in plan.layers]
        gaps = paired_bootstrap(result, self.full), paired_bootstrap(result, self.full, of="accuracy")
        return Judged(approach, seed, keep, counts, self.sized.under(plan).bytes, *gaps)

    def chosen(self, name: str, seed: int) -> Iterator[tuple[int, Plan]]:
        """Of a study of loss and bytes the best plan on search at every size."""
        if name == RANKED:
            space = moeopt.PruneSpace(self.shape, keep=self.keep, order=self.ranking(self.args.order))
            first = space.start()
            starts = [space.decode(space.with_counts(first, np.full(self.layers, r))) for r in self.sizes]
        else:
            space, starts = moeopt.PruneSpace(self.shape, keep=self.keep), self.allocated
        objective = self.objective(space, objectives=OBJECTIVES, guide=0.3 if name == "guided" else 0.0)
        sampler = "tpe" if name == RANKED else name
        options = {"population_size": self.args.population} if name == "nsgaii" else {}
        study = self.searched(f"{name}, seed {seed}", objective, self.budget, seed, sampler, starts, options)
        done = completed(study)
        spent = np.array([trial.user_attrs["spent"] for trial in done])
        self.curves[study.study_name] = spent, points(done, study.directions)
        plans = [space.plan(trial) for trial in sorted(done, key=lambda trial: (trial.values[0], trial.number))]
        for r in self.sizes:
            most = self.sized.under(
                Plan.one_hot([[*range(r)]] * self.layers, experts=self.shape.experts, k=self.shape.k)
            ).bytes
            yield from ((r, plan) for plan in [p for p in plans if self.sized.under(p).bytes <= most][:1])

    def evoesap(self, seed: int) -> Iterator[tuple[int, Plan]]:
        """A study a size."""
        for r in self.sizes:
            space = moeopt.PruneSpace(self.shape, keep=self.keep, total=r * self.layers, order=self.ranking("reap"))
            objective, share = self.objective(space, score=self.args.evoesap_score), 1 / len(self.sizes)
            options = {"population": max(6, min(32, int(share * self.args.evaluations / 3)))}
            name = f"{EVOESAP} {r}, seed {seed}"
            study = self.searched(name, objective, share * self.budget, seed, EVOESAP, [], options)
            yield r, space.plan(study.best_trial)

    def objective(self, space: moeopt.PruneSpace, **options: Any) -> moeopt.Objective:
        return moeopt.Objective(*self.parts, space, limit=self.args.limit, **{"score": self.args.score, **options})

    def searched(
        self, name: str, objective: moeopt.Objective, budget: float, seed: int, sampler: str,
        starts: list[Plan], options: dict[str, Any],
    ) -> optuna.Study:  # fmt: skip
        """The study of that name, until it has cost so many layer-tokens, or ten times as many trials as they are."""
        study = moeopt.create_study(
            name, objective=objective, storage=self.storage, sampler=sampler, seed=seed, load_if_exists=True,
            warm_starts=starts, **options,
        )  # fmt: skip

        def spent() -> float:
            return max((trial.user_attrs.get("spent", 0) for trial in study.get_trials(deepcopy=False)), default=0)

        most = int(10 * self.args.evaluations * budget / self.budget) + len(starts)  # some cost nothing
        while spent() < budget and finished(study) < most:
            moeopt.optimize(study, objective, n_trials=finished(study) + 1)
        print(f"{name}: {finished(study)} trials", flush=True)
        return study

    def hypervolumes(self, judged: Sequence[Judged]) -> list[list[str]]:
        """On search after shares of the layer-tokens, and on test of the judged plans; a row a search or method."""
        at = {name: np.array([[j.gap.mean, j.bytes] for j in rows]) for name, rows in grouped(judged).items()}
        whole = np.array([[0.0, self.sized.under().bytes]])
        on_test = Bounds.of(np.vstack([*at.values(), whole]))
        searched = Bounds.of(np.vstack([p for _, p in self.curves.values()])) if self.curves else None
        rows = []
        for name, there in at.items():
            reached = [""] * len(SHARES)
            if searched and name in self.curves:
                spent, grown = self.curves[name][0], curve(self.curves[name][1], searched)
                before = [(spent <= share * max(self.budget, spent[-1])).sum() for share in SHARES]
                reached = [f"{grown[n - 1]:.3f}" if n else "" for n in before]
            rows.append([name, *reached, f"{on_test.hypervolume(np.vstack([there, whole])):.3f}"])
        return rows


def grouped(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """By approach and seed."""
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        groups.setdefault(each.approach + ("" if each.seed is None else f", seed {each.seed}"), []).append(each)
    return groups


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def written(bench: Bench, judged: Sequence[Judged]) -> str:
    """CSV, figure and tables in the folder; the tables as text."""
    groups, out, texts = grouped(judged), bench.args.out, []
    for what in ["loss", "accuracy"] if bench.task.chooses else ["loss"]:
        table = []
        for name, rows in groups.items():
            cells = {row.keep: str(row.gap if what == "loss" else row.accuracy) for row in rows}
            table.append([name, *(cells.get(size, "") for size in bench.sizes)])
        texts.append(markdown([f"{what} on test less the full model's", *map(str, bench.sizes)], table))
    shares = [f"search, {share:.0%}" for share in SHARES]
    texts.append(markdown(["hypervolume", *shares, "test"], bench.hypervolumes(judged)))
    records = [
        {"name": f"{name}, {j.keep}", "series": name, "keep": j.keep, "counts": " ".join(map(str, j.counts)),
         "x": j.bytes, "y": j.gap.mean, "low": j.gap.low, "high": j.gap.high, "accuracy": j.accuracy.mean}
        for name, rows in groups.items() for j in rows
    ]  # fmt: skip
    (out / "tradeoffs.csv").write_text(csv_of(records), encoding="utf-8")
    (out / "tradeoffs.md").write_text("\n".join(texts), encoding="utf-8")
    last = next(reversed(groups))
    drawn = figure(records, search=last, reference=0.0, x="bytes", y="loss on test less the full model's")
    write_html(drawn, out / "tradeoffs.html")
    write_png(drawn, out / "tradeoffs.png")
    return "\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    judged = []
    for each in bench.judged():
        judged.append(each)
        print(each.approach, each.seed, each.keep, each.counts, each.gap, flush=True)
    text = written(bench, judged)
    print(f"search: {bench.seen.examples} examples or windows, test: {bench.test.examples}\n\n{text}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--task", default="text")
    parser.add_argument("--data")
    parser.add_argument("--score", default="likelihood")
    parser.add_argument("--evoesap-score", default="acceptance", choices=("acceptance", "likelihood", "choice"))
    parser.add_argument("--order", default="ean", help="whose ranking budgets are searched over")
    parser.add_argument("--sizes", type=numbers, default=[4, 6, 8, 16, 24], help="experts a layer, the model's k least")
    parser.add_argument("--limit", type=int, default=24, help="examples or windows to search on")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--evaluations", type=float, default=60.0, help="of the full model: what a search may cost")
    parser.add_argument("--population", type=int, default=20, help="of NSGA-II")
    parser.add_argument("--searches", type=lambda text: text.split(","), default=[*SEARCHES])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--out", type=Path, default=Path("tradeoffs"), help="folder")
    parser.add_argument("--small", action="store_true", help="seconds, on the model that comes with moeopt")
    args = parser.parse_args(arguments)
    if args.small:
        args.model, args.score, args.sizes, args.limit, args.test_limit = str(MODEL), "choice", [4], 4, 8
        args.evaluations, args.population = 6.0, 4
    elif not (args.model and args.data):
        parser.error("give --model and --data, or --small")
    return args


if __name__ == "__main__":
    main()
