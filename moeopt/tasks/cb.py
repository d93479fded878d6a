"""CB, the CommitmentBank (de Marneffe et al. 2019; part of SuperGLUE): does a premise entail a hypothesis?

    {"premise": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
     "hypothesis": "the language was peeled down", "label": 0}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `cb`; options " True", " False", " Neither"):

    It was a complex language. Not written down but handed down. One might say it was peeled down.
    Question: the language was peeled down. True, False, or Neither?
    Answer: True

and with `template="eep"` (options " A", " B", " C"):

    It was a complex language. Not written down but handed down. One might say it was peeled down.
    the language was peeled down
    What is the relation between the two sentences?
    A. Contradiction
    B. Entailment
    C. Neutral
    Answer: B

The label is 0, 1, 2 (hub) or "entailment", "contradiction", "neutral" (SuperGLUE's own files). Published are the
accuracy and the mean of the three classes' F1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moeopt.tasks.base import Example, Scores
from moeopt.tasks.benchmark import Benchmark, lettered, letters, row_id
from moeopt.tasks.f1 import class_f1
from moeopt.tasks.labels import which
from moeopt.tasks.multiple_choice import MultipleChoiceTask

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row

LABELS = ("entailment", "contradiction", "neutral")
EEP_ORDER = ("contradiction", "entailment", "neutral")


class CbTask(MultipleChoiceTask):
    """CB, with its macro F1."""

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        if scores.chosen is None:
            return super().metrics(split, scores)
        true = np.asarray([example.answer for example in self.examples(split)[: len(scores.chosen)]])
        macro = np.mean([class_f1(scores.chosen == label, true == label) for label in range(len(LABELS))])
        return super().metrics(split, scores) | {"macro_f1": float(macro)}


def harness(row: Row) -> Example:
    prompt = f"{row.text('premise')}\nQuestion: {row.text('hypothesis')}. True, False, or Neither?\nAnswer:"
    answer = which(row, "label", LABELS)
    return Example(row_id(row), prompt, (" True", " False", " Neither"), answer, row.text("premise"))


def eep(row: Row) -> Example:
    choices = lettered([label.capitalize() for label in EEP_ORDER])
    prompt = (
        f"{row.text('premise')}\n{row.text('hypothesis')}\n"
        f"What is the relation between the two sentences?\n{choices}\nAnswer:"
    )
    answer = EEP_ORDER.index(LABELS[which(row, "label", LABELS)])
    return Example(row_id(row), prompt, letters(3), answer, row.text("premise"))


cb_task = Benchmark(
    "cb",
    hub="aps/super_glue",
    configs={"super_glue": "cb"},
    templates={"harness": harness, "eep": eep},
    task=CbTask,
)
