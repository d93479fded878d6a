"""Metrics of generated answers, against the official scripts' rules done slowly."""

from __future__ import annotations

import re
import string
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeopt.tasks import answers, drop, gsm8k, math_problems, squad

SPANS = st.lists(st.sampled_from(["the", "Tom", "tom's", "12-7", "5", "5.0", "3%", "An", "May", "..."]), max_size=4)
TEXTS = SPANS.map(" ".join)
LISTS = st.lists(TEXTS, min_size=1, max_size=3)


def slow_normalised(text: str) -> str:
    """SQuAD v1.1: lower, remove punctuation, remove articles, fix white space, in this order."""
    letters = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(word for word in re.split(r"\s+", letters) if word and word not in ("a", "an", "the"))


@given(TEXTS, TEXTS)
def test_f1_and_exact_match_are_those_of_squad(text, answer):
    found, wanted = slow_normalised(text).split(), slow_normalised(answer).split()
    rest, same = list(wanted), 0
    for word in found:
        if word in rest:
            rest.remove(word)
            same += 1
    expected = 2 * Fraction(same, len(found) + len(wanted)) if same else 0
    assert answers.f1(text, [(answer,)]) == pytest.approx(float(expected))
    assert answers.exact_match(text, [(answer,)]) == (found == wanted)


def test_squad_by_hand():
    assert answers.normalised("The  U.S.' 2nd\nan-swer, a (test)") == "us 2nd answer test"
    assert answers.f1("the Virgin Mary", [("Mary",), ("Saint Bernadette",)]) == pytest.approx(2 / 3)
    assert answers.exact_match("Saint Bernadette!", [("Mary",), ("saint bernadette",)]) == 1
    assert answers.f1("", [("Mary",)]) == 0
    assert squad.contains("The answer is Saint Bernadette, in 1858.", [("bernadette",)]) == 1
    assert squad.contains("In 1858, Bernadette", [("bernadette",)]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,000.0 in all", "1000"), ("from 5 to -3", "-3"), ("12-7", "7"), ("$ .5!", "0.5"), ("none", None), ("7.", "7")],
)
def test_last_number(text, expected):
    assert answers.number(text) == (None if expected is None else answers.number(expected))
    assert answers.last_number(text, [("8",), (expected or "9",)]) == (expected is not None)


def slow_bag(span: str) -> set[str]:
    """DROP: parted at spaces and hyphens; punctuation goes unless the word is a number; numbers become floats."""
    words = []
    for word in span.lower().replace("-", " ").split(" "):
        try:
            float(word)
        except ValueError:
            word = "".join(c for c in word if c not in string.punctuation)
        try:
            word = str(float(word))
        except ValueError:
            word = re.sub(r"\b(a|an|the)\b", " ", word)
        words += word.split()
    return set(words)


def slow_drop_f1(found: list[str], wanted: list[str]) -> float:
    """The mean over the best of all alignments, the shorter list filled up with nothing."""

    def score(x: set[str] | None, y: set[str] | None) -> float:
        if x is None or y is None:
            return 0.0
        numbers = {w for w in y if re.fullmatch(r"-?[\d.]+", w)}
        if numbers and not numbers & x:
            return 0.0
        precision, recall = len(x & y) / len(x) if x else 1.0, len(x & y) / len(y) if y else 1.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    size = max(len(found), len(wanted))
    a: list[set[str] | None] = [*map(slow_bag, found), *[None] * (size - len(found))]
    b: list[set[str] | None] = [*map(slow_bag, wanted), *[None] * (size - len(wanted))]
    return round(max(sum(map(score, order, b)) for order in permutations(a)) / size, 2)


@given(LISTS, LISTS)
def test_drop_f1_is_that_of_the_best_alignment(found, wanted):
    assert drop.official_f1(found, wanted) == pytest.approx(slow_drop_f1(found, wanted), abs=0.0101)


def test_drop_by_hand():
    """Cases of AllenNLP's tests of the official script, and of the paper's rules."""
    assert drop.official_f1(["12 yards"], ["12"]) == 0.67
    assert drop.official_f1(["18"], ["19"]) == 0
    assert drop.official_f1(["ottoman empire"], ["Ottoman", "Byzantine"]) == 0.33
    assert drop.official_exact_match(["the 1940s-50s"], ["1940s 50s"]) == 1
    assert drop.official_exact_match(["b", "a b"], ["a b", "B"]) == 1
    assert drop.official_exact_match(["5.0"], ["5"]) == 1
    assert drop.official_exact_match(["Smith", "Jones", "Smith"], ["Smith", "Jones"]) == 0
    assert drop.f1(" Jones, Smith", [("Smith", "Jones")]) == 0.33
    assert drop.f1_list(" Jones, Smith", [("Smith", "Jones")]) == 1
    assert drop.exact_match_list("1,5", [("1.5",), ("15",)]) == 1


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 9 * 2 = 18\n#### 18", 1, 1),
        ("#### 1,018.\nand 18", 0, 1),
        ("It is $18.", 0, 1),
        ("#### 18 of 20", 1, 0),
        ("#### 18.00", 0, 0),
        ("no idea", 0, 0),
    ],
)
def test_gsm8k_extraction_is_the_harness_s(text, strict, flexible):
    assert gsm8k.strict_match(text, [("18",)]) == strict
    assert gsm8k.flexible_extract(text, [("18",)]) == flexible


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\tfrac{1}{2}", r"\frac12", True),
        ("0.5", "1/2", True),
        (".5", "0.5", True),
        (r"\frac1{72}", r"\frac{1}{72}", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"x = 5", "5", True),
        (r"5\text{ cm}", "5", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})", True),
        (r"90^\circ", "90", True),
        (r"10\%", "10", True),
        (r"\$1{,}000", r"1{,}000", True),
        ("1,000", "1000", False),
        (r"\frac{2}{4}", r"\frac{1}{2}", False),
        ("x", "y", False),
    ],
)
def test_math_equivalence(a, b, same):
    assert (math_problems.normalised(a) == math_problems.normalised(b)) == same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"so $\boxed 7$ it is", "7"),
        (r"\fbox{3}", "3"),
        ("it is $x$ or $y$", "x$ or $y"),
        (r"\boxed{1 + {2}", r"\boxed{1 + {2}"),
        (" 12", " 12"),
    ],
)
def test_what_a_text_says_its_answer_is(text, answer):
    assert math_problems.extracted(text) == answer
