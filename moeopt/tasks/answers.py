"""How a generated answer is judged: each metric is a number in [0, 1] for a text and the accepted answers.

`exact_match` and `f1` are those of SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, without
punctuation and the articles a, an, the; the best over the accepted answers counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

References = Sequence[Sequence[str]]
"""Accepted answers, each in its parts; most have one."""

Judge = Callable[[str, References], float]
"""The generated text and the accepted answers -> how right it is, in [0, 1]."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, references: References) -> float:
    """Whether text and answer are equal once normalised."""
    return float(any(normalised(text) == normalised(answer) for answer in _whole(references)))


def f1(text: str, references: References) -> float:
    """Harmonic mean of precision and recall over the words, with repetition, of the normalised texts."""
    return max(_f1(normalised(text).split(), normalised(answer).split()) for answer in _whole(references))


def last_number(text: str, references: References) -> float:
    """Whether the last number of the text equals that of an accepted answer, as a number: 1,000.0 is 1000."""
    written = number(text)
    return float(written is not None and any(written == number(answer) for answer in _whole(references)))


def contains(text: str, references: References) -> float:
    """EEP's rule: an accepted answer occurs in the text up to its first line break, full stop or comma."""
    said = text.split("\n")[0].lower().split("answer is")[-1]
    said = normalised(re.split(r"[.,]", said)[0])
    return float(any(normalised(answer) in said for answer in _whole(references)))


def number(text: str) -> Decimal | None:
    """The last number in a text; a minus counts as a sign where no digit, letter or bracket stands before it."""
    last = None
    for match in _NUMBER.finditer(text):
        digits = match[0].replace(",", "")
        binary = digits[0] == "-" and (text[: match.start()][-1:].isalnum() or text[: match.start()].endswith(")"))
        last = Decimal(digits[1:] if binary else digits)
    return last


METRICS: dict[str, Judge] = {"exact_match": exact_match, "f1": f1, "last_number": last_number}


def _whole(references: References) -> list[str]:
    return [", ".join(parts) for parts in references]


def _f1(words: list[str], wanted: list[str]) -> float:
    common = (Counter(words) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
