"""What the papers' figures show of a model: which experts run, what more of them add, what every kept set costs.

    python studies/papers/figures.py [--small] [--out figures]
    python studies/papers/figures.py --model MODEL --task arc_easy=arc_easy/

Experts are judged on search examples, losses taken on test examples. As HTML and PNG: `activation`, before and after
NAEE's pruning (EEP, arXiv 2407.00945, figure 4); `ensemble`, loss against experts kept, in all layers and in single
ones, bars being the 95% interval of the difference from the full model (EEP, figure 3); `kept_sets_*`, the output error
of every set of experts a layer could keep, with the sets that a method chose (NAEE, arXiv 2402.14800); `search`, the
losses of EEP's trials over what they cost. A folder of `eep_tasks.py` as `--out`, with its limits, is
gone on with: its search is drawn.

Demo model, caesar, 4 of 8 experts, 2,488 search tokens, 300 test questions; medians over the 6 layers, least to most:

| | picks that its experts had | rank of its sets among 70 | error / median error | test loss, this - full (0.0224) |
|---|---|---|---|---|
| naee | 94% (80% to 99%) | 1 | 0.10 (0.03 to 0.15) | -0.0003 [-0.0006, -0.0000] |
| frequency | 95% (86% to 99%) | 4 (1 to 18) | 0.14 (0.03 to 0.77) | +0.0119 [+0.0093, +0.0150] |
| reap | 63% (51% to 93%) | 14 (3 to 26) | 0.34 (0.10 to 0.41) | +0.8740 [+0.7033, +1.0461] |

The main expert of a layer runs for 93% (88% to 96%) of tokens. After NAEE's pruning the pattern is the same, with the
picks of removed experts shared out. From layer 1 on, sets fall into two bands: errors of 0.03 to 0.73 medians with the
main expert, 1.27 to 2.00 without it. `frequency` and `reap` keep it, too. But in layer 0 expert 5, picked for 15% of
tokens, matters more than expert 3 with 20% (0.11 medians by NAEE's choice, 0.77 by frequency); and `reap`, which asks
what an expert adds where it runs, not how often, drops experts that run for 55% to 66% of tokens in layers 1, 3 and 4.

By soft activation, four experts in all layers have the test loss of eight (0.0223), three a little more (0.0333), two
much more (0.6005), and one is useless (4.3445). That is layer 0: alone it costs as much (two 0.7201, one 4.5208), while
layer 5 alone needs only two (0.0217; one 0.2504). On larger models it was not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _papers
import numpy as np

import moeopt
from moeopt import methods
from moeopt.evaluation import Evaluation
from moeopt.plan import Plan
from moeopt.report import figures
from moeopt.report.dashboard.digest import digest
from moeopt.results import analysis


def main() -> None:
    args = arguments()
    if args.small:
        args.limit, args.test_limit, args.trials, args.layers, args.methods = 8, 16, 8, [0], []
    (model, tokenizer), task = _papers.load(args), _papers.open_task(args.task)
    calibration = methods.Calibration(model, tokenizer, task, limit=args.limit)
    test = moeopt.Evaluator(model, tokenizer, task, split="test", limit=args.test_limit)
    shape, full = calibration.shape, test.evaluate(None)
    keeps = f"{args.keep} of {shape.experts} experts"
    names = list(dict.fromkeys(["naee", *args.methods]))
    plans = {name: made.plan for name, made in methods.plans(names, calibration, keep=args.keep).items()}
    print(f"{task.name}, {keeps}; {calibration.tokens} search tokens, {test.tokens} test tokens")

    before, after = analysis.activation_shares(calibration), analysis.activation_shares(calibration, plans["naee"])
    title = f"{task.name}: how often each expert is used, before and after NAEE keeps {keeps}"
    save(figures.activation_pattern(before, after, plans["naee"], title=title), args.out, "activation")
    main_expert = spread(before.max(axis=1), ".0%")
    print(f"full model       test loss {full.loss:.4f}; main expert of a layer for {main_expert} of tokens")
    for name, plan in plans.items():
        run = [row[list(part.kept or ())].sum() / row.sum() for row, part in zip(before, plan.layers)]
        print(f"{name:16} keeps experts with {spread(run, '.0%')} of a layer's picks; test loss {against(test, plan)}")

    layers = [0, shape.layers - 1] if args.layers is None else args.layers
    losses = analysis.ensemble_losses(test, calibration, layers=layers)
    curves = {name: curve(row, full) for name, row in losses.items()}
    title = f"{task.name}: loss against the number of experts kept, best first by soft activation"
    save(figures.ensemble_curve(curves, full.loss, title=title, label="test loss"), args.out, "ensemble")
    for name, row in losses.items():
        print(f"{name:16} test loss, 1 to {shape.experts} kept: {' '.join(f'{e.loss:.4f}' for e in row)}")

    errors = analysis.kept_set_errors(calibration, keep=args.keep)
    for name, plan in plans.items():
        title = f"{task.name}: output error of every set of {keeps}, and what {name} chose"
        save(figures.kept_set_errors(errors, plan, title=title), args.out, f"kept_sets_{name}")
        ranks, ratios = zip(*(standing(layer, part.kept or ()) for layer, part in zip(errors, plan.layers)))
        print(f"{name:16} rank {spread(ranks, '.0f')} of {len(errors[0])}, {spread(ratios, '.2f')} of the median error")
    worst = [max(layer.values()) / float(np.median(list(layer.values()))) for layer in errors]
    print(f"worst set        {spread(worst, '.2f')} of the median error")

    read = digest(_papers.search(model, tokenizer, task, args.keep, args, args.out / _papers.label(args.task)))
    costs, values = np.cumsum([row.cost for row in read.rows]), [row.loss for row in read.rows]
    loss = None if read.full is None else read.full.loss
    title = f"{task.name}: EEP's search for {keeps}"
    save(figures.search_progress(costs, values, full_model=loss, title=title), args.out, "search")


def curve(row: list[Evaluation], full: Evaluation) -> tuple[list[float], list[tuple[float, float]]]:
    """Losses, and the full model's plus the ends of the interval of the difference from it."""
    gaps = [moeopt.paired_bootstrap(evaluation, full) for evaluation in row]
    return [evaluation.loss for evaluation in row], [(full.loss + gap.low, full.loss + gap.high) for gap in gaps]


