"""The demo model's skills: five generated multiple-choice tasks and English text.

One row of the skill ``dates``::

    {"id": "dates-17 Mar+20", "prompt": "dates 17 Mar+20=", "options": ["6 Apr", "7 Apr", "5 Apr", "16 Apr"],
     "answer": 0}

Rows are a function of (skill, split, position) alone, equal on every machine. A hash of the
question decides its split, so no question of one split is ever asked in another. ``text`` has documents instead of
rows: sections of Python's documentation, whole sections held out (``data/python_topics.txt``).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent / "model"
"""The folder of the shipped checkpoint."""
TEXT = Path(__file__).parent / "data" / "python_topics.txt"
SPLITS = ("train", "search", "dev", "test")
DEFAULT_SKILL = "caesar"
"""What `moeopt demo` searches for."""

Question = tuple[str, str, list[str]]
"""What is asked, the right answer, wrong answers (distinct, at least three)."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROMAN = (
    ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"),
    ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"),
    ("", "C", "CC", "CCC", "CD", "D", "DC", "DCC", "DCCC", "CM"),
    ("", "M", "MM", "MMM"),
)


def rows(skill: str, split: str, limit: int | None = None) -> list[Any]:
    """The first `limit` examples of a skill's split, "train", "search", "dev" or "test"; no example is in two of them.

    Args:
        limit: None: all documents of ``text``, up to 1,000 rows of the others (``add`` and ``roman`` have fewer).

    Returns:
        For ``text`` documents (plain strings), otherwise rows ``{"id": str, "prompt": str, "options": list of 4
        distinct strings, "answer": int}``; the model's text is ``prompt + options[answer]``.

    Raises:
        ValueError: unknown skill or split, or a negative limit.
    """
    if skill not in SKILLS:
        raise ValueError(f"unknown demo skill {skill!r}; known: {', '.join(SKILLS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    if skill == "text":
        return list(documents(split)[:limit])
    return list(islice(stream(skill, split), 1000 if limit is None else limit))


def stream(skill: str, split: str) -> Iterator[dict[str, Any]]:
    """Distinct rows of a generated skill, in a fixed order, until its questions are (nearly) used up."""
    rng = random.Random(f"moeopt:{skill}:{split}")
    seen: set[str] = set()
    misses = 0
    while misses < 20_000:
        asked, right, wrong = _MAKERS[skill](rng)
        if asked in seen or _split(skill, asked) != split:
            misses += 1
            continue
        misses = 0
        seen.add(asked)
        options = [right, *rng.sample(wrong, 3)]
        rng.shuffle(options)
        yield {
            "id": f"{skill}-{asked}",
            "prompt": f"{skill} {asked}=",
            "options": options,
            "answer": options.index(right),
        }


@cache
def documents(split: str) -> tuple[str, ...]:
    """The documentation sections of a split; the file marks each with a form feed and its title."""
    sections = TEXT.read_text(encoding="utf-8").split("\f")[1:]
    titled = [section.partition("\n")[::2] for section in sections]
    return tuple(body for title, body in titled if _split("text", title) == split)


def _split(skill: str, asked: str) -> str:
    share = hashlib.sha256(f"{skill}:{asked}".encode()).digest()[0]
    return "train" if share < 192 else SPLITS[1 + share % 3]


def _add(rng: random.Random) -> Question:
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    right = a + b
    return f"{a}+{b}", str(right), [str(right + step) for step in range(-15, 16) if step != 0]


def _sort(rng: random.Random) -> Question:
    asked = "".join(rng.choices(LETTERS, k=rng.randrange(8, 13)))
    right = "".join(sorted(asked))
    return asked, right, _misspelt(right, rng)


def _caesar(rng: random.Random) -> Question:
    shift = rng.randrange(1, 10)
    plain = "".join(rng.choices(LETTERS, k=rng.randrange(6, 10)))
    right = "".join(LETTERS[(LETTERS.index(letter) + shift) % 26] for letter in plain)
    return f"{plain}>{shift}", right, _misspelt(right, rng)


def _misspelt(word: str, rng: random.Random) -> list[str]:
    """Four words that differ from `word` by two neighbours swapped, or by one letter moved along the alphabet."""
    wrong: list[str] = []
    while len(wrong) < 4:
        at = rng.randrange(len(word) - 1)
        if rng.random() < 0.5:
            near = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        else:
            letter = LETTERS[(LETTERS.index(word[at]) + rng.choice((-1, 1))) % 26]
            near = word[:at] + letter + word[at + 1 :]
        if near != word and near not in wrong:
            wrong.append(near)
    return wrong


def _dates(rng: random.Random) -> Question:
    start = date(2001, 1, 1) + timedelta(days=rng.randrange(365))
    step = rng.randrange(3, 100)
    right = start + timedelta(days=step)
    near = [right + timedelta(days=days) for days in range(-15, 16) if days != 0]
    return f"{_day(start)}+{step}", _day(right), [_day(day) for day in near]


def _day(day: date) -> str:
    names = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    return f"{day.day} {names[day.month - 1]}"


def _roman(rng: random.Random) -> Question:
    number = rng.randrange(1, 4000)
    near = {number + step for step in (1, -1, 2, 10, -10, 100, -100, 1000)}
    return str(number), _numeral(number), [_numeral(value) for value in sorted(near) if 0 < value < 4000]


def _numeral(number: int) -> str:
    return "".join(ROMAN[place][number // 10**place % 10] for place in (3, 2, 1, 0))


_MAKERS: dict[str, Callable[[random.Random], Question]] = {
    "add": _add,
    "sort": _sort,
    "caesar": _caesar,
    "dates": _dates,
    "roman": _roman,
}
SKILLS = (*_MAKERS, "text")
"""What the shipped model can do."""
