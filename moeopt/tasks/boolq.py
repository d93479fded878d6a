"""BoolQ (Clark et al. 2019, arXiv 1905.10044; part of SuperGLUE): yes/no questions about a passage.

    {"question": "is house tax and property tax are same",
     "passage": "Property tax -- Property tax or 'house tax' is a local tax on buildings, along with ...",
     "label": true}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `boolq`; options " no", " yes"):

    Property tax -- Property tax or 'house tax' is a local tax on buildings, along with ...
    Question: is house tax and property tax are same?
    Answer: yes

and with `template="eep"` (the multiple-choice prompt of EEP, arXiv 2407.00945, there answered by generation; options
" A", " B"):

    Property tax -- Property tax or 'house tax' is a local tax on buildings, along with ...
    Question: is house tax and property tax are same
    A. Yes
    B. No
    Answer: A

The label is read from "label" (SuperGLUE) or "answer" (google/boolq).
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

LABELS = ("label", "answer")


def harness(row: Row) -> Example:
    prompt = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return Example(str(row.values.get("idx", row.where)), prompt, (" no", " yes"), int(yes_no(row, *LABELS)))


def eep(row: Row) -> Example:
    prompt = f"{row.text('passage')}\nQuestion: {row.text('question')}\nA. Yes\nB. No\nAnswer:"
    return Example(str(row.values.get("idx", row.where)), prompt, (" A", " B"), int(not yes_no(row, *LABELS)))


TEMPLATES = {"harness": harness, "eep": eep}


def boolq_task(
    data: Data | None = None,
    *,
    template: str = "harness",
    fractions: Sequence[float] = FRACTIONS,
    config: str | None = None,
) -> MultipleChoiceTask:
    """BoolQ, from the hub ("google/boolq" unless `data` says otherwise) or a local file in either schema.

    Args:
        data: JSONL or parquet file, folder of them or hub id: see `moeopt.tasks.rows.load`.
        template: "harness" or "eep".
        fractions: of search, dev and test where the data has no splits of its own; its validation split becomes test,
            because that is the one with published scores, and train is divided into search and dev.
        config: configuration of a hub data set; "boolq" for any "super_glue".

    Raises:
        TaskError: naming file and line of whatever is missing or malformed.
    """
    if template not in TEMPLATES:
        raise TaskError(f"unknown template {template!r}{nearest(template, list(TEMPLATES))}")
    data = "google/boolq" if data is None else data
    config = "boolq" if config is None and str(data).endswith("super_glue") else config
    own = own_examples(load(data, config), TEMPLATES[template], lambda row: has_label(row, *LABELS))
    return MultipleChoiceTask("boolq", **from_own(own, fractions), template=f"{template} v1")
