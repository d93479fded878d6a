"""MultiRC (Khashabi et al. 2018; part of SuperGLUE): is this answer to a question about a paragraph right?

    {"paragraph": "While this process moved along, diplomacy continued its rounds.",
     "question": "What did the high-level effort to persuade Pakistan include?",
     "answer": "Children, Gerd, or Dorian Popa", "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 0}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `multirc`; options " yes", " no"):

    While this process moved along, diplomacy continued its rounds.
    Question: What did the high-level effort to persuade Pakistan include?
    Answer: Children, Gerd, or Dorian Popa
    Is the answer correct? no

and with `template="eep"` (of the OpenCompass that EEP built on; options " A", " B"):

    While this process moved along, diplomacy continued its rounds.
    Question: What did the high-level effort to persuade Pakistan include?
    Answer: Children, Gerd, or Dorian Popa
    Is it true?
    A. Yes
    B. No
    Answer: B

The harness scores answer, question and "yes" or "no" behind "Answer:"; only the last word differs, and only it is
scored here, so that the loss says nothing of the answer's own likelihood. The harness (version 2.0 of the task) also
takes " yes" for label 0; here " yes" is right for label 1, which the data set calls true.

A paragraph's answers stay in one split. SuperGLUE's own files have a line for each paragraph, with questions and
answers inside. Published are F1a, the F1 of "right" over all answers, and EM, the share of questions of which every
answer is judged rightly; questions not all of whose answers were evaluated do not count, and there is no EM if none is
left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeopt.tasks.base import Example, Scores
from moeopt.tasks.benchmark import Benchmark, letters
from moeopt.tasks.f1 import class_f1
from moeopt.tasks.labels import yes_no
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class Answer(Example):
    """An example that knows its question, so that EM can be told; option 0 says that the answer is right."""

    question: tuple[str, ...]


class MultiRCTask(MultipleChoiceTask):
    """MultiRC, with F1a and EM."""

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        found = super().metrics(split, scores)
        if scores.chosen is None:
            return found
        answers = [example for example in self.examples(split) if isinstance(example, Answer)]
        seen = answers[: len(scores.chosen)]
        found["f1a"] = class_f1(scores.chosen == 0, np.asarray([answer.answer == 0 for answer in seen]))
        wanted = Counter(answer.question for answer in answers)
        evaluated = Counter(answer.question for answer in seen)
        wrong = {answer.question for answer, chosen in zip(seen, scores.chosen) if chosen != answer.answer}
        whole = [question for question, n in evaluated.items() if n == wanted[question]]
        if whole:
            found["em"] = sum(question not in wrong for question in whole) / len(whole)
        return found


def flat(row: Row) -> Iterator[Row]:
    """A row for each answer, as on the hub, from SuperGLUE's line for each paragraph."""
    if "passage" not in row.values:
        yield row
        return
    passage = row.inner("passage")
    for q, question in enumerate(passage.inners("questions")):
        for a, answer in enumerate(question.inners("answers")):
            values = {
                "paragraph": passage.text("text"),
                "question": question.text("question"),
                "answer": answer.text("text"),
                "idx": {"paragraph": row.values.get("idx"), "question": q, "answer": a},
            }
            label = {"label": answer["label"]} if "label" in answer.values else {}
            yield Row(answer.where, values | label)


def harness(row: Row) -> Example:
    return _example(row, "Is the answer correct?", (" yes", " no"))


def eep(row: Row) -> Example:
    return _example(row, "Is it true?\nA. Yes\nB. No\nAnswer:", letters(2))


def _example(row: Row, ending: str, options: tuple[str, ...]) -> Answer:
    paragraph, question = row.text("paragraph"), row.text("question")
    prompt = f"{paragraph}\nQuestion: {question}\nAnswer: {row.text('answer')}\n{ending}"
    number = str(row.inner("idx").values.get("question")) if "idx" in row.values else ""
    key = (paragraph, question, number)
    return Answer(row.where, prompt, options, int(not yes_no(row, "label")), group=paragraph, question=key)


multirc_task = Benchmark(
    "multirc",
    hub="aps/super_glue",
    configs={"super_glue": "multirc"},
    templates={"harness": harness, "eep": eep},
    expand=flat,
    task=MultiRCTask,
)
