"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): how does a description of an activity go on?

    {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."], "label": "3"}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `hellaswag`; an option is " " and an ending):

    Roof shingle removal: A man is sitting on a roof. He starts pulling up roofing on a roof.

and with `template="eep"` (options " A", " B", " C", " D"):

    A man is sitting on a roof. He
    Question: Which ending makes the most sense?
    A. is using wrap to wrap a pair of skis.
    B. is ripping level tiles off.
    C. is holding a rubik's cube.
    D. starts pulling up roofing on a roof.
    You may choose from 'A', 'B', 'C', 'D'.
    Answer: D

As in the harness, `ctx_b` is capitalised and the bracketed marks that WikiHow left are removed from all texts; EEP's
file was made from the same texts. Options of several words: the harness reports `normalise="none"` as acc and
"characters" as acc_norm.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, lettered, letters, row_id
from moeopt.tasks.labels import which

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row

ENDINGS = 4


def cleaned(text: str) -> str:
    """The text without WikiHow's marks such as "[header]"; " [title]" ends a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def harness(row: Row) -> Example:
    query, endings, answer = _parts(row)
    return Example(row_id(row, "ind"), query, tuple(f" {ending}" for ending in endings), answer, _source(row, query))


def eep(row: Row) -> Example:
    query, endings, answer = _parts(row)
    prompt = (
        f"{query.split(': ', 1)[-1]}\nQuestion: Which ending makes the most sense?\n{lettered(endings)}\n"
        "You may choose from 'A', 'B', 'C', 'D'.\nAnswer:"
    )
    return Example(row_id(row, "ind"), prompt, letters(ENDINGS), answer, _source(row, query))


def _source(row: Row, query: str) -> tuple[str, ...]:
    """What examples are tied by: the context, and the video or article that it was taken from."""
    return query, str(row.values.get("source_id") or "")


def _parts(row: Row) -> tuple[str, list[str], int]:
    """Label and context, the endings, and which of them is right."""
    query = cleaned(f"{row.text('activity_label')}: {row.text('ctx_a')} {row.text('ctx_b').capitalize()}")
    endings = row.texts("endings")
    if len(endings) != ENDINGS:
        raise TaskError(f"{row.where}: 'endings' must be {ENDINGS} texts, got {len(endings)}")
    return query, [cleaned(ending) for ending in endings], which(row, "label", ("0", "1", "2", "3"))


hellaswag_task = Benchmark("hellaswag", hub="Rowan/hellaswag", templates={"harness": harness, "eep": eep})
