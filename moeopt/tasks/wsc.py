"""WSC, the Winograd schema challenge (Levesque et al. 2012; part of SuperGLUE): what does a pronoun refer to?

    {"text": "Mark told Pete many lies about himself , which Pete included in his book.",
     "span1_index": 0, "span1_text": "Mark", "span2_index": 12, "span2_text": "his", "label": 0}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `wsc`; options " no", " yes"):

    Passage: Mark told Pete many lies about himself, which Pete included in *his* book.
    Question: In the passage above, does the pronoun "*his*" refer to "*Mark*"?
    Answer: no

and with `template="eep"` (options " A", " B"):

    Passage: * Mark * told Pete many lies about himself , which Pete included in # his # book.
    Does the pronoun # his # refer to * Mark *?
    A. Yes
    B. No
    Answer: B

SuperGLUE's own files have the four columns of the spans in an object "target". The indices count words. The hub
configuration is "wsc.fixed", as in the harness.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, letters, row_id
from moeopt.tasks.labels import yes_no
from moeopt.tasks.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterable


def flat(row: Row) -> Iterable[Row]:
    """The spans of SuperGLUE's "target" as columns, as on the hub."""
    if "target" in row.values:
        row = Row(row.where, {**row.values, **row.inner("target").values})
    return (row,)


def detokenised(text: str) -> str:
    """Without the spaces that tokenisation put before clitics and around punctuation, as in the harness."""
    for spaced, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(spaced, joined)
    return re.sub(r" (['.,])", r"\1", text)


def harness(row: Row) -> Example:
    text, noun, pronoun = row.text("text"), row.text("span1_text"), row.text("span2_text")
    before = " ".join(text.split()[: row.number("span2_index")])
    passage = detokenised(f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1 :]}")
    prompt = (
        f'Passage: {passage}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" refer to "*{noun}*"?\n'
        "Answer:"
    )
    return Example(row_id(row), prompt, (" no", " yes"), int(yes_no(row, "label")), row.text("text"))


def eep(row: Row) -> Example:
    noun, pronoun = row.text("span1_text"), row.text("span2_text")
    words: list[str | None] = [*row.text("text").split(" ")]
    for column, span, mark in (("span2_index", pronoun, "#"), ("span1_index", noun, "*")):
        first, n = row.number(column), len(span.split(" "))
        if first >= len(words):
            raise TaskError(f"{row.where}: {column!r} is {first}, but 'text' has {len(words)} words")
        words[first : first + n] = [f"{mark} {span} {mark}", *[None] * (n - 1)]
    passage = " ".join(word for word in words if word is not None)
    prompt = f"Passage: {passage}\nDoes the pronoun # {pronoun} # refer to * {noun} *?\nA. Yes\nB. No\nAnswer:"
    return Example(row_id(row), prompt, letters(2), int(not yes_no(row, "label")), row.text("text"))


wsc_task = Benchmark(
    "wsc",
    hub="aps/super_glue",
    configs={"super_glue": "wsc.fixed"},
    templates={"harness": harness, "eep": eep},
    expand=flat,
)
