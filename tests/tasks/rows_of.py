"""Rows in the hub's schema for every benchmark, made up, with labels of all kinds: for plumbing, not for quality."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeopt.tasks import Example, Task

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
    return {"question": sentence(rng), "subject": subject, "choices": choices(rng, 4)["text"], "answer": i // 5 % 4}


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def squad(rng: random.Random, i: int) -> dict[str, Any]:
    number = NUMBERS[i // 2 % 10]
    texts = [number, f"the {number}", number]
    row = {"id": f"q{i}", "title": "Towers", "context": f"Passage {i // 2}: {number} towers stand in Rome."}
    return row | {"question": f"How many, {i}?", "answers": {"text": texts, "answer_start": [12] * 3}}


def drop(rng: random.Random, i: int) -> dict[str, Any]:
    """Of odd number: a number, then a date, then two names; of even number the names first."""
    nobody = {"day": "", "month": "", "year": ""}
    number = {"number": str(i), "date": nobody, "spans": []}
    names = {"number": "", "date": nobody, "spans": ["Smith", "Jones"]}
    day = {"number": "", "date": {"day": "3", "month": "May", "year": "1999"}, "spans": []}
    answer, *others = (number, day, names) if i % 2 else (names, day)
    validated = {key: [other[key] for other in others] for key in ("number", "date", "spans")}
    row = {"section_id": f"s{i // 2}", "query_id": f"q{i}", "passage": f"Smith and Jones ran {i // 2} yards."}
    return row | {"question": f"Who or how many, {i}?", "answer": answer, "validated_answers": validated}


def gsm8k(rng: random.Random, i: int) -> dict[str, Any]:
    return {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### 1,{2 * i:03}"}


def math(rng: random.Random, i: int) -> dict[str, Any]:
    solution = f"Half of ${i}$ is $\\boxed{{\\frac{{{i}}}{{2}}}}$."
    return {"problem": f"What is half of {i}?", "level": "Level 1", "type": "Algebra", "solution": solution}


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
    "sglue_rte": rte,
    "wic": wic,
    "winogrande": winogrande,
    "wsc": wsc,
}


GENERATED: dict[str, Make] = {"drop": drop, "gsm8k": gsm8k, "hendrycks_math_algebra": math, "squad": squad}


def rows_of(task: str, n: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of a published task, also in EEP's prompt; another seed gives other rows."""
    name = {"eep_rte": "sglue_rte"}.get(task, task.removeprefix("eep_"))
    rng = random.Random(f"{name} {seed}")
    return [(MAKE | GENERATED)[name](rng, i + 1000 * seed) for i in range(n)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines, and the file's name."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_examples(task: Task) -> list[Example]:
    return [example for split in task.splits for example in task.examples(split)]
