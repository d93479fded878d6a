"""What moeopt knows of published data sets beside the harness's YAML, by the columns that they have.

- Other forms: SuperGLUE's, AI2's and Google's own files say the same as the hub's rows, in other columns; local files
  may be either.
- Ties: rows that are of one source, such as questions about one passage, stay in one split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeopt.errors import TaskError
from moeopt.tasks.rows import Row, text_of, which, yes_no

Values = Mapping[str, Any]

PASSAGES = ("passage", "paragraph", "article", "premise", "context", "support")
"""Columns that hold what several questions may be about."""
SUBJECTS = {"cais/mmlu": "subject", "EleutherAI/hendrycks_math": "type"}
"""The column of a data set that says of which configuration a row is, where one file may hold those of several."""
SEARCHED = {"cais/mmlu": "validation"}
"""The split to search on of data sets of which the harness reads that to evaluate and that of the shots only."""
_MMLU_PASSAGE = "This question refers to the following information."


@dataclass(frozen=True)
class Form:
    """How rows of local files are read: `labels` are the columns of which one holds the answer, and `rows` gives the
    rows in the hub's schema that a row of any published form stands for."""

    labels: tuple[str, ...]
    rows: Callable[[Row], Iterable[Values]] = lambda row: (row.values,)


def form(path: str, name: str | None) -> Form:
    """The form of a data set of the hub, and its configuration; that of an unknown one has no label to look for."""
    return _FORMS.get((path.rpartition("/")[2], name)) or _FORMS.get((path.rpartition("/")[2], None)) or Form(())


def subject(path: str, row: Values) -> str | None:
    """Of which configuration of the data set a row is, where it says so."""
    value = row.get(SUBJECTS.get(path, ""))
    return value.lower().replace("&", "and").replace(" ", "_") if isinstance(value, str) else None


def ties(doc: Values) -> tuple[str, ...]:
    """The names of what a document shares with others that must stay in its split."""
    passages = tuple(doc[column] for column in PASSAGES if isinstance(doc.get(column), str))
    return passages or next((tied(doc) for columns, tied in _TIES if doc.keys() >= columns), ())


def _twins(doc: Values) -> tuple[str, ...]:
    """What ties a sentence of WinoGrande to its twin, which has the other name for an answer: the id of the pair, or
    the names together with what precedes or follows the blank, since twins differ in one word or two."""
    before, _, after = doc["sentence"].partition("_")
    pair = " or ".join(sorted((doc["option1"], doc["option2"])))
    return str(doc.get("qID") or "").rpartition("-")[0], f"{before} {pair}", f"{pair} {after}"


def _quoted(doc: Values) -> tuple[str, ...]:
    """What a question of MMLU's history or law quotes in front of its last line, as others do too."""
    passage = doc["question"].strip().rpartition("\n")[0]
    return (passage,) if passage.startswith(_MMLU_PASSAGE) else ()


def _solved(doc: Values) -> tuple[str, ...]:
    """The question of a row of GSM8K."""
    return (doc["question"],) if "#### " in str(doc["answer"]) else ()


def _columns(*columns: str) -> Callable[[Values], tuple[str, ...]]:
    return lambda doc: tuple(str(doc.get(column) or "") for column in columns)


_TIES: tuple[tuple[frozenset[str], Callable[[Values], tuple[str, ...]]], ...] = (
    (frozenset({"sentence1", "sentence2", "word"}), _columns("sentence1", "sentence2")),  # WiC
    (frozenset({"sentence", "option1", "option2"}), _twins),
    (frozenset({"query", "endings"}), _columns("query", "source_id")),  # HellaSwag
    (frozenset({"text", "span1_text", "span2_text"}), _columns("text")),  # WSC
    (frozenset({"question_stem"}), _columns("question_stem", "fact1")),  # OpenBookQA
    (frozenset({"question", "choices", "answerKey"}), _columns("question")),  # ARC
    (frozenset({"question", "choices", "subject"}), _quoted),
    (frozenset({"question", "answer"}), _solved),
    (frozenset({"problem", "solution"}), _columns("problem")),  # MATH
)


def _labelled(column: str, names: Sequence[str] = ()) -> Callable[[Row], Any]:
    """A row with the label in a column as its index among `names`; without them as a text."""

    def rows(row: Row) -> Iterator[Values]:
        yield {**row.values, column: which(row, column, names) if names else text_of(row[column])}

    return rows


def _boolq(row: Row) -> Iterator[Values]:
    yield {**row.values, "label": int(yes_no(row, "label", "answer"))}


