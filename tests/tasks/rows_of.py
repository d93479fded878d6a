"""Rows in the hub's schema for every benchmark, made up, with labels of all kinds: for plumbing, not for quality."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from moeopt.tasks.mmlu_subjects import CATEGORY

Make = Callable[[random.Random, int], dict[str, Any]]

WORDS = (
    "ice",
    "river",
    "stone",
    "cat",
    "fish",
    "glass",
    "moon",
    "wind",
    "tree",
    "road",
    "bird",
    "salt",
    "lamp",
    "rope",
)
SUBJECTS = ("anatomy", "astronomy", "philosophy", "sociology", "virology")


def sentence(rng: random.Random) -> str:
    return f"The {' '.join(rng.sample(WORDS, 4))} was {rng.choice(WORDS)}."


def choices(rng: random.Random, n: int, letters: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": [f"{word} {rng.randrange(99)}" for word in rng.sample(WORDS, n)], "label": [*letters[:n]]}


def arc(rng: random.Random, i: int) -> dict[str, Any]:
    n, labels = rng.choice((3, 4, 4, 5)), rng.choice(("ABCDE", "12345"))
    found = choices(rng, n, labels)
    return {"id": f"q{i}", "question": sentence(rng)[:-1] + "?", "choices": found, "answerKey": labels[i % n]}


def openbookqa(rng: random.Random, i: int) -> dict[str, Any]:
    row = {"id": f"q{i}", "question_stem": sentence(rng)[:-1], "choices": choices(rng, 4), "fact1": sentence(rng)}
    return row | {"answerKey": "ABCD"[i % 4]}


def boolq(rng: random.Random, i: int) -> dict[str, Any]:
    return {"question": sentence(rng)[:-1].lower(), "passage": sentence(rng), "idx": i, "label": i % 2}


def wic(rng: random.Random, i: int) -> dict[str, Any]:
    row = {"word": "was", "sentence1": sentence(rng), "sentence2": sentence(rng), "idx": i, "label": i % 2}
    start = str(row["sentence1"]).index(" was ") + 1
    return row | {"start1": start, "end1": start + 3, "start2": start, "end2": start + 3}


def cb(rng: random.Random, i: int) -> dict[str, Any]:
    return {"premise": sentence(rng), "hypothesis": sentence(rng)[:-1], "idx": i, "label": i % 3}


def rte(rng: random.Random, i: int) -> dict[str, Any]:
    return {"premise": sentence(rng), "hypothesis": sentence(rng), "idx": i, "label": i % 2}


def wsc(rng: random.Random, i: int) -> dict[str, Any]:
    text = f"The {rng.choice(WORDS)} told {rng.choice(WORDS)} , who was {rng.choice(WORDS)} , that it {i} left ."
    spans = {"span1_index": 0, "span1_text": " ".join(text.split()[:2]), "span2_index": 9, "span2_text": "it"}
    return {"text": text, "idx": i, "label": i % 2} | spans


def copa(rng: random.Random, i: int) -> dict[str, Any]:
    row = {"premise": sentence(rng), "choice1": sentence(rng), "choice2": sentence(rng), "idx": i, "label": i % 2}
    return row | {"question": ("cause", "effect")[i // 2 % 2]}


def multirc(rng: random.Random, i: int) -> dict[str, Any]:
    """Four answers to each of two questions about a paragraph."""
    paragraph = " ".join(sentence(random.Random(i // 8 * 100 + k)) for k in range(3))
    question = f"What was {WORDS[i // 4 % len(WORDS)]}?"
    idx = {"paragraph": i // 8, "question": i // 4, "answer": i}
    return {"paragraph": paragraph, "question": question, "answer": sentence(rng), "idx": idx, "label": i % 3 % 2}


def record(rng: random.Random, i: int) -> dict[str, Any]:
    """Two queries about each passage; every third has two gold answers."""
    about = random.Random(i // 2)
    names = [word.capitalize() for word in about.sample(WORDS, 4)]
    passage = f"{names[0]} met {names[1]}.\n@highlight\n{names[2]} and the {names[3]} left {i // 2}"
    entities = [*names[:3], f"The {names[3]}"]
    gold = [names[3], names[1]] if i % 3 == 0 else [entities[i % 4]]
    query = f"{rng.choice(WORDS)} saw @placeholder at {rng.choice(WORDS)}"
    idx = {"passage": i // 2, "query": i}
    return {"passage": passage, "query": query, "entities": entities, "answers": gold, "idx": idx}


def hellaswag(rng: random.Random, i: int) -> dict[str, Any]:
    a, b = f"[header] {sentence(rng)} [title] {sentence(rng)}", rng.choice(("he", ""))
    row = {"ind": i, "activity_label": "Roof work", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}"}
    return row | {"endings": [sentence(rng) for _ in range(4)], "label": str(i % 4)}


def winogrande(rng: random.Random, i: int) -> dict[str, Any]:
    one, two, thing = rng.sample(WORDS, 3)
    text = f"{i}: the {one} beat the {two} since the _ was {thing} {i}."
    return {"sentence": text, "option1": one, "option2": two, "answer": "12"[i % 2]}


def mmlu(rng: random.Random, i: int) -> dict[str, Any]:
    subject = SUBJECTS[i % len(SUBJECTS)]
    assert subject in CATEGORY
    return {"question": sentence(rng), "subject": subject, "choices": choices(rng, 4)["text"], "answer": i // 5 % 4}


MAKE: dict[str, Make] = {
    "arc_challenge": arc,
    "arc_easy": arc,
    "boolq": boolq,
    "cb": cb,
    "copa": copa,
    "hellaswag": hellaswag,
    "mmlu": mmlu,
    "multirc": multirc,
    "openbookqa": openbookqa,
    "record": record,
    "rte": rte,
    "wic": wic,
    "winogrande": winogrande,
    "wsc": wsc,
}


def rows_of(task: str, n: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of a benchmark by its name in the registry; another seed gives other rows."""
    rng = random.Random(f"{task} {seed}")
    return [MAKE[task](rng, i + 1000 * seed) for i in range(n)]
