"""EEP on MMLU (arXiv 2407.00945): search on one category's subjects, judge on these and on all held-out subjects.

    python studies/papers/eep_mmlu.py --model MODEL [--data mmlu/] [--categories stem humanities]
    python studies/papers/eep_mmlu.py --model MODEL --instead arc_easy=arc_easy/ multiple_choice=piqa.jsonl
    python studies/papers/eep_mmlu.py --small        # the shipped model, on its own skills in MMLU's form

`--data` is a folder of dev, validation and test rows in the hub's form; by default the hub's. Searches see validation
questions of the category; "seen" are its test questions, "unseen" those of every subject of the other categories.
`--instead` puts other tasks in the place of MMLU: the first is searched on, the others are unseen; a folder of
`eep_tasks.py` that has it as `--out` is gone on with. Losses as there.

Not yet run on MMLU, whose rows come from the hub, nor on other tasks in its place: nothing is known of how far what is
found on one category holds on others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import _papers

import moeopt
from moeopt.evaluation.store import FolderStore, StoredEvaluators
from moeopt.results.method_comparison import Row
from moeopt.tasks import Task

CATEGORIES = ("stem", "humanities", "social_sciences", "other")


def main() -> None:
    parser = _papers.arguments(__doc__, "eep-mmlu")
    parser.add_argument("--data", help="folder of MMLU's rows")
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, help="each searched on")
    parser.add_argument("--instead", nargs="+", metavar="NAME[=PATH]", help="tasks: searched on, and unseen")
    parser.add_argument("--keep", type=int, nargs="+", default=[4, 2])
    _papers.add_search(parser)
    args = parser.parse_args()
    if args.small:
        args.data, args.categories, args.keep = mmlu_of_skills(args.out / "mmlu"), ["stem"], [4]
        args.trials, args.limit, args.test_limit = 8, 6, 12
    model, tokenizer = _papers.load(args)
    lines: list[_papers.Line] = []
    for name, task, unseen in tasks(args):
        for keep in args.keep:
            comparison = _papers.searched(model, tokenizer, task, keep, args, args.out / name)
            where, score = f"{keep} of {comparison.shape.experts}, {name}", comparison.score
            seen = _papers.table_1(f"{where}: seen", comparison)
            lines += seen
            for other, held_out in unseen.items():
                test = moeopt.Evaluator(model, tokenizer, held_out, split="test", limit=args.test_limit, score=score)
                lines += judged_on(seen, test, f"{where}: {other}", args.out / f"{name}.jsonl")
            _papers.show(lines, args.out, title="EEP, searched on some subjects, judged on others")


def tasks(args: argparse.Namespace) -> Iterator[tuple[str, Task, dict[str, Task]]]:
    """A name, the task that is searched on, and those that are not, by name."""
    if args.instead:
        first, *others = args.instead
        yield _papers.label(first), _papers.open_task(first), {_papers.label(o): _papers.open_task(o) for o in others}
        return
    named = "eep_mmlu" if args.data is None else f"eep_mmlu={args.data}"
    for category in args.categories:
        seen, unseen = (_papers.open_task(named, subjects=category, held_out=held) for held in (False, True))
        yield category, seen, {"unseen": unseen}


def judged_on(lines: list[_papers.Line], test: moeopt.Evaluator, where: str, records: Path) -> list[_papers.Line]:
    """The same plans on another task's test examples; means over random prunings, which are no plan, are left out."""
    store = FolderStore(records)
    stored = StoredEvaluators({"test": test}, store)
    judged: dict[str, Row] = {}
    for line in lines:
        if line.row.evaluations:
            on = stored.evaluate(line.row.plan, "test")
            loss, accuracy = {"test": on.loss}, {"test": on.accuracy}
            judged[line.name] = replace(line.row, loss=loss, accuracy=accuracy, evaluations={"test": on})
    store.close()
    full = judged["full model"]
    return [_papers.Line(where, name, row, full) for name, row in judged.items()]


def mmlu_of_skills(folder: Path) -> str:
    """Questions of the demo model's skills in MMLU's form, a skill in the place of each of four subjects."""
    subjects = {"anatomy": "add", "astronomy": "caesar", "philosophy": "roman", "virology": "dates"}
    folder.mkdir(parents=True, exist_ok=True)
    for split, theirs in {"dev": "train", "validation": "search", "test": "test"}.items():
        rows = [
            {"question": row["prompt"], "subject": subject, "choices": row["options"], "answer": row["answer"]}
            for subject, skill in subjects.items()
            for row in moeopt.demo.skills.rows(skill, theirs, 12)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder)


if __name__ == "__main__":
    main()
