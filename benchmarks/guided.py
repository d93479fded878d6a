"""What a search gains by knowing the loss's derivative, at equal cost, and what of it holds.

    python benchmarks/guided.py --model MODEL --task text --data FILE --keep 8 --samplers eep,guided,local
    python benchmarks/guided.py --model MODEL --task arc_easy --data FOLDER --score choice --keep 2 --limit 160

Random prunings, one-shot methods, EEP as published (400 trials, from random prunings, no warm start), `local` and
`guided`, both from `--start`, until each has spent the layer-tokens of so many evaluations of the full model on the
same examples; calibration and guides count. Losses are over the full model's, those on test with paired 95% intervals.

Test loss over the full model's of a model of 12 M parameters whose 32 experts differ (top-4, 6 layers, trained on code
and text), searched on 24 windows (5.6 to 5.7 k tokens), tested on all of the split (10, 19 and 15 k), float32; searches
of 70 evaluations, 22 of them for their starts (naee and loss_aware), mean of three seeds, unraced:

| | python, 16 | docs, 16 | c, 16 | python, 8 | docs, 8 | c, 8 | evaluations |
|---|---|---|---|---|---|---|---|
| random, mean on search | +.828 | +.919 | +1.030 | +1.628 | +1.785 | +2.006 | 1 |
| random, best of 20 | +.630 | +.596 | +.604 | +1.142 | +1.302 | +1.207 | 20 |
| frequency | +.0529 | +.0894 | +.0520 | +.4221 | +.4046 | +.5782 | 1 |
| ean | +.0336 | +.0535 | +.0545 | +.3862 | +.3389 | +.6797 | 2 |
| reap | +.0827 | +.1426 | +.1750 | +.9528 | +.8501 | +.9954 | 2 |
| hc_smoe | +.3710 | +.7580 | +.5171 | +1.8074 | +1.9056 | +1.6961 | 8 |
| naee | +.0321 | **+.0437** | +.0506 | **+.2391** | +.3280 | +.4418 | 8 |
| loss_aware | **+.0272** | +.0488 | **+.0477** | **+.2391** | **+.3171** | **+.3958** | 13 |
| eep, 400 trials (one seed) | +.4217 | | | +.9072 | | | 345 |
| local | +.0284 | +.0437 | +.0523 | +.2430 | +.3183 | +.4187 | 70 |
| guided | +.0289 | +.0437 | +.0520 | +.2429 | +.3209 | +.4113 | 70 |
| on search: best start | +.0193 | +.0364 | +.0413 | +.2669 | +.2987 | +.3784 | |
| on search: local | +.0185 | +.0364 | +.0409 | +.2663 | +.2962 | +.3597 | |
| on search: guided | +.0133 | +.0334 | +.0391 | +.2572 | +.2910 | +.3308 | |

naee less loss_aware: +.0050 [.0005, .0095], -.0051 [-.0124, +.0010], +.0029 [-.0002, .0059], 0, +.0109 [.0038, .0186],
+.0460 [.0278, .0636]. So of one-shot methods loss_aware is the best, or tied, in all six, and better than every other
with its interval in one cell of each domain. EEP as published ends where one-shot methods do not begin: `guided` and
`local` are at its search loss with their first trial, naee's plan, after 9 of its 345 evaluations (1/38).

**What a search gains here hardly holds.** On search `guided` gains 5 to 20 times what `local` does over the start of
least search loss; on test only where that start is poor, c at r = 8 (naee's +.4418): .0476 on search, .0305 on test, 64
%, and loss_aware, which has a higher search loss, is better still. More examples for the same layer-tokens (72 windows,
17 k tokens, c 12 k, raced at 4 rungs, methods still calibrated on 24), r = 8, gain on search and on test, mean of three
seeds: python .0057 and -.0063, docs .0016 and -.0007, c .0190 and .0287; unraced on 24 windows python .0097 and -.0038,
docs .0077 and -.0038, c .0476 and .0305. The model that moeopt ships, r = 2, at 100 evaluations of 24 examples, starts
calibrated on 24, `guided`; gains over the best start on search and on 400 test questions:

| | 24 examples | 48 | 96, 4 rungs |
|---|---|---|---|
| caesar, sort, roman (3 seeds) | +.348, +.204 | +.271, +.191 | +.242, +.196 |
| sort, roman, add, dates (2 seeds) | +.0164, -.0049 | +.0039, -.0023 | +.0027, +.0002 | |
| the same, on test, choosing among the best 10 on 96 dev questions | -.0037 | -.0026 | +.0001 | |

(With `loss_aware` as it was before it took 80 % intervals, which leaves less to gain.) So 59, 70 and 81 % of a large
gain hold, and of small ones less than nothing at 24 and 48; 192 leave too few trials (9
to 17; one of caesar's three seeds finds anything). That is why `moeopt search` races with `guided` and `local`.

A 692 M-parameter, 30-layer, 8-expert Mixtral whose experts were tuned on different domains, ARC-Easy, methods
calibrated on 160 questions by `choice`, 1,000 test questions, float32; against the full model:

| r = 2 | evaluations | search | choice loss, test [95%] | accuracy, test [95%] |
|---|---|---|---|---|
| frequency | .8 | +.0266 | +.0166 [+.0038, +.0282] | -.032 [-.049, -.015] |
| reap | 1.5 | -.0056 | +.0092 [-.0076, +.0258] | +.005 [-.012, +.022] |
| naee | 3.1 | -.0060 | -.0117 [-.0208, -.0039] | -.006 [-.018, +.005] |
| hc_smoe | 3.1 | +.0050 | +.0008 [-.0066, +.0077] | -.011 [-.023, +.001] |
| loss_aware | 8.7 | -.1319 | -.0944 [-.1155, -.0742] | +.043 [+.023, +.062] |
| guided, raced at 3 rungs, 69 trials | 53 | -.1419 | **-.0994 [-.1202, -.0792]** | **+.054 [+.033, +.074]** |

| r = 4 | evaluations | search | choice loss, test [95%] | accuracy, test [95%] |
|---|---|---|---|---|
| frequency | .8 | +.0129 | +.0092 [+.0044, +.0139] | -.008 [-.019, +.003] |
| reap | 1.5 | -.0050 | -.0073 [-.0150, -.0009] | +.001 [-.009, +.011] |
| naee | 3.1 | +.0040 | +.0028 [-.0003, +.0053] | -.005 [-.012, +.001] |
| hc_smoe | 3.1 | +.0083 | +.0045 [+.0013, +.0077] | -.008 [-.018, +.001] |
| loss_aware | 8.7 | -.1341 | **-.0909 [-.1108, -.0709]** | **+.050 [+.029, +.070]** |

loss_aware is above every other method by 3.8 points [1.7, 5.8] (reap, r = 2), 4.9 [2.8, 7.0] (reap, r = 4) or more, and
above the full model; guided (one seed) is above loss_aware by 1.1 points [0.0, 2.2] and .0050 of choice loss [-.0001,
.0100], half of the .0100 that it gained on search. Of what loss_aware gains on the questions that it looked at 68 to 72
% holds. At r = 4 that takes gauss_newton 1 for adding up (`signed` alike, +.049), which the judged quarter, 40
questions, prefers to `output` with its 80 % interval, and not with its 95 % one (-.0778 [-.1682, +.0003]); with
`output` it would be +.0038 [.0021, .0054] and -.006. That is why 80 % are asked for; on the model above no cell
changes.

Text, r = 4, methods on 24 windows (5.8 k tokens), 24 of test, loss against full:

| | python, search | python, test [95%] | docs, search | docs, test [95%] |
|---|---|---|---|---|
| frequency | +.0003 | -.0011 [-.0040, +.0021] | -.0036 | -.0081 [-.0145, -.0028] |
| reap | -.0047 | -.0048 [-.0083, -.0014] | -.0003 | .0000 [-.0030, +.0030] |
| naee | -.0002 | -.0017 [-.0030, -.0005] | -.0012 | -.0047 [-.0075, -.0021] |
| hc_smoe | -.0052 | -.0044 [-.0076, -.0014] | +.0010 | +.0009 [-.0015, +.0032] |
| loss_aware | -.0232 | **-.0135 [-.0222, -.0053]** | -.0147 | **-.0095 [-.0150, -.0049]** |

| | c, search | c, test [95%] | c, r = 2, search | c, r = 2, test [95%] |
|---|---|---|---|---|
| frequency | -.0078 | -.0116 [-.0200, -.0047] | -.0275 | -.0275 [-.0523, -.0070] |
| reap | -.0173 | -.0080 [-.0183, +.0006] | -.0192 | -.0183 [-.0422, +.0018] |
| naee | -.0046 | -.0051 [-.0092, -.0019] | -.0212 | -.0224 [-.0433, -.0053] |
| hc_smoe | +.0050 | -.0057 [-.0124, +.0002] | +.0041 | -.0159 [-.0303, -.0038] |
| loss_aware | -.0403 | -.0177 [-.0404, +.0006] | -.0485 | -.0295 [-.0621, -.0026] |

loss_aware (gauss_newton 1 in both) is better than every other with its interval on python, and on docs but for
frequency (.0014 [-.0037, .0058]); on c it is best, and better than reap alone with its interval (r = 2, .0113 [.0031,
.0207]), as those of 24 windows are wide. Of its gain 58, 65, 44 and 61 % holds. Not run there: three seeds of guided
and local, EEP.

Python, r = 2, test: loss_aware **-.0143 [-.0235, -.0065]**, frequency -.0091 [-.0148, -.0032], hc_smoe -.0070 [-.0115,
-.0027], m_smoe:aligned -.0060 [-.0117, -.0004], naee -.0055 [-.0085, -.0025], reap +.0137 [+.0070, +.0206], and mone
+4.77 [+3.73, +6.10]: of near copies any is better than a constant, and a router that stays whole sends most tokens to
constants. On ARC-Easy, too: mone, r = 4, +.1185 [.0851, .1525] and accuracy -.102 [-.131, -.073], one random pruning
+.0724 [.0487, .0975] and -.026 [-.047, -.006].

One expert a token instead of two (`benchmarks/refit.py --k 2,1 --refit-limits ""`), ARC-Easy, r = 4, 1,000 test
questions: loss_aware -.0966 [-.1218, -.0720] and accuracy **+.052 [+.030, +.074]**, as with two (+.050); naee +.0365
[+.0231, +.0490] and -.042 [-.060, -.026], with two -.005; random +.0709 [.0486, .0948] and -.027 [-.047, -.008], as
with two; mone +.1489 [.1131, .1869] and -.100 [-.128, -.073].

By `likelihood` in place of `choice` loss_aware has the same accuracy at r = 2, +.043 [+.023, +.063]; guided gains .141
[.124, .159] more of that loss on test, and no accuracy by it: +.044 [+.023, +.065], over loss_aware +.001 [-.012,
+.014]. PIQA, r = 2, methods on 128 questions by `choice`, 756 of test: nothing differs from the full model, or from one
another, by more than luck (choice loss between -.0019 [-.0041, .0000], loss_aware, and +.0039, random; accuracy between
-.011 and +.004), so that it does not tell which score to search by either. `likelihood` is the default still.

At r = 16, next to loss_aware's plan, 3 of 90 single swaps gain, up to .0003; what the derivative says of swaps
correlates with what they do at .96 (.87 at r = 8), with a = 1.3 (1.8) and b = .8 (.5). Gradient steps in W_RM (logits,
24 of Adam with .02) take search from +.286 to +.138 and test from +.283 to +.332: on so few tokens a dense mapping is
learnt by heart, so guides are of experts alone. Earlier loss_aware ranked single experts beyond 20,000 sets (+.0348,
+.0534 at r = 16, python and c; +.2833, +.4730 at r = 8). NAEE's squared error in other metrics (E[g g'] over tokens,
ridge 0 to 1; <g, dy>^2 + lam |g|^2 |dy|^2) keeps naee's sets or worse ones.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from typing import Literal

import numpy as np
import optuna
import torch
from rich.console import Console
from rich.table import Table

import moeopt
from moeopt import methods
from moeopt.evaluation import Evaluation, paired_bootstrap
from moeopt.plan import Plan
from moeopt.trials.genome import CALIBRATION

ONE_SHOT = ("frequency", "ean", "reap", "hc_smoe", "naee", "loss_aware")


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    console = Console(width=170)
    table = Table(
        "seed", "method", "trials", "evaluations", "search", "test [95%]", f"test - {bench.best} [95%]", *bench.more
    )
    for name in args.methods:
        table.add_row("", name, "", *bench.row(bench.made[name].plan, bench.made[name].layer_tokens))
    if args.random:
        table.add_row("", *bench.random(args.random))
    console.print(table)
    reached: dict[str, float] = {}
    for sampler in args.samplers:
        for seed in args.seeds[:1] if sampler == "eep" else args.seeds:
            trials, plan, curve = bench.search(sampler, seed)
            table.add_row(str(seed), sampler, str(trials), *bench.row(plan, curve[-1][0]))
            console.print(table)
            if sampler == "eep":
                reached = {"loss": curve[-1][1], "spent": curve[-1][0]}
            elif reached:
                spent = next((spent for spent, best in curve if best <= reached["loss"]), None)
                what = "never is" if spent is None else f"is, after {spent / reached['spent']:.4f} of its layer-tokens,"
                console.print(f"{sampler}, seed {seed}, {what} at EEP's search loss")


class Bench:
    """A model and a task, what the full model gives, and what one-shot methods find."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = moeopt.load(args.model, dtype=torch.float32)
        self.task = moeopt.tasks.get(args.task, data=args.data, **json.loads(args.task_options))
        parts = self.model, self.tokenizer, self.task
        self.test = moeopt.Evaluator(*parts, split="test", limit=args.test_limit, score=args.score)
        self.seen = moeopt.Evaluator(*parts, limit=args.limit, score=args.score)
        self.full = {"search": self.seen.evaluate(None), "test": self.test.evaluate(None)}
        calibration = methods.Calibration(*parts, limit=args.calibrate or args.limit, score=args.score)
        groups = moeopt.PruneSpace.of(self.model, keep=args.keep, groups=args.groups).groups
        self.made = methods.plans([*args.methods], calibration, keep=args.keep, groups=groups)
        losses = {name: self.seen.evaluate(made.plan).loss for name, made in self.made.items()}
        self.best = min(losses, key=lambda name: losses[name])
        self.reference = self.test.evaluate(self.made[self.best].plan)
        self.more = ["accuracy, test - full [95%]", f"- {self.best} [95%]"] if self.task.chooses else []

    def random(self, number: int) -> list[str]:
        """A row of the mean and the best of random prunings: search losses, and the best's on test."""
        space = moeopt.PruneSpace.of(self.model, keep=self.args.keep, groups=self.args.groups)
        plans = [space.decode(space.sample(np.random.default_rng(seed))) for seed in range(number)]
        losses = [self.seen.evaluate(plan).loss for plan in plans]
        row = self.row(plans[int(np.argmin(losses))], number * self.full["search"].layer_tokens)
        mean = np.mean(losses) - self.full["search"].loss
        return [f"random, best of {number}; mean {mean:+.4f} on search", "", *row]

    def search(self, sampler: str, seed: int) -> tuple[int, Plan, list[tuple[int, float]]]:
        """How many trials a search had, its best plan, and (layer-tokens, best loss so far) by trial.

        What one-shot starts cost is counted with the trials that hold them.
        """
        args, eep = self.args, sampler == "eep"
        space = (moeopt.EEPSpace if eep else moeopt.PruneSpace).of(self.model, keep=args.keep, groups=args.groups)
        objective = moeopt.Objective(
            self.model, self.tokenizer, self.task, space, limit=args.limit, score=args.score,
            guide=0.3 if sampler == "guided" else 0.0, rungs=1 if eep else args.rungs,
        )  # fmt: skip
        starts = {name: self.made[name] for name in args.start}
        study = moeopt.create_study(
            objective=objective, storage=None, sampler=sampler, seed=seed, warm_starts={} if eep else starts,
            pruner="racing" if args.rungs > 1 and not eep else None,
        )  # fmt: skip
        budget = args.evaluations * self.full["search"].layer_tokens
        curve: list[tuple[int, float]] = [(0, math.inf)]
        while len(study.trials) < args.eep_trials if eep else curve[-1][0] < budget:
            moeopt.optimize(study, objective, n_trials=1 + sum(t.state.is_finished() for t in study.trials))
            done = [t for t in study.trials if t.state.is_finished()]
            spent = sum(t.user_attrs.get(key, 0) for t in done for key in ("layer_tokens", CALIBRATION))
            curve.append((spent, study.best_value))
        return len(study.trials), space.plan(study.best_trial), curve

    def row(self, plan: Plan, spent: int) -> list[str]:
        search, test = self.seen.evaluate(plan), self.test.evaluate(plan)
        self.seen.clear()
        self.test.clear()
        cost = f"{spent / self.full['search'].layer_tokens:.1f}"
        gap = f"{search.loss - self.full['search'].loss:+.4f}"
        others = self.full["test"], self.reference
        scores: list[Literal["loss", "accuracy"]] = ["loss", "accuracy"] if self.more else ["loss"]
        return [cost, gap, *(difference(test, other, what) for what in scores for other in others)]


