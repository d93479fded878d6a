"""DROP (Dua et al. 2019, arXiv 1903.00161): questions that take counting, adding or sorting over a passage.

    {"section_id": "nfl_2201", "query_id": "f16c0ee7-f131-4a8b-a6ac-4d275ea68066",
     "passage": "To start the season, the Lions traveled south to Tampa, Florida to take on the Tampa Bay ...",
     "question": "How many points did the buccaneers need to tie in the first?",
     "answers_spans": {"spans": ["3"], "types": ["number"]}}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `drop`, and a space before the answer; up to "."):

    To start the season, the Lions traveled south to Tampa, Florida to take on the Tampa Bay ... How many points did the
    buccaneers need to tie in the first? 3

(one line), and with `template="eep"` (the prompt of EEP, arXiv 2407.00945, there in a chat: two worked examples, then;
only questions that have a number for an answer)

    Text: To start the season, the Lions traveled south to Tampa, Florida to take on the Tampa Bay ...
    Question: How many points did the buccaneers need to tie in the first?
    Answer: So the answer is 3.

The harness's stop, ".", cuts a decimal fraction in two; `stop="\\n"` does not.

Reported are F1 and exact match by the official rules: numbers are compared as numbers, an answer of several spans as
bags of words that are aligned one to one, and the best over all accepted answers counts. The official rules take a
list of spans from the model; what is generated is one text, and taken as one span, as the harness does. `f1_list` and
`exact_match_list` cut it at ", " where the answer has several spans. With "eep", first `last_number`: the last number
of the text is right; EEP also accepts a number that has the right one in its digits. The loss is that of the first
accepted answer, spans joined by ", ".

Answers: "answers_spans" (ucinlp/drop) is a flat list. In a train split it is one answer. In others it is those of
several annotators, and which span belongs to which of them is lost: numbers and dates are taken as an answer each,
and spans too, unless they are one list over and over. "answer" and "validated_answers" (EleutherAI/drop) keep them
apart.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeopt.errors import TaskError
from moeopt.tasks.answers import References, last_number
from moeopt.tasks.base import Example
from moeopt.tasks.labels import has_label
from moeopt.tasks.rows import Data, Row, load
from moeopt.tasks.written import Rows, Template, WrittenBenchmark

Spans = tuple[str, ...]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

EEP_EXAMPLES = (
    "Text: In the county, the population was spread out with 23.50% under the age of 18, 8.70% from 18 to 24, "
    "29.70% from 25 to 44, 24.70% from 45 to 64, and 13.30% who were 65 years of age or older.\n"
    "Question: How many more percent are under the age of 18 compared to the 18 to 24 group?\n"
    "Answer: According to the text, 23.5% are under the age of 18, and 8.7% are from ages 18 to 24. "
    "23.5%-8.7%=14.8%. So the answer is 14.8.\n"
    "\n"
    "Text: Playing in their second straight Thanksgiving game, the Eagles struggled especially on defense, "
    "where they were unable to stop the much-hyped Lions offense. The worst of it all was how unproven rookie "
    "Eric Rowe was tasked with covering wide receiver Calvin Johnson, leading to Johnson catching 3 "
    "touchdowns. Stafford’s five passing touchdowns, including three of them to Johnson was too much for the "
    "Eagles to overcome and for the second consecutive time this season, the Eagles gave up 45 points in a "
    "game. With the loss, the Eagles drop to 4-7 on the season and 6-1 when playing on Thanksgiving.\n"
    "Question: How many TD passes did Stafford throw other than to Johnson?\n"
    "Answer: According to the text, Stafford threw 5 TD passes, 3 of which were to Johnson. 5-3=2. So the "
    "answer is 2.\n"
    "\n"
)


def harness(row: Row) -> Example:
    answers = _answers(row)
    options = tuple(" " + ", ".join(spans) for spans in answers)
    prompt = f"{row.text('passage')} {row.text('question')}"
    return Example(_id(row), prompt, options, 0, group=row.text("passage"), references=answers)


def eep(row: Row) -> Example:
    numbers = _numbers(_answers(row))
    prompt = f"{EEP_EXAMPLES}Text: {row.text('passage')}\nQuestion: {row.text('question')}\nAnswer:"
    options = tuple(f" So the answer is {spans[0]}." for spans in numbers)
    return Example(_id(row), prompt, options, 0, group=row.text("passage"), references=numbers)


def f1(text: str, references: References) -> float:
    """Official F1 of the text as one span."""
    return max(official_f1((text,), spans) for spans in references)


def exact_match(text: str, references: References) -> float:
    """Official exact match of the text as one span."""
    return max(official_exact_match((text,), spans) for spans in references)


def f1_list(text: str, references: References) -> float:
    """Official F1 of the text cut at ", " where the answer has several spans."""
    return max(official_f1(_cut(text, spans), spans) for spans in references)


def exact_match_list(text: str, references: References) -> float:
    """Official exact match of the text cut at ", " where the answer has several spans."""
    return max(official_exact_match(_cut(text, spans), spans) for spans in references)


def official_exact_match(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Whether the spans are the same, in any order, once normalised."""
    a, b = [normalised(span) for span in found], [normalised(span) for span in wanted]
    return float(len(a) == len(b) and set(a) == set(b))


