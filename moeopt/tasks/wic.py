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

from typing import TYPE_CHECKING

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Example
from moeopt.tasks.labels import has_label, yes_no
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.rows import Data, Row, load, own_examples
from moeopt.tasks.splits import FRACTIONS, from_own

if TYPE_CHECKING:
    from collections.abc import Sequence


def harness(row: Row) -> Example:
    start, end = row.values.get("start1"), row.values.get("end1")
    sentence = row.text("sentence1")
    word = sentence[start:end] if isinstance(start, int) and isinstance(end, int) else row.text("word")
    prompt = (
        f"Sentence 1: {sentence}\nSentence 2: {row.text('sentence2')}\n"
        f"Question: Is the word '{word}' used in the same way in the two sentences above?\nAnswer:"
    )
    return Example(str(row.values.get("idx", row.where)), prompt, (" no", " yes"), int(yes_no(row, "label")))


def eep(row: Row) -> Example:
    prompt = (
        f"Sentence 1: {row.text('sentence1')}\nSentence 2: {row.text('sentence2')}\n"
        f"Are '{row.text('word')}' in the above two sentenses the same?\nA. Yes\nB. No\nAnswer:"
    )
    return Example(str(row.values.get("idx", row.where)), prompt, (" A", " B"), int(not yes_no(row, "label")))


TEMPLATES = {"harness": harness, "eep": eep}


def wic_task(
    data: Data | None = None,
    *,
    template: str = "harness",
    fractions: Sequence[float] = FRACTIONS,
    config: str | None = None,
) -> MultipleChoiceTask:
    """WiC, from the hub ("aps/super_glue" unless `data` says otherwise) or a local file.

    Args:
        data: JSONL or parquet file, folder of them or hub id: see `moeopt.tasks.rows.load`.
        template: "harness" or "eep".
        fractions: of search, dev and test where the data has no splits of its own; with train and validation and an
            unlabelled test, validation becomes test and train is divided into search and dev.
        config: configuration of a hub data set; "wic" for any "super_glue".

    Raises:
        TaskError: naming file and line of whatever is missing or malformed.
    """
    if template not in TEMPLATES:
        raise TaskError(f"unknown template {template!r}{nearest(template, list(TEMPLATES))}")
    data = "aps/super_glue" if data is None else data
    config = "wic" if config is None and str(data).endswith("super_glue") else config
    own = own_examples(load(data, config), TEMPLATES[template], lambda row: has_label(row, "label"))
    return MultipleChoiceTask("wic", **from_own(own, fractions), template=f"{template} v1")