def difference(a: Evaluation, b: Evaluation, what: Literal["loss", "accuracy"]) -> str:
    """The mean of a less that of b, and its interval."""
    return str(paired_bootstrap(a, b, of=what))


def arguments() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="text")
    parser.add_argument("--data", required=True, type=lambda text: json.loads(text) if text[0] == "{" else text)
    parser.add_argument("--task-options", default="{}", help="JSON")
    parser.add_argument("--score", default="likelihood")
    parser.add_argument("--keep", type=int, required=True)
    parser.add_argument("--groups", type=int, help="of layers that share a choice; default: each its own")
    parser.add_argument("--limit", type=int, default=24, help="examples or windows to search on")
    parser.add_argument("--calibrate", type=int, help="examples or windows that methods look at, if not as many")
    parser.add_argument("--rungs", type=int, default=1, help="at which a trial of guided and local may be stopped")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--evaluations", type=float, default=70.0, help="of the full model: what a search may cost")
    parser.add_argument("--eep-trials", type=int, default=400)
    parser.add_argument("--methods", type=listed, default=[*ONE_SHOT])
    parser.add_argument("--start", type=listed, default=["naee", "loss_aware"], help="of the methods")
    parser.add_argument("--samplers", type=listed, default=["guided", "local"], help="eep first, once")
    parser.add_argument("--random", type=int, default=20, help="random prunings")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in listed(text)], default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
