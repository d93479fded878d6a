"""NAEE's tables (arXiv 2402.14800): r experts with and without dynamic skipping, calibrated on the domain or on others.

    python studies/papers/naee_tables.py --model MODEL --tasks arc_easy=arc_easy/ --calibrate-on text=c4.jsonl
    python studies/papers/naee_tables.py --small        # the model that moeopt ships, a skill of its, and English text

Every task is calibrated on its own search examples, and on those of each of `--calibrate-on`, where the paper has C4:
the sets of experts that are kept, and the thresholds of skipping. `active` is the experts that a token runs in a layer;
the tokens per second that they save are in `benchmarks/active_speed.py`. Losses of tasks that choose among options are
minus the log of the right option's share.

The demo model's `caesar` (`--tasks demo:caesar --calibrate-on demo:text`), 48 search examples (of text: windows), 128
test questions; accuracy and loss on test, with 95% intervals of the difference from the full model:

| calibrated on | | active | accuracy | accuracy - full | loss | loss - full |
|---|---|---|---|---|---|---|
| | full | 2 | 1.000 | | .606 | |
| caesar | full, skipping | 1.49 | 1.000 | +.000 [+.000, +.000] | .606 | +.001 [-.000, +.001] |
| caesar | r = 6 | 2 | 1.000 | +.000 [+.000, +.000] | .606 | +.000 [-.001, +.001] |
| caesar | r = 6, skipping | 1.48 | 1.000 | +.000 [+.000, +.000] | .606 | +.000 [-.001, +.001] |
| caesar | r = 4 | 2 | 1.000 | +.000 [+.000, +.000] | .607 | +.001 [-.001, +.003] |
| caesar | r = 4, skipping | 1.49 | 1.000 | +.000 [+.000, +.000] | .607 | +.001 [-.001, +.003] |
| text | full, skipping | 1.37 | 1.000 | +.000 [+.000, +.000] | .607 | +.001 [-.000, +.003] |
| text | r = 6 | 2 | .766 | -.234 [-.305, -.164] | .907 | +.302 [+.279, +.324] |
| text | r = 6, skipping | 1.71 | .789 | -.211 [-.281, -.141] | .897 | +.292 [+.269, +.315] |
| text | r = 4 | 2 | .438 | -.562 [-.648, -.469] | 1.220 | +.615 [+.587, +.643] |
| text | r = 4, skipping | 1.64 | .422 | -.578 [-.664, -.492] | 1.218 | +.612 [+.584, +.640] |

Calibrated on the domain, no difference from the full model at r = 6 and 4, with skipping or without, which saves a
quarter of the experts that run. Calibrated on text, the experts that the skill needs are lost at r = 6 already; the
thresholds of skipping carry over, the sets do not. Not yet run on a larger model than
this, whose experts differ much, on C4, or on a published task.
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
