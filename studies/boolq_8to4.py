"""BoolQ, 8 experts to 4: prune, then merge; the best 20 plans judged on dev, and the best of those once on test.

    python studies/boolq_8to4.py --model MODEL --data boolq_validation.jsonl
    python studies/boolq_8to4.py --small        # the model that moeopt ships, on one of its own skills

Run it again to resume. On a real Mixtral 8x7B the released configuration of EEP is 4 groups and 400 trials.

Not yet run on a Mixtral 8x7B. On a 692 M-parameter, 30-layer, 8-expert Mixtral whose experts were tuned on different
domains (10 groups, 100 trials, 60 of them prunings, seed 0, 16 search questions of 2,635 tokens, 19,833 test tokens;
`benchmarks/eep_quality.py`): test loss 1.203 for the full model, 1.016 for the best of 20 random prunings, 0.816 for
the best pruning of the search (test - full -0.388 [-0.485, -0.290]), 0.801 after merging (merge - prune -0.014
[-0.074, +0.045], no difference; with `band=0.1` in the merge phase). Accuracy is near chance throughout.
"""

from __future__ import annotations

import argparse

from rich.console import Console

import moeopt
from moeopt import report
from moeopt.results.selection import selected_trial


def main() -> None:
    args = arguments()
    if args.small:
        args.model, args.trials, args.limit, args.dev_limit, args.test_limit = str(moeopt.demo.MODEL), 12, 8, 8, 16
        task = moeopt.demo.skill_task("caesar")
    else:
        task = moeopt.tasks.get("boolq", data=args.data)
    model, tokenizer = moeopt.load(args.model, device_map=args.device_map)
    space = moeopt.EEPSpace.of(model, keep=4, groups=args.groups, router="prob")
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit)
    study = moeopt.create_study(
        args.study,
        objective=objective,
        storage=args.storage,
        sampler="eep",
        seed=args.seed,
        load_if_exists=True,
        initial=min(30, args.trials // 3),
        prune_until=min(100, args.trials * 2 // 3),
    )
    moeopt.optimize(study, objective, n_trials=args.trials)

    limits = {"dev_limit": args.dev_limit, "test_limit": args.test_limit}
    Console(width=130).print(report.view(moeopt.select(study, objective, stock_only=bool(args.export), **limits)))
    if args.export:
        moeopt.export(selected_trial(study), args.export, study=study, model=model)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    parser.add_argument("--model", default="mistralai/Mixtral-8x7B-Instruct-v0.1")
    parser.add_argument("--data", help="BoolQ as JSONL or parquet; by default from the hub")
    parser.add_argument("--device-map", default=None, help='"auto" spreads the model over devices')
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--limit", type=int, default=200, help="search questions")
    parser.add_argument("--dev-limit", type=int, default=500, help="dev questions, that 20 plans are judged on")
    parser.add_argument("--test-limit", type=int, default=1000, help="test questions, for the best of them")
    parser.add_argument("--storage", default="sqlite:///moeopt.db")
    parser.add_argument("--study", default="boolq-8to4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", metavar="DIR", help="choose what an ordinary checkpoint can hold, and write it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
