"""EEP's Table 1 (arXiv 2407.00945): every task by itself, the full model against r experts of it, chosen in six ways.

    python studies/papers/eep_tasks.py --model MODEL --tasks arc_easy=arc_easy/ multiple_choice=piqa.jsonl
    python studies/papers/eep_tasks.py --model MODEL           # the paper's ten, in its prompts, from the hub
    python studies/papers/eep_tasks.py --small                 # the model that moeopt ships, on its own skills

A random pruning (mean of `--draws`), the most frequent experts, those of the highest summed gate, NAEE's, and EEP's
search before and after it merges, in its proportions of random, pruned and merged solutions. All look at the same
search questions and are judged on test. Losses are minus the log of the right option's share among the options.

SmolMoE (692 M parameters, 8 experts, top-2, bf16), ARC-Easy, 8 -> 4, `--dtype bfloat16 --limit 24 --test-limit 96
--trials 24 --draws 2`: 24 search questions, 96 of test, a search of 2 random, 4 pruned and 18 merged solutions (611 k
layer-tokens). Accuracy and loss on test, with 95% intervals of the difference from the full model:

| | accuracy | accuracy - full | loss | loss - full |
|---|---|---|---|---|
| full | .479 | | 2.457 | |
| random, mean of 2 | .464 | | 2.535 | |
| frequency | .469 | -.010 [-.031, +.000] | 2.508 | +.050 [-.028, +.118] |
| soft_activation | .479 | +.000 [-.031, +.031] | 2.500 | +.043 [-.032, +.110] |
| naee | .479 | +.000 [+.000, +.000] | 2.469 | +.012 [-.024, +.055] |
| EEP, prune only | .469 | -.010 [-.052, +.031] | 2.505 | +.048 [-.069, +.162] |
| EEP, prune + merge | .458 | -.021 [-.073, +.021] | 2.625 | +.168 [-.016, +.347] |

No difference between any of them and the full model, in accuracy or in loss. What the search gained on its 24 questions
(3.473 against the full model's 3.773) did not hold on test, where its merge has the highest loss of all, if not surely
a higher one than the full model. Two dozen questions are too few to search on, and nothing here chooses on dev, as the
paper does not; `moeopt select` does. r = 2, PIQA, BoolQ and WiC were not run, nor the paper's ten tasks and 400 trials:
COPA, MultiRC, WSC, RTE, CB, ReCoRD, DROP and SQuAD come from the hub.
"""

from __future__ import annotations

import _papers

import moeopt

TASKS = ("copa", "multirc", "wic", "wsc", "rte", "boolq", "cb", "record", "drop", "squad")


def main() -> None:
    parser = _papers.arguments(__doc__, "eep-tasks")
    parser.add_argument("--tasks", nargs="+", metavar="NAME[=PATH]", default=[f"eep_{name}" for name in TASKS])
    parser.add_argument("--keep", type=int, nargs="+", default=[4, 2])
    _papers.add_search(parser)
    args = parser.parse_args()
    if args.small:
        args.tasks, args.keep, args.trials, args.limit, args.test_limit = ["demo:caesar"], [4], 8, 6, 12
    model, tokenizer = _papers.load(args)
    lines: list[_papers.Line] = []
    for named in args.tasks:
        name = _papers.label(named)
        try:
            task = _papers.open_task(named)
        except moeopt.MoeoptError as error:
            print(f"not run: {name}: {error}", flush=True)
            continue
        for keep in args.keep:
            comparison = _papers.searched(model, tokenizer, task, keep, args, args.out / name)
            lines += _papers.table_1(f"{name}, {keep} of {comparison.shape.experts}", comparison)
            _papers.show(lines, args.out, title="EEP, Table 1")


if __name__ == "__main__":
    main()
