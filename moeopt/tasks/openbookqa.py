"""OpenBookQA (Mihaylov et al. 2018, arXiv 1809.02789): science questions that go with a fact.

    {"id": "8-376",
     "question_stem": "Frilled sharks and angler fish live far beneath the surface, so they are known as",
     "choices": {"text": ["Deep sea animals", "fish", "Long Sea Fish", "Far Sea Animals"],
                 "label": ["A", "B", "C", "D"]}, "answerKey": "A",
     "fact1": "deep sea animals live deep in the ocean"}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `openbookqa`; an option is " " and a choice):

    Frilled sharks and angler fish live far beneath the surface, so they are known as Deep sea animals

and with `template="eep"`, which gives the fact (options " A", " B", " C", " D"):

    Given the fact: deep sea animals live deep in the ocean
    Question: Frilled sharks and angler fish live far beneath the surface, so they are known as
    A. Deep sea animals
    B. fish
    C. Long Sea Fish
    D. Far Sea Animals
    Answer: A

On the hub only the configuration "additional" has the column "fact1", so it is what "eep" reads; "harness" reads
"main". AI2's own files have stem and choices in an object "question".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.tasks.arc import choices_of, flat
from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, lettered, letters, row_id

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row


def harness(row: Row) -> Example:
    texts, answer = choices_of(row)
    return Example(
        row_id(row, "id"), row.text("question_stem"), tuple(f" {text}" for text in texts), answer, _tied(row)
    )


def eep(row: Row) -> Example:
    texts, answer = choices_of(row)
    prompt = f"Given the fact: {row.text('fact1')}\nQuestion: {row.text('question_stem')}\n{lettered(texts)}\nAnswer:"
    return Example(row_id(row, "id"), prompt, letters(len(texts)), answer, _tied(row))


def _tied(row: Row) -> tuple[str, ...]:
    """What examples are tied by: the question, and the fact where the row has it."""
    return row.text("question_stem"), str(row.values.get("fact1") or "")


openbookqa_task = Benchmark(
    "openbookqa",
    hub="allenai/openbookqa",
    configs={"openbookqa": {"harness": "main", "eep": "additional"}},
    labels=("answerKey",),
    templates={"harness": harness, "eep": eep},
    expand=flat,
)
