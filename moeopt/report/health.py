"""How a health report is shown and written: what was told of all answers, and the answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.errors import PlanError
from moeopt.report.figures import pages
from moeopt.report.formatting import number
from moeopt.report.tables import Columns, csv_of, json_text, table, write
from moeopt.results.health.answers import FIRST, GRAM, LOOP, Answer, Health, Measure
from moeopt.showing import line

EXAMPLES = 3
"""Prompts that a terminal shows, those whose answers suffered most."""
LONGEST = 400
"""Characters of a text."""
MEANINGS = {
    "repeated": f"share of sequences of {GRAM} tokens that were written before",
    "loops": f"ends in one piece written three times or more, {LOOP} tokens of it",
    "empty": "nothing visible",
    "early": "ends by itself in less than half of the full model's tokens",
    "overlong": "does not end where the full model does",
    "differs": f"share of the full model's first {FIRST} tokens, from the first other one on",
    "length": "tokens",
}
HEADS = ("", "what it is", "full", "plan", "plan - full [95%]", "allowed", "verdict")
STYLES = {"holds": "green", "unclear": "yellow", "broken": "red"}


def view(health: Health) -> RenderableType:
    """What was told of all answers, the answers that suffered most, and the verdict."""
    h = health
    columns: Columns = [(head, lambda m, i=i: _cells(m)[i]) for i, head in enumerate(HEADS)]  # type: ignore[misc]
    measures = table(
        f"answers to {_about(h)}", columns, h.measures.values(), text=("what it is", "verdict"),
        style=lambda m: STYLES.get(m.verdict or "", ""),
    )  # fmt: skip
    return Group(measures, _examples(h), Text(sentence(h), style=STYLES[h.verdict]))


def save(health: Health, path: Path) -> None:
    """Write the numbers to a JSON file, and beside it every answer as .csv and, side by side, as .html.

    Raises:
        PlanError: when they cannot be written.
    """
    files = {
        path: json_text(health.record) + "\n",
        path.with_suffix(".csv"): csv_of(health.rows),
        path.with_suffix(".html"): page(health),
    }
    write(files, PlanError, folder=path.parent)


def sentence(health: Health) -> str:
    """The verdict in words."""
    return f"Health: {health}."


def page(health: Health) -> str:
    """All of it as one HTML page that needs nothing else, the answers that suffered most first."""
    h = health
    measures = pages.table(
        HEADS,
        [_cells(measure) for measure in h.measures.values()],
        texts=(0, 1, 6),
    )
    answers = pages.table(
        ["prompt", "full model", "plan"],
        [[pages.escape(text, LONGEST) for text in _texts(h, i)] for i in h.worst],
        texts=(0, 1, 2),
    )
    title = "Full model and plan, answer by answer"
    body = [
        f"<header><h1>{title}</h1></header>",
        pages.section("Verdict", pages.bullets([sentence(h)]), "conclusions"),
        pages.section(f"Answers to {_about(h)}", measures),
        pages.section("Side by side, those that suffered most first", answers),
    ]
    return pages.page(title, "\n".join(body), {})


def _about(health: Health) -> str:
    return f"{len(health.prompts)} prompts ({line(health.source, 80)}), at most {health.new_tokens} tokens each"


def _cells(m: Measure) -> list[str]:
    judged = ["", ""] if m.limit is None else [f"{m.limit:g}", str(m.verdict)]
    means = [number(float(values.mean()), 3) for values in (m.full, m.small)]
    return [m.name, MEANINGS[m.name], *means, str(m.change), *judged]


def _examples(health: Health) -> Table:
    worst = health.worst[:EXAMPLES]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", show_lines=True)
    shown.title = Text(f"{len(worst)} of {len(health.prompts)} prompts, the answers that suffered most", style="bold")
    for head in ("prompt", "full model", "plan"):
        shown.add_column(head, ratio=1, overflow="fold")
    for i in worst:
        shown.add_row(*(Text(text) for text in _texts(health, i, LONGEST // 2)))
    return shown


def _texts(health: Health, i: int, most: int = LONGEST) -> Sequence[str]:
    """A prompt's end, and both answers, on visible lines."""
    prompt = health.prompts[i]
    end = prompt if len(prompt) <= most else f"...{prompt[-most:]}"
    return line(end, most + 3), _text(health.full[i], most), _text(health.small[i], most)


def _text(answer: Answer, most: int) -> str:
    return f"{line(answer.text, most)}{'' if answer.ended else ' ...'}"
