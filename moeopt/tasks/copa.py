"""COPA, choice of plausible alternatives (Roemmele et al. 2011; part of SuperGLUE): which is the cause, or the effect?

    {"premise": "My body cast a shadow over the grass.", "choice1": "The sun was rising.",
     "choice2": "The grass was cut.", "question": "cause", "label": 0}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `copa`; "therefore" for an effect; options
"  the sun was rising." and "  the grass was cut.", with the harness's two spaces):

    My body cast a shadow over the grass because  the sun was rising.

and with `template="eep"` (of the OpenCompass that EEP built on; options " A", " B"):

    My body cast a shadow over the grass.
    Question: Which may be the cause?
    A. The sun was rising.
    B. The grass was cut.
    Answer: A
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, lettered, letters, row_id
from moeopt.tasks.labels import which

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row

CHOICES = ("choice1", "choice2")
QUESTIONS = ("cause", "effect")
CONNECTORS = ("because", "therefore")


def harness(row: Row) -> Example:
    connector = CONNECTORS[which(row, "question", QUESTIONS, index=False)]
    prompt = f"{row.text('premise').strip()[:-1]} {connector}"
    options = [f"  {text[:1].lower()}{text[1:]}" for text in map(row.text, CHOICES)]
    return Example(row_id(row), prompt, tuple(options), which(row, "label", CHOICES), row.text("premise"))


def eep(row: Row) -> Example:
    question = QUESTIONS[which(row, "question", QUESTIONS, index=False)]
    choices = lettered([row.text(choice) for choice in CHOICES])
    prompt = f"{row.text('premise')}\nQuestion: Which may be the {question}?\n{choices}\nAnswer:"
    return Example(row_id(row), prompt, letters(2), which(row, "label", CHOICES), row.text("premise"))


copa_task = Benchmark(
    "copa", hub="aps/super_glue", configs={"super_glue": "copa"}, templates={"harness": harness, "eep": eep}
)
