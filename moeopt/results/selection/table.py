"""How a selection is shown: what was compared on all three splits, the candidates, and what the numbers say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.report.terminal import number, percent
from moeopt.results.selection.record import FULL, SEARCH_BEST, WINNER, Selection, check_record
from moeopt.showing import line

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
    sentences = [*record["sentences"], *(text for text in record["warnings"] if text not in record["sentences"])]
    lines = [Text(line(text, 1000), style="yellow" if text in warned else "") for text in sentences]
    return Group(_compared(record), _candidates(record), *lines)


def _compared(record: Mapping[str, Any]) -> Table:
    metric, settings = record["metric"], record["settings"]
    stock = " that an ordinary checkpoint can hold" if settings["stock_only"] else ""
    table = Table(
        "", "search loss", "dev loss", "test loss", f"test {line(metric, 40)}", "test loss - full [95%]",
        title=f"the best of {len(record['candidates']['trial'])} plans{stock}, chosen on dev", title_justify="left",
    )  # fmt: skip
    sizes = ", ".join(f"{line(split, 40)} {about['count']}" for split, about in record["examples"].items())
    table.caption, table.caption_justify = f"examples: {sizes}; looks at test: {record['looks']}", "left"
    names = {
        FULL: "full model",
        WINNER: f"winner, trial {record[WINNER]}",
        SEARCH_BEST: f"best of the search, trial {record[SEARCH_BEST]}",
    }
    scores = record["scores"]
    for column in table.columns[1:]:
        column.justify = "right"
    for name, label in names.items():
        if not any(name in found for found in scores.values()):
            continue
        losses = [number(scores[split].get(name, {}).get("loss")) for split in ("search", "dev", "test")]
        interval = record["test_minus"].get(FULL, {}).get("loss") if name == WINNER else None
        shown = "" if interval is None else "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**interval)
        table.add_row(label, *losses, percent(scores["test"].get(name, {}).get(metric)), shown)
    return table


def _candidates(record: Mapping[str, Any]) -> Table:
    found, metric = record["candidates"], record["metric"]
    table = Table(
        "trial", "search loss", "dev loss", f"dev {line(metric, 40)}", title="candidates", title_justify="left"
    )
    rows = list(zip(found["trial"], found["search_loss"], found["dev_loss"], found[f"dev_{metric}"]))
    for trial, search, dev, score in rows[:SHOWN]:
        table.add_row(str(trial), number(search), number(dev), percent(score))
    if len(rows) > SHOWN:
        table.caption, table.caption_justify = f"and {len(rows) - SHOWN} more", "left"
    return table
