"""How a selection is shown: what was compared on all three splits, the candidates, and what the numbers say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.errors import StudyError
from moeopt.report.formatting import DASH, number, percent, size
from moeopt.report.tables import Columns, json_text, table, write
from moeopt.results.selection.record import Selection
from moeopt.showing import line
from moeopt.statistics import Interval
from moeopt.trials.selected import FULL, SEARCH_BEST, WINNER, check_record

if TYPE_CHECKING:
    from pathlib import Path

    from moeopt.results.selection import JudgedRefit

SHOWN = 20
"""Candidates that are listed."""


def view(selection: Selection | Mapping[str, Any]) -> RenderableType:
    """Both tables and the sentences, of a selection or of its record.

    Raises:
        StudyError: when it is no such record.
    """
    record = selection.record if isinstance(selection, Selection) else selection
    check_record(record)
    warned = set(record["warnings"])
    lines = (
        Text(line(text, 1000), style="yellow" if text in warned else "")
        for text in dict.fromkeys([*record["sentences"], *record["warnings"]])
    )
    return Group(_compared(record), _candidates(record), *lines)


def save(selection: Selection, path: Path) -> None:
    """Write the record to a JSON file."""
    write({path: json_text(selection.record) + "\n"}, StudyError)


def _compared(record: Mapping[str, Any]) -> Table:
    metric, scores = record["metric"], record["scores"]
    stock = " that an ordinary checkpoint can hold" if record["settings"]["stock_only"] else ""
    sizes = ", ".join(f"{line(split, 40)} {about['count']}" for split, about in record["examples"].items())
    names = {
        FULL: "full model",
        WINNER: f"winner, trial {record[WINNER]}",
        SEARCH_BEST: f"best of the search, trial {record[SEARCH_BEST]}",
    }

    def score(split: str, what: str, name: str) -> float | None:
        return scores[split].get(name, {}).get(what)  # type: ignore[no-any-return]

    def change(name: str) -> str:
        gap = record["test_minus"].get(FULL, {}).get("loss") if name == WINNER else None
        return "" if gap is None else str(Interval(**gap))

    return table(
        f"the best of {len(record['candidates']['trial'])} plans{stock}, chosen on dev",
        [
            ("", lambda name: names[name]),
            ("search loss", lambda name: number(score("search", "loss", name))),
            ("dev loss", lambda name: number(score("dev", "loss", name))),
            ("test loss", lambda name: number(score("test", "loss", name))),
            (f"test {line(metric, 40)}", lambda name: percent(score("test", metric, name))),
            ("test loss - full [95%]", change),
        ],
        [name for name in names if any(name in by_name for by_name in scores.values())],
        caption=f"examples: {sizes}; looks at test: {record['looks']}",
    )


def _candidates(record: Mapping[str, Any]) -> Table:
    candidates, metric = record["candidates"], f"dev_{record['metric']}"
    keys = ["trial", "search_loss", "dev_loss", metric, *(["bytes"] if candidates.get("bytes") else [])]
    rows = list(zip(*(candidates[key] for key in keys)))
    columns: Columns = [
        ("trial", lambda row: str(row[0])),
        ("search loss", lambda row: number(row[1])),
        ("dev loss", lambda row: number(row[2])),
        (f"dev {line(record['metric'], 40)}", lambda row: percent(row[3])),
        *([("bytes", lambda row: DASH if row[4] is None else size(row[4]))] if len(keys) > 4 else []),
    ]
    more = f"and {len(rows) - SHOWN} more" if len(rows) > SHOWN else None
    return table("candidates", columns, rows[:SHOWN], caption=more)


def refit_lines(refit: JudgedRefit | None) -> Iterable[str]:
    """What a refit changes on dev, in words; None: the task has no such split."""
    if refit is None:
        return ["the task has no dev split to judge it on"]
    scores = (
        f"{name} {e.loss:.4f}, {refit.metric} {percent(e.accuracy)}" for name, e in refit.evaluations.items()
    )  # fmt: skip
    verdict = refit.change.judged.replace("worse", "worse: keep the plan as it was")
    count = len(refit.evaluations["plan"].losses)
    return [
        f"loss on {count:,} dev examples: {'; '.join(scores)}",
        f"refitted - plan: {refit.change}, {verdict}",
    ]
