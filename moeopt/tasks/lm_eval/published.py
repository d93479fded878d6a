"""What our own YAML says in Python: texts, right answers and metrics that the columns of a data set do not say."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks import answers

Doc = Mapping[str, Any]

_GSM8K = re.compile(r"#### (-?[0-9.,]+)")
_ANNOTATION = re.compile(r"<<.*?>>")


def marked(doc: Doc) -> str:
    """EEP's prompt for WSC, the noun between * and the pronoun between #."""
    words: list[str | None] = [*doc["text"].split(" ")]
    noun, pronoun = doc["span1_text"], doc["span2_text"]
    for first, span, mark in ((doc["span2_index"], pronoun, "#"), (doc["span1_index"], noun, "*")):
        length = len(span.split(" "))
        if first >= len(words):
            raise TaskError(f"a span begins at word {first}, but {doc['text']!r} has {len(words)} words")
        words[first : first + length] = [f"{mark} {span} {mark}", *[None] * (length - 1)]
    passage = " ".join(word for word in words if word is not None)
    return f"Passage: {passage}\nDoes the pronoun # {pronoun} # refer to * {noun} *?\nA. Yes\nB. No\nAnswer:"


def multirc(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Of options that say yes and no: `acc`, and what `f1a` and `all_right` are made of."""
    yes, right = int(np.argmax([total for total, _ in results])) == 0, bool(doc["label"])
    question = doc["paragraph"], doc["question"], str((doc.get("idx") or {}).get("question"))
    return {"acc": float(yes == right), "f1a": (right, yes), "em": (question, yes == right)}


def f1a(pairs: Sequence[tuple[bool, bool]]) -> float:
    """F1 of "right" over all answers, from (is, is judged); 0 where undefined."""
    both = sum(right and judged for right, judged in pairs)
    return 2 * both / max(sum(right + judged for right, judged in pairs), 1)


def all_right(pairs: Sequence[tuple[tuple[str, ...], bool]]) -> float:
    """The share of questions of which every answer that was evaluated is judged rightly."""
    questions: dict[tuple[str, ...], bool] = defaultdict(lambda: True)
    for question, right in pairs:
        questions[question] &= right
    return sum(questions.values()) / len(questions)


def news(doc: Doc) -> str:
    """The harness's prompt for ReCoRD."""
    first, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{first}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def filled(doc: Doc) -> list[str]:
    """ReCoRD's query with each entity in it, in alphabetical order."""
    return [f"  - {doc['query']}".replace("@placeholder", entity) for entity in entities(doc)]


def entities(doc: Doc) -> list[str]:
    """What ReCoRD's options are made of."""
    return sorted(set(doc["entities"]))


def right_entities(doc: Doc) -> list[int]:
    """Every entity that equals a gold answer after SQuAD's normalisation."""
    wanted = {answers.normalised(answer) for answer in doc["answers"]}
    return [i for i, entity in enumerate(entities(doc)) if answers.normalised(entity) in wanted]


def record(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """EM and F1 of the words of the chosen entity, each against the best gold answer; EM is `acc`."""
    chosen = int(np.argmax([total for total, _ in results]))
    right = float(chosen in right_entities(doc))
    return {"acc": right, "em": right, "f1": answers.f1(entities(doc)[chosen], [(text,) for text in doc["answers"]])}


def solution(doc: Doc) -> str:
    """GSM8K's worked solution without its notes, as EEP's prompt has it."""
    match = _GSM8K.search(doc["answer"])
    if match is None:
        raise TaskError(f"'answer' must end in '#### ' and a number, got {doc['answer'][-60:]!r}")
    number = re.sub(r"\.$", "", match[1].replace(",", ""))
    return f"\n{_ANNOTATION.sub('', doc['answer']).rpartition('####')[0].rstrip()}\nThe answer is {number}"


def numbers(docs: Any) -> Any:
    """DROP's questions that have a number for an answer, with these answers only."""
    from lm_eval.tasks.drop.utils import process_docs

    def numeric(doc: Doc) -> dict[str, Any]:
        return {"answers": [spans for spans in doc["answers"] if len(spans) == 1 and _is_number(spans[0])]}

    asked = process_docs(docs).map(numeric).filter(lambda doc: bool(doc["answers"]))
    if not len(asked):
        raise TaskError("no question of the data has a number for an answer, which eep_drop asks for")
    return asked


def drop(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """`last_number`: the last number of the answer is right; F1 and EM by the official rules, of the text as a span."""
    from lm_eval.tasks.drop.utils import process_results

    return {"last_number": answers.last_number(results[0], doc["answers"]), **process_results(doc, results)}


def squad(doc: Doc, results: Sequence[str], impossible: str = "unanswerable") -> dict[str, float]:
    """F1 and exact match of SQuAD 1.1; where there is no answer, `impossible` is the one accepted."""
    accepted = _accepted(doc, impossible)
    return {"f1": answers.f1(results[0], accepted), "exact_match": answers.exact_match(results[0], accepted)}


def eep_squad(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """EEP's rule first: an accepted answer occurs in the text up to its first line break, full stop or comma."""
    impossible = "impossible to answer"
    return {"contains": answers.contains(results[0], _accepted(doc, impossible)), **squad(doc, results, impossible)}


def _accepted(doc: Doc, impossible: str) -> list[tuple[str]]:
    return [(text,) for text in doc["answers"]["text"] if text.strip()] or [(impossible,)]


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