def against(test: moeopt.Evaluator, plan: Plan) -> str:
    pruned, full = test.evaluate(plan), test.evaluate(None)
    return f"{pruned.loss:.4f}, test - full {moeopt.paired_bootstrap(pruned, full)}"


def standing(layer: Mapping[tuple[int, ...], float], experts: tuple[int, ...]) -> tuple[int, float]:
    """Rank, from 1, of the kept set among a layer's, and its error over their median."""
    errors = sorted(layer.values())
    return errors.index(layer[experts]) + 1, layer[experts] / float(np.median(errors))


def spread(values: Any, form: str) -> str:
    """Median, and least to most over layers."""
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def save(figure: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures.write_html(figure, folder / f"{name}.html")
    figures.write_png(figure, folder / f"{name}.png")


def arguments() -> argparse.Namespace:
    parser = _papers.arguments(__doc__, "figures")
    parser.add_argument("--task", metavar="NAME[=PATH]", default=f"{_papers.DEMO}{moeopt.demo.DEFAULT_SKILL}")
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs="*", help="MoE layers to reduce alone; default: first and last")
    parser.add_argument("--methods", nargs="+", default=["naee", "frequency", "reap"], help="that prune")
    _papers.add_search(parser)
    parser.set_defaults(limit=100, test_limit=300, trials=60)
    return parser.parse_args()


if __name__ == "__main__":
    main()