def _wic(row: Row) -> Iterator[Values]:
    """With the places of the words, which are found where a row does not say them."""
    values = {**row.values, "label": int(yes_no(row, "label"))}
    for n in "12":
        if f"start{n}" in row.values:
            start, end = row.number(f"start{n}"), row.number(f"end{n}")
        else:
            start = row.text(f"sentence{n}").find(row.text("word"))
            end = start + len(row.text("word"))
            if start < 0:
                raise TaskError(f"{row.where}: no 'start{n}', and {row['word']!r} is not in 'sentence{n}'")
        values |= {f"start{n}": start, f"end{n}": end}
    yield values


def _wsc(row: Row) -> Iterator[Values]:
    """The spans of SuperGLUE's "target" as columns."""
    target = row.inner("target") if "target" in row.values else row
    spans = {column: target.number(column) for column in ("span1_index", "span2_index")}
    texts = {column: target.text(column) for column in ("span1_text", "span2_text")}
    yield {**row.values, **spans, **texts, "label": int(yes_no(row, "label"))}


def _science(row: Row) -> Iterator[Values]:
    """AI2's own form of a question: stem, texts and labels are columns on the hub."""
    values = dict(row.values)
    if isinstance(values.get("question"), Mapping):
        question = row.inner("question")
        stem, choices = question.text("stem"), question.inners("choices")
        columns = {name: [choice.text(name) for choice in choices] for name in ("text", "label")}
        values |= {"question": stem, "question_stem": stem, "choices": columns}
    choices_there = Row(row.where, values).inner("choices")
    texts, labels = choices_there.texts("text"), choices_there.texts("label")
    key = text_of(row["answerKey"])
    if len(texts) != len(labels):
        raise TaskError(f"{row.where}: 'choices' must have as many texts as labels, got {len(texts)} and {len(labels)}")
    if key not in labels:
        raise TaskError(f"{row.where}: 'answerKey' must be one of {', '.join(labels)}, got {row['answerKey']!r}")
    yield {**values, "answerKey": key}


def _multirc(row: Row) -> Iterator[Values]:
    """A row for each answer, from SuperGLUE's line for each paragraph."""
    if "passage" not in row.values:
        yield {**row.values, "label": int(yes_no(row, "label"))}
        return
    passage = row.inner("passage")
    for q, question in enumerate(passage.inners("questions")):
        for a, answer in enumerate(question.inners("answers")):
            yield {
                "paragraph": passage.text("text"),
                "question": question.text("question"),
                "answer": answer.text("text"),
                "idx": {"paragraph": row.values.get("idx"), "question": q, "answer": a},
                "label": int(yes_no(answer, "label")),
            }


def _record(row: Row) -> Iterator[Values]:
    """A row for each query, from SuperGLUE's line for each passage."""
    if isinstance(row["passage"], str):
        yield {**row.values, "entities": row.texts("entities"), "answers": row.texts("answers")}
        return
    passage = row.inner("passage")
    text = passage.text("text")
    entities = {text[span.number("start") : span.number("end") + 1] for span in passage.inners("entities")}
    for number, query in enumerate(row.inners("qas")):
        yield {
            "passage": text,
            "query": query.text("query"),
            "entities": sorted(entities),
            "answers": sorted({answer.text("text") for answer in query.inners("answers")}),
            "idx": {"passage": row.values.get("idx"), "query": number},
        }


_FORMS: dict[tuple[str, str | None], Form] = {
    ("super_glue", "boolq"): Form(("label", "answer"), _boolq),
    ("super_glue", "wic"): Form(("label",), _wic),
    ("super_glue", "cb"): Form(("label",), _labelled("label", ("entailment", "contradiction", "neutral"))),
    ("super_glue", "rte"): Form(("label",), _labelled("label", ("entailment", "not_entailment"))),
    ("super_glue", "copa"): Form(("label",), _labelled("label", ("choice1", "choice2"))),
    ("super_glue", "wsc.fixed"): Form(("label",), _wsc),
    ("super_glue", "multirc"): Form(("label", "passage"), _multirc),
    ("super_glue", "record"): Form(("answers", "qas"), _record),
    ("ai2_arc", None): Form(("answerKey",), _science),
    ("openbookqa", None): Form(("answerKey",), _science),
    ("hellaswag", None): Form(("label",), _labelled("label", ("0", "1", "2", "3"))),
    ("winogrande", None): Form(("answer",), _labelled("answer")),
    ("mmlu", None): Form(("answer",), _labelled("answer", ("A", "B", "C", "D"))),
    ("gsm8k", None): Form(("answer",)),
    ("hendrycks_math", None): Form(("solution",)),
    ("squad", None): Form(("answers",)),
}