def official_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean F1 of the spans' sets of words under the best one-to-one alignment, rounded to 2 digits.

    Spans that are left over, on either side, count as 0; so does a pair where the wanted span has numbers and the found
    one has none of them.
    """
    a, b = [set(normalised(span).split()) for span in found], [set(normalised(span).split()) for span in wanted]
    scores = np.array([[_f1(x, y) if _numbers_agree(x, y) else 0.0 for x in a] for y in b])
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return round(float(scores[rows, columns].sum()) / max(len(a), len(b)), 2)


def normalised(text: str) -> str:
    """Lower case; hyphens part words; numbers as floats; no punctuation, except in numbers; no articles."""
    words = []
    for word in re.split(" |-", text.lower()):
        word = word if _is_number(word) else word.translate(_PUNCTUATION)
        word = str(float(word)) if _is_number(word) else word
        words += _ARTICLES.sub(" ", word).split()
    return " ".join(words)


OFFICIAL = {"f1": f1, "exact_match": exact_match, "f1_list": f1_list, "exact_match_list": exact_match_list}
TEMPLATES = {
    "harness": Template(harness, OFFICIAL, (".",), 50),
    "eep": Template(eep, {"last_number": last_number, **OFFICIAL}, ("\n\n", "Text:"), 30),
}


def parsed_rows(data: Data, config: str | None, template: str) -> Rows:
    """Rows with their accepted answers; of the template "eep" those whose answers are numbers."""
    own = load(data, config)
    for split, rows in own.items():
        parsed = [Row(row.where, {**row.values, _ANSWERS: _parsed(row, one=split == "train")}) for row in rows]
        own[split] = [r for r in parsed if template != "eep" or not r.values[_ANSWERS] or _numbers(r.values[_ANSWERS])]
    if not any(_numbers(row.values[_ANSWERS]) for rows in own.values() for row in rows) and template == "eep":
        raise TaskError("template 'eep' asks only for numbers, and no question of the data has one for an answer")
    return own


drop_task = WrittenBenchmark(
    "drop",
    hub="ucinlp/drop",
    templates=TEMPLATES,
    labels=("answers_spans", "answer"),
    labelled=lambda row: bool(row.values[_ANSWERS]),
    rows=parsed_rows,
)


_ANSWERS = "accepted answers"


def _id(row: Row) -> str:
    return str(row.values.get("query_id", row.where))


def _answers(row: Row) -> tuple[Spans, ...]:
    found: tuple[Spans, ...] = row.values[_ANSWERS]
    if not found:
        raise TaskError(f"{row.where}: the question has no answer")
    return found


def _parsed(row: Row, one: bool) -> tuple[Spans, ...]:
    """The accepted answers of a row in either schema, if it has any; `one`: a flat list of spans is one answer."""
    if not has_label(row, "answers_spans", "answer", "validated_answers"):
        return ()
    try:
        if "answer" in row.values or "answers_spans" not in row.values:
            answer, validated = row["answer"], row.values.get("validated_answers") or []
            if isinstance(validated, Mapping):
                validated = [dict(zip(validated, values)) for values in zip(*validated.values())]
            found = [_annotated(a) for a in (answer, *validated) if a is not None]
        else:
            answers = row["answers_spans"] or {"spans": [], "types": []}
            found = _unflattened(answers["spans"], answers["types"], one)
        return tuple(dict.fromkeys(spans for spans in found if "".join(spans).strip()))
    except (KeyError, TypeError, AttributeError) as error:
        raise TaskError(
            f"{row.where}: answers must be as in ucinlp/drop ('answers_spans') or EleutherAI/drop ('answer' and"
            f" 'validated_answers'): {type(error).__name__}: {error}"
        ) from error


def _numbers(answers: Iterable[Spans]) -> tuple[Spans, ...]:
    return tuple(spans for spans in answers if len(spans) == 1 and _is_number(spans[0].replace(",", "")))


def _annotated(answer: Mapping[str, Any]) -> Spans:
    if answer["number"] != "":
        return (str(answer["number"]),)
    if answer["spans"]:
        return tuple(answer["spans"])
    return (" ".join(answer["date"][part] for part in ("day", "month", "year")).strip(),)


def _unflattened(spans: Sequence[str], types: Sequence[str], one: bool) -> list[Spans]:
    if one:
        return [tuple(spans)]
    alone = [(span,) for span, kind in zip(spans, types, strict=True) if kind != "span"]
    listed = [span for span, kind in zip(spans, types) if kind == "span"]
    for size in range(1, len(listed) // 2 + 1):
        if len(listed) % size == 0 and listed == listed[:size] * (len(listed) // size):
            return [*alone, tuple(listed[:size])]
    return [*alone, *((span,) for span in listed)]


def _cut(text: str, spans: Sequence[str]) -> Sequence[str]:
    return text.split(", ") if len(spans) > 1 else (text,)


def _f1(found: set[str], wanted: set[str]) -> float:
    common = len(found & wanted)
    precision = common / len(found) if found else 1.0
    recall = common / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _numbers_agree(found: set[str], wanted: set[str]) -> bool:
    numbers = {word for word in wanted if _is_number(word)}
    return not numbers or bool(numbers & found)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
