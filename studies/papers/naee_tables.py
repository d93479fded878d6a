"""NAEE's tables (arXiv 2402.14800): r experts with and without dynamic skipping, calibrated on the domain or on others.

    python studies/papers/naee_tables.py --model MODEL --tasks arc_easy=arc_easy/ --calibrate-on text=c4.jsonl
    python studies/papers/naee_tables.py --small        # the model that moeopt ships, a skill of its, and English text

Every task is calibrated on its own search examples, and on those of each of `--calibrate-on`, where the paper has C4:
the sets of experts that are kept, and the thresholds of skipping. `active` is the experts that a token runs in a layer;
the tokens per second that they save are in `benchmarks/active_speed.py`. Losses of tasks that choose among options are
minus the log of the right option's share.
"""

from __future__ import annotations

import _papers

from moeopt.results.method_comparison import compare


def main() -> None:
    parser = _papers.arguments(__doc__, "naee-tables")
    parser.add_argument("--tasks", nargs="+", metavar="NAME[=PATH]", default=["arc_easy", "boolq", "piqa"])
    parser.add_argument("--calibrate-on", nargs="+", metavar="NAME[=PATH]", default=[])
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4])
    args = parser.parse_args()
    if args.small:
        args.tasks, args.calibrate_on, args.keep = ["demo:caesar"], ["demo:text"], [4]
        args.limit, args.test_limit = 6, 12
    model, tokenizer = _papers.load(args)
    lines: list[_papers.Line] = []
    for named in args.tasks:
        name, task = _papers.label(named), _papers.open_task(named)
        for source in dict.fromkeys([named, *args.calibrate_on]):
            on = _papers.label(source)
            comparison = compare(
                model, tokenizer, task, keep=args.keep, methods=["naee"], skipping=True, draws=0,
                calibration=None if source == named else _papers.open_task(source), limit=args.limit,
                test_limit=args.test_limit, score=_papers.score_of(task), out=args.out / f"{name}, calibrated on {on}",
            )  # fmt: skip
            full = comparison.full
            for row in comparison.rows:
                said = row.name if row.kind == "full" else f"r = {row.keep}, {row.name}"
                lines.append(_papers.Line(f"{name}, calibrated on {on}", said, row, full))
            _papers.show(lines, args.out, title="NAEE", extra=[("active", lambda line: f"{line.row.active:.2f}")])


if __name__ == "__main__":
    main()
