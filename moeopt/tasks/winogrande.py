"""WinoGrande (Sakaguchi et al. 2020, arXiv 1907.10641): which of two names fills the blank?

    {"sentence": "Sarah was a better surgeon than Maria so _ always got the easier cases.",
     "option1": "Sarah", "option2": "Maria", "answer": "2"}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `winogrande`), the prompt and options

    Sarah was a better surgeon than Maria so |Sarah always got the easier cases.
    Sarah was a better surgeon than Maria so |Maria always got the easier cases.

of which only what follows the name, " always got the easier cases.", is scored, each time behind a prompt of its own
that ends in the name (partial evaluation, Trinh and Le 2018, arXiv 1806.02847): the loss is the mean negative
log-likelihood of these tokens behind the right name. With `template="eep"` (options " A", " B"):

    Which of the following is a good sentence:
    A. Sarah was a better surgeon than Maria so Sarah always got the easier cases.
    B. Sarah was a better surgeon than Maria so Maria always got the easier cases.
    Answer: B
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import Benchmark, lettered, letters, row_id
from moeopt.tasks.labels import which
from moeopt.tasks.multiple_choice import MultipleChoiceTask

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row

BLANK = "_"


@dataclass(frozen=True, kw_only=True)
class Blank(Example):
    """An example whose options all end in `rest`, which alone is scored."""

    rest: str


class WinograndeTask(MultipleChoiceTask):
    """WinoGrande; of the options of a `Blank`, `rest` is scored behind prompt and name."""

    def parts(self, example: Example) -> tuple[Example, ...]:
        if not isinstance(example, Blank):
            return super().parts(example)
        names = [option.removesuffix(example.rest) for option in example.options]
        return tuple(Example(example.id, example.prompt + name, (example.rest,), 0) for name in names)


def harness(row: Row) -> Example:
    before, names, after, answer = _parts(row)
    rest = f" {after.strip()}"
    return Blank(row_id(row, "qID"), before, (names[0] + rest, names[1] + rest), answer, _twins(row), rest=rest)


def eep(row: Row) -> Example:
    _, names, _, answer = _parts(row)
    sentences = lettered([row.text("sentence").replace(BLANK, name) for name in names])
    prompt = f"Which of the following is a good sentence:\n{sentences}\nAnswer:"
    return Example(row_id(row, "qID"), prompt, letters(2), answer, _twins(row))


def _twins(row: Row) -> tuple[str, ...]:
    """What ties a sentence to its twin, which has the other name for an answer: the id of the pair, or the names
    together with what precedes or follows the blank, since twins differ in one word or two."""
    before, names, after, _ = _parts(row)
    pair = " or ".join(sorted(names))
    return str(row.values.get("qID") or "").rpartition("-")[0], f"{before} {pair}", f"{pair} {after}"


def _parts(row: Row) -> tuple[str, tuple[str, str], str, int]:
    """The text before the blank, the names, the text after the blank, and which name is right."""
    before, blank, after = row.text("sentence").partition(BLANK)
    if not blank or not after.strip():
        raise TaskError(f"{row.where}: 'sentence' must have {BLANK!r} and text after it, got {row['sentence']!r}")
    names = row.text("option1"), row.text("option2")
    return before, names, after, which(row, "answer", ("1", "2"), index=False)


winogrande_task = Benchmark(
    "winogrande",
    hub="allenai/winogrande",
    configs={"winogrande": "winogrande_xl"},
    labels=("answer",),
    templates={"harness": harness, "eep": eep},
    task=WinograndeTask,
)
