"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): exam questions of 57 subjects with four choices each.

    {"question": "Which of the following is the body cavity that contains the pituitary gland?", "subject": "anatomy",
     "choices": ["Abdominal", "Cranial", "Pleural", "Spinal"], "answer": 1}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `mmlu`; options " A", " B", " C", " D"):

    The following are multiple choice questions (with answers) about anatomy.

    Which of the following is the body cavity that contains the pituitary gland?
    A. Abdominal
    B. Cranial
    C. Pleural
    D. Spinal
    Answer: B

and with `template="eep"` (of EEP's OpenCompass, `mmlu_gen`; the same options):

    There is a single choice question about anatomy. Answer the question by replying A, B, C or D.
    Question: Which of the following is the body cavity that contains the pituitary gland?
    A. Abdominal
    B. Cranial
    C. Pleural
    D. Spinal
    Answer: B

`shots=5` puts the first five questions of the subject's few-shot split, with answers, before each question: behind the
first line in "harness", an empty line after each; whole in "eep", a line end after each. Published results have five.

The hub's splits become ours so: `validation` (about 27 questions a subject) is divided into search and dev by a hash,
`test` is test, `dev` (5 questions a subject) is where shots come from and is never scored, `auxiliary_train` is not
read. A folder has files `validation`, `test` and, for shots, `dev`. EEP's protocol, to search on some subjects and to
report on those and, apart, on subjects never searched, takes two tasks:

    searched = moeopt.tasks.get("mmlu", subjects="stem,virology")  # search, dev and test of these
    unseen = moeopt.tasks.get("mmlu", subjects="stem,virology", held_out=True)  # test of all others

Published are the accuracy over all questions, and its mean over subjects; besides, the accuracy of each category.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Example, Scores
from moeopt.tasks.benchmark import chosen_template, lettered, letters
from moeopt.tasks.labels import which
from moeopt.tasks.mmlu_subjects import CATEGORIES, CATEGORY
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.rows import Data, Row, load, origin, own_examples
from moeopt.tasks.splits import FRACTIONS, from_own

LETTERS = ("A", "B", "C", "D")
SHOTS = "dev"
"""The split of the hub that shots come from."""
UNREAD = "auxiliary_train"
"""The split of the hub that has questions of other exams."""
_PASSAGE = "This question refers to the following information."


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """An example that knows its subject."""

    subject: str


class MmluTask(MultipleChoiceTask):
    """MMLU, with the accuracy of each category and the mean over subjects."""

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        """`accuracy`, `macro_accuracy` (the mean over subjects) and `accuracy_CATEGORY` of those that have examples."""
        subjects = np.asarray([e.subject for e in self.examples(split) if isinstance(e, Question)])[
            : len(scores.correct)
        ]
        categories = np.asarray([CATEGORY[subject] for subject in subjects])
        found = super().metrics(split, scores)
        found["macro_accuracy"] = float(np.mean([scores.correct[subjects == s].mean() for s in np.unique(subjects)]))
        for category in CATEGORIES:
            if (categories == category).any():
                found[f"accuracy_{category}"] = float(scores.correct[categories == category].mean())
        return found

    def describe(self) -> dict[str, Any]:
        examples = (example for split in self.splits for example in self.examples(split))
        return super().describe() | {"subjects": sorted({e.subject for e in examples if isinstance(e, Question)})}


def harness(row: Row, shots: Sequence[Row]) -> str:
    def asked(row: Row) -> str:
        return f"{row.text('question').strip()}\n{lettered(choices_of(row))}\nAnswer:"

    shown = "".join(f"{asked(shot)} {answer_of(shot)}\n\n" for shot in shots)
    return f"The following are multiple choice questions (with answers) about {topic(row)}.\n\n{shown}{asked(row)}"


def eep(row: Row, shots: Sequence[Row]) -> str:
    def asked(row: Row) -> str:
        return (
            f"There is a single choice question about {topic(row)}. Answer the question by replying A, B, C or D.\n"
            f"Question: {row.text('question')}\n{lettered(choices_of(row))}\nAnswer:"
        )

    return "".join(f"{asked(shot)} {answer_of(shot)}\n" for shot in shots) + asked(row)


TEMPLATES: dict[str, Callable[[Row, Sequence[Row]], str]] = {"harness": harness, "eep": eep}


def topic(row: Row) -> str:
    return row.text("subject").replace("_", " ")


def choices_of(row: Row) -> list[str]:
    choices = row.texts("choices")
    if len(choices) != len(LETTERS):
        raise TaskError(f"{row.where}: 'choices' must be four texts, got {len(choices)}")
    return choices


def passage_of(row: Row) -> str | None:
    """What a question of history or law quotes in front of its last line, as others do too."""
    passage = row.text("question").strip().rpartition("\n")[0]
    return passage if passage.startswith(_PASSAGE) else None


def answer_of(row: Row) -> str:
    """The letter of the right choice; the column has its index (hub) or the letter."""
    return LETTERS[which(row, "answer", LETTERS)]


def mmlu_task(
    data: Data | None = None,
    *,
    subjects: str | Iterable[str] | None = None,
    held_out: bool = False,
    shots: int = 0,
    template: str = "harness",
    normalise: str = "tokens",
    fractions: Sequence[float] = FRACTIONS,
    config: str | None = None,
) -> MmluTask:
    """MMLU, from the hub ("cais/mmlu" unless `data` says otherwise) or local files.

    Args:
        data: a file of rows, a folder of them or a hub id: see `moeopt.tasks.rows.load`.
        subjects: names of subjects or categories ("stem", "humanities", "social_sciences", "other"), also as one text
            with commas between them; all by default.
        held_out: the test split of every subject that is not among `subjects`, and nothing else.
        shots: answered questions of the same subject before each, at most as many as the few-shot split has.
        template: "harness" or "eep".
        normalise: how options are compared, see `MultipleChoiceTask`.
        fractions: of search, dev and test where the data has no splits of its own; of the first two where it has
            validation and test only.
        config: configuration of a hub data set; "all" for any "mmlu".

    Raises:
        TaskError: if a subject is unknown or missing from the data, there are too few shots or no validation split to
            search on, or naming file and line of whatever is missing or malformed.
    """
    prompt_of = chosen_template(TEMPLATES, template)
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise TaskError(f"shots must be a number >= 0, got {shots!r}")
    if not isinstance(held_out, bool):
        raise TaskError(f"held_out must be true or false, got {held_out!r}")
    names = names_of(subjects)
    chosen = subjects_of(names)
    if held_out and len(chosen) == len(CATEGORY):
        raise TaskError("held_out needs the subjects that were searched, which must not be all")
    data = "cais/mmlu" if data is None else data
    config = "all" if config is None and str(data).rpartition("/")[2] == "mmlu" else config
    rows = load(data, config, also=(SHOTS,), skip=(UNREAD,))
    for row in (row for split in rows for row in rows[split]):
        if row.text("subject") not in CATEGORY:
            raise TaskError(f"{row.where}: unknown subject {row['subject']!r}{nearest(row['subject'], list(CATEGORY))}")
    shown = _shots(rows.pop(SHOTS, []), shots)
    wanted = set(CATEGORY) - chosen if held_out else chosen
    rows = {split: [row for row in rows[split] if row["subject"] in wanted] for split in rows}
    _check(rows, data, [] if held_out or subjects is None else names)

    def to_example(row: Row) -> Example:
        prompt = prompt_of(row, shown(row["subject"]))
        answer = LETTERS.index(answer_of(row))
        return Question(row.where, prompt, letters(len(LETTERS)), answer, passage_of(row), subject=row["subject"])

    own = own_examples("mmlu", rows, to_example, ("answer",))
    if held_out:
        own = {"test": own["test"]} if own.get("test") else own
        parts = {"test": own.get("test") or from_own(own, fractions)["test"]}
    elif own.get("test") and not own.get("train") and not own.get("validation"):
        raise TaskError(f"{data} has no validation split to search on; its test split is for the report alone")
    else:
        parts = from_own(own, fractions, "mmlu")
    task = MmluTask("mmlu", **parts, template=f"{template} v1, {shots} shots", normalise=normalise)
    task.origin = origin(own, rows)
    return task


def names_of(subjects: str | Iterable[str] | None) -> list[str]:
    """Names of subjects and categories as users give them; every category for None."""
    if subjects is None:
        return list(CATEGORIES)
    names = subjects.split(",") if isinstance(subjects, str) else subjects
    if not isinstance(names, Iterable):
        raise TaskError(f"subjects must be names with commas between them or a list of names, got {subjects!r}")
    found = [str(name).strip().lower().replace(" ", "_") for name in names]
    for name in found:
        if name not in CATEGORIES and name not in CATEGORY:
            hint = nearest(name, [*CATEGORIES, *CATEGORY])
            raise TaskError(f"unknown subject {name!r}{hint} (categories are {', '.join(CATEGORIES)})")
    if not found:
        raise TaskError("subjects must name at least one subject or category")
    return found


def subjects_of(names: Iterable[str]) -> set[str]:
    """The subjects behind names of subjects and categories."""
    return {subject for name in names for subject in CATEGORIES.get(name, (name,))}


def _shots(rows: Sequence[Row], n: int) -> Callable[[str], Sequence[Row]]:
    """The first n rows of a subject."""
    by_subject: dict[str, list[Row]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)

    def shown(subject: str) -> Sequence[Row]:
        found = by_subject.get(subject, [])
        if len(found) < n:
            raise TaskError(f"{n} shots of {subject} are wanted, but the {SHOTS!r} split of the data has {len(found)}")
        return found[:n]

    return shown


def _check(rows: Mapping[str, Sequence[Row]], data: Data, searched: Iterable[str]) -> None:
    """Refuses data without questions of what was chosen."""
    there = {row["subject"] for split in rows for row in rows[split]}
    for name in searched:
        if not subjects_of([name]) & there:
            raise TaskError(f"{data} has no question of {name!r}")
    if not there:
        raise TaskError(f"{data} has no question of a subject that was not searched")
