"""WiC, words in context (Pilehvar and Camacho-Collados 2019, arXiv 1808.09121; part of SuperGLUE).

    {"word": "place", "sentence1": "Do you want to come over to my place later?",
     "sentence2": "A political system with no place for the less prominent groups.",
     "start1": 31, "end1": 36, "start2": 27, "end2": 32, "label": false}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `wic`; options " no", " yes"):

    Sentence 1: Do you want to come over to my place later?
    Sentence 2: A political system with no place for the less prominent groups.
    Question: Is the word 'place' used in the same way in the two sentences above?
    Answer: no

and with `template="eep"` (the multiple-choice prompt of EEP, arXiv 2407.00945, there answered by generation, spelling
included; options " A", " B"):

    Sentence 1: Do you want to come over to my place later?
    Sentence 2: A political system with no place for the less prominent groups.
    Are 'place' in the above two sentenses the same?
    A. Yes
    B. No
    Answer: B
"""

from __future__ import annotations

from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, row_id
from moeopt.tasks.labels import yes_no
from moeopt.tasks.rows import Row


def harness(row: Row) -> Example:
    start, end = row.values.get("start1"), row.values.get("end1")
    sentence = row.text("sentence1")
    word = sentence[start:end] if isinstance(start, int) and isinstance(end, int) else row.text("word")
    prompt = (
        f"Sentence 1: {sentence}\nSentence 2: {row.text('sentence2')}\n"
        f"Question: Is the word '{word}' used in the same way in the two sentences above?\nAnswer:"
    )
    return Example(row_id(row), prompt, (" no", " yes"), int(yes_no(row, "label")), _sentences(row))


def eep(row: Row) -> Example:
    prompt = (
        f"Sentence 1: {row.text('sentence1')}\nSentence 2: {row.text('sentence2')}\n"
        f"Are '{row.text('word')}' in the above two sentenses the same?\nA. Yes\nB. No\nAnswer:"
    )
    return Example(row_id(row), prompt, (" A", " B"), int(not yes_no(row, "label")), _sentences(row))


def _sentences(row: Row) -> tuple[str, str]:
    return row.text("sentence1"), row.text("sentence2")


wic_task = Benchmark(
    "wic", hub="aps/super_glue", configs={"super_glue": "wic"}, templates={"harness": harness, "eep": eep}
)
