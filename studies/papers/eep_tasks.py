"""EEP's Table 1 (arXiv 2407.00945): every task by itself, the full model against r experts of it, chosen in six ways.

    python studies/papers/eep_tasks.py --model MODEL --tasks arc_easy=arc_easy/ multiple_choice=piqa.jsonl
    python studies/papers/eep_tasks.py --model MODEL           # the paper's ten, in its prompts, from the hub
    python studies/papers/eep_tasks.py --small                 # the model that moeopt ships, on its own skills

A random pruning (mean of `--draws`), the most frequent experts, those of the highest summed gate, NAEE's, and EEP's
search before and after it merges, in its proportions of random, pruned and merged solutions. All look at the same
search questions and are judged on test. Losses are minus the log of the right option's share among the options.
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
