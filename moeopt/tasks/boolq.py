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

from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, row_id
from moeopt.tasks.labels import yes_no
from moeopt.tasks.rows import Row

LABELS = ("label", "answer")


def harness(row: Row) -> Example:
    prompt = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return Example(row_id(row), prompt, (" no", " yes"), int(yes_no(row, *LABELS)), row.text("passage"))


def eep(row: Row) -> Example:
    prompt = f"{row.text('passage')}\nQuestion: {row.text('question')}\nA. Yes\nB. No\nAnswer:"
    return Example(row_id(row), prompt, (" A", " B"), int(not yes_no(row, *LABELS)), row.text("passage"))


boolq_task = Benchmark(
    "boolq",
    hub="google/boolq",
    configs={"super_glue": "boolq"},
    templates={"harness": harness, "eep": eep},
    labels=LABELS,
)
