"""Exact match and F1 as the data sets define them."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 16)
def normalised(answer: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, gold: str) -> float:
    """SQuAD's F1 of the words of two answers, after normalisation; 1 if neither has a word."""
    words, gold_words = normalised(answer).split(), normalised(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    return 2 * sum((Counter(words) & Counter(gold_words)).values()) / (len(words) + len(gold_words))


def class_f1(chosen: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """F1 of one class, from whether it was chosen and whether it is true, both (examples,); 0 where undefined."""
    both = int(np.sum(chosen & true))
    return 2 * both / max(int(np.sum(chosen)) + int(np.sum(true)), 1)
