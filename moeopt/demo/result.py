"""What the demo found, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.evaluation import Evaluation, Interval
from moeopt.plan import Plan
from moeopt.report import tables
from moeopt.report.formatting import number, percent
from moeopt.statistics import Floats

FULL, RANDOM, SEARCH, REFIT = "full model", "mean random pruning", "guided search", " + refit"


@dataclass(frozen=True)
class Entry:
    """A line of the demo's table.

    Args:
        name: what was scored.
        plan: it; None for the full model.
        search_loss: on the examples the search minimised.
        test: on examples it never saw.
        parameters: of the model that the plan stands for.
        bytes: of its weights, stored as those of the demo model.
    """

    name: str
    plan: Plan | None
    search_loss: float
    test: Evaluation
    parameters: int
    bytes: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Args:
        title: of the table.
        full: the full model.
        random: random prunings.
        one_shot: what one-shot methods make of the same examples, which the search starts from.
        search: its best trial, by search loss.
        refits: the plans of `one_shot` and `search`, refitted to the same examples; the last one is exported.
        sizes: examples scored of ``"search"`` and ``"test"``.
        differences: test loss of the last refit less that of each other line, each with a 95% interval of a paired
            bootstrap over examples.
        exported: folder of its checkpoint.
        reloaded_loss: test loss of that under plain transformers.
        seconds: the whole demo.
    """

    title: str
    full: Entry
    random: tuple[Entry, ...]
    one_shot: tuple[Entry, ...]
    search: Entry
    refits: tuple[Entry, ...]
    sizes: dict[str, int]
    differences: dict[str, Interval]
    exported: Path
    reloaded_loss: float
    seconds: float


def view(result: DemoResult) -> RenderableType:
    """The table, what it says, and the export, to print with rich."""
    return Group(Text(result.title, style="bold"), table(result), *_sentences(result))


def table(result: DemoResult) -> Table:
    """Loss, accuracy, parameters and size of every entry; of the random prunings mean, spread and range."""

    def cells(entry: Entry) -> list[str]:
        name = f" {REFIT}" if entry.name.endswith(REFIT) else entry.name
        return [name, number(entry.search_loss), number(entry.test.loss), percent(entry.test.accuracy), *_size(entry)]

    def of_random(between: str, a: Floats, b: Floats) -> list[str]:
        losses = [f"{x:.4f} {between} {y:.4f}" for x, y in zip(a[:2], b[:2])]
        return [*losses, f"{100 * a[2]:.1f} {between} {100 * b[2]:.1f}%"]

    scores = np.array([[entry.search_loss, entry.test.loss, entry.test.accuracy] for entry in result.random])
    mean = of_random("±", scores.mean(0), scores.std(0))
    entries = [entry for pair in zip((*result.one_shot, result.search), result.refits) for entry in pair]
    rows = [
        cells(result.full),
        [f"{len(result.random)} random prunings, mean ± sd", *mean, *_size(result.random[0])],
        ["  lowest – highest", *of_random("–", scores.min(0), scores.max(0)), "", ""],
        *map(cells, entries),
    ]
    heads = ("", "search loss", "test loss", "test accuracy", "parameters", "size")
    search, test = (result.sizes[split] for split in ("search", "test"))
    return tables.table(
        None,
        [(head, itemgetter(i)) for i, head in enumerate(heads)],
        rows,
        style=lambda row: "bold" if row is rows[-1] else "",
        caption=f"search: the {search} examples that the search minimised; test: {test} that it never saw",
    )


def _size(entry: Entry) -> tuple[str, str]:
    return f"{entry.parameters / 1e6:.2f} M", f"{entry.bytes / 2**20:.2f} MiB"


def _sentences(result: DemoResult) -> Iterator[Text]:
    best = result.refits[-1].test.loss
    yield Text("The last line's test loss less theirs, with a 95% interval (paired over examples); below 0 is better:")
    width = max(map(len, result.differences)) + 10
    for other, change in result.differences.items():
        yield Text(f"  {'against ' + other:<{width}}{change}  {change.judged}")
    difference = result.reloaded_loss - best
    yield Text(
        f"Exported, and reloaded with plain transformers: test loss {result.reloaded_loss:.6f}, "
        f"{best:.6f} under the plan, difference {difference:.1e}."
    )
