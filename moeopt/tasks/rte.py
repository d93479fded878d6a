"""RTE, recognising textual entailment (Dagan et al. 2006 and later; part of SuperGLUE).

    {"premise": "No Weapons of Mass Destruction Found in Iraq Yet.",
     "hypothesis": "Weapons of Mass Destruction Found in Iraq.", "label": 1}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `sglue_rte`; options " True", " False"):

    No Weapons of Mass Destruction Found in Iraq Yet.
    Question: Weapons of Mass Destruction Found in Iraq. True or False?
    Answer: False

and with `template="eep"` (options " A", " B"):

    No Weapons of Mass Destruction Found in Iraq Yet.
    Weapons of Mass Destruction Found in Iraq.
    Is the sentence below entailed by the sentence above?
    A. Yes
    B. No
    Answer: B

The label is 0, 1 (hub) or "entailment", "not_entailment" (SuperGLUE's own files).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, letters, row_id
from moeopt.tasks.labels import which

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row

LABELS = ("entailment", "not_entailment")


def harness(row: Row) -> Example:
    prompt = f"{row.text('premise')}\nQuestion: {row.text('hypothesis')} True or False?\nAnswer:"
    return Example(row_id(row), prompt, (" True", " False"), which(row, "label", LABELS), row.text("premise"))


def eep(row: Row) -> Example:
    prompt = (
        f"{row.text('premise')}\n{row.text('hypothesis')}\n"
        "Is the sentence below entailed by the sentence above?\nA. Yes\nB. No\nAnswer:"
    )
    return Example(row_id(row), prompt, letters(2), which(row, "label", LABELS), row.text("premise"))


rte_task = Benchmark(
    "rte", hub="aps/super_glue", configs={"super_glue": "rte"}, templates={"harness": harness, "eep": eep}
)
