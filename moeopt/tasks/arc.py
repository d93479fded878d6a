"""ARC, the AI2 reasoning challenge (Clark et al. 2018, arXiv 1803.05457): school science, easy and challenge sets.

    {"id": "MCAS_2000_4_6", "question": "Which technology was developed most recently?",
     "choices": {"text": ["cellular telephone", "television", "refrigerator", "airplane"],
                 "label": ["A", "B", "C", "D"]}, "answerKey": "A"}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `arc_easy` and `arc_challenge`; an option is " " and a
choice):

    Question: Which technology was developed most recently?
    Answer: cellular telephone

and with `template="eep"` (options " A", " B", ...):

    Question: Which technology was developed most recently?
    A. cellular telephone
    B. television
    C. refrigerator
    D. airplane
    Answer: A

Questions have 3 to 5 choices, labelled with letters or numbers. EEP leaves out the few that do not have four; here they
stay, with as many letters. AI2's own files have stem and choices in an object "question".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, lettered, letters, row_id
from moeopt.tasks.labels import text_of
from moeopt.tasks.rows import Row


def flat(row: Row) -> Iterable[Row]:
    """AI2's own form of a question as on the hub: stem, texts and labels are columns."""
    if not isinstance(row.values.get("question"), Mapping):
        return (row,)
    question = row.inner("question")
    stem, choices = question.text("stem"), question.inners("choices")
    columns = {name: [choice.text(name) for choice in choices] for name in ("text", "label")}
    return (Row(row.where, {**row.values, "question": stem, "question_stem": stem, "choices": columns}),)


def choices_of(row: Row) -> tuple[list[str], int]:
    """The texts of the choices, and which of them is right."""
    choices = row.inner("choices")
    texts, labels = choices.texts("text"), choices.texts("label")
    if len(texts) != len(labels):
        raise TaskError(f"{row.where}: 'choices' must have as many texts as labels, got {len(texts)} and {len(labels)}")
    key = text_of(row["answerKey"])
    if key not in labels:
        raise TaskError(f"{row.where}: 'answerKey' must be one of {', '.join(labels)}, got {row['answerKey']!r}")
    return texts, labels.index(key)


def harness(row: Row) -> Example:
    texts, answer = choices_of(row)
    prompt = f"Question: {row.text('question')}\nAnswer:"
    return Example(row_id(row, "id"), prompt, tuple(f" {text}" for text in texts), answer, row.text("question"))


def eep(row: Row) -> Example:
    texts, answer = choices_of(row)
    prompt = f"Question: {row.text('question')}\n{lettered(texts)}\nAnswer:"
    return Example(row_id(row, "id"), prompt, letters(len(texts)), answer, row.text("question"))


def _arc(name: str, config: str) -> Benchmark:
    return Benchmark(
        name,
        hub="allenai/ai2_arc",
        configs={"ai2_arc": config},
        labels=("answerKey",),
        templates={"harness": harness, "eep": eep},
        expand=flat,
    )


arc_easy_task = _arc("arc_easy", "ARC-Easy")
arc_challenge_task = _arc("arc_challenge", "ARC-Challenge")
