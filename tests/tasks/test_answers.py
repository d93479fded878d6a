"""Metrics of generated answers, against the official scripts' rules done slowly."""

from __future__ import annotations

import re
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeopt.tasks import answers

SPANS = st.lists(st.sampled_from(["the", "Tom", "tom's", "12-7", "5", "5.0", "3%", "An", "May", "..."]), max_size=4)
TEXTS = SPANS.map(" ".join)


def slow_normalised(text: str) -> str:
    """SQuAD v1.1: lower, remove punctuation, remove articles, fix white space, in this order."""
    letters = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(word for word in re.split(r"\s+", letters) if word and word not in ("a", "an", "the"))


@given(TEXTS, TEXTS)
def test_f1_and_exact_match_are_those_of_squad(text, answer):
    said, wanted = slow_normalised(text).split(), slow_normalised(answer).split()
    rest, same = list(wanted), 0
    for word in said:
        if word in rest:
            rest.remove(word)
            same += 1
    expected = 2 * Fraction(same, len(said) + len(wanted)) if same else 0
    assert answers.f1(text, [(answer,)]) == pytest.approx(float(expected))
    assert answers.exact_match(text, [(answer,)]) == (said == wanted)


def test_squad_by_hand():
    assert answers.normalised("The  U.S.' 2nd\nan-swer, a (test)") == "us 2nd answer test"
    assert answers.f1("the Virgin Mary", [("Mary",), ("Saint Bernadette",)]) == pytest.approx(2 / 3)
    assert answers.exact_match("Saint Bernadette!", [("Mary",), ("saint bernadette",)]) == 1
    assert answers.f1("", [("Mary",)]) == 0
    assert answers.contains("The answer is Saint Bernadette, in 1858.", [("bernadette",)]) == 1
    assert answers.contains("In 1858, Bernadette", [("bernadette",)]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,000.0 in all", "1000"), ("from 5 to -3", "-3"), ("12-7", "7"), ("$ .5!", "0.5"), ("none", None), ("7.", "7")],
)
def test_last_number(text, expected):
    assert answers.number(text) == (None if expected is None else answers.number(expected))
    assert answers.last_number(text, [("8",), (expected or "9",)]) == (expected is not None)
