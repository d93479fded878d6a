"""Rows in the hub's schema for every benchmark, made up, with labels of all kinds; files of rows, and helpers."""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moeopt.tasks import Example, Task

Make = Callable[[random.Random, int], dict[str, Any]]

WORDS = "ice river stone cat fish glass moon wind tree road bird salt lamp rope".split()  # noqa: SIM905
SUBJECTS = ("anatomy", "astronomy", "philosophy", "sociology", "virology")


def sentence(rng: random.Random) -> str:
    return f"The {' '.join(rng.sample(WORDS, 4))} was {rng.choice(WORDS)}."


def choices(rng: random.Random, n: int, letters: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": [f"{word} {rng.randrange(99)}" for word in rng.sample(WORDS, n)], "label": [*letters[:n]]}


def arc(rng: random.Random, i: int) -> dict[str, Any]:
    n, labels = rng.choice((3, 4, 4, 5)), rng.choice(("ABCDE", "12345"))
    listed = choices(rng, n, labels)
    return {"id": f"q{i}", "question": sentence(rng)[:-1] + "?", "choices": listed, "answerKey": labels[i % n]}


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
    first, second, thing = rng.sample(WORDS, 3)
    text = f"{i}: the {first} beat the {second} since the _ was {thing} {i}."
    return {"sentence": text, "option1": first, "option2": second, "answer": "12"[i % 2]}


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
    "arc_challenge": arc, "arc_easy": arc, "boolq": boolq, "cb": cb, "copa": copa, "hellaswag": hellaswag, "mmlu": mmlu,
    "multirc": multirc, "openbookqa": openbookqa, "record": record, "sglue_rte": rte, "wic": wic,
    "winogrande": winogrande, "wsc": wsc,
}  # fmt: skip
GENERATED: dict[str, Make] = {"drop": drop, "gsm8k": gsm8k, "hendrycks_math_algebra": math, "squad": squad}
CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def rows_of(task: str, n: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of a published task, also in EEP's prompt; another seed gives other rows."""
    name = {"eep_rte": "sglue_rte"}.get(task, task.removeprefix("eep_"))
    rng = random.Random(f"{name} {seed}")
    return [(MAKE | GENERATED)[name](rng, i + 1000 * seed) for i in range(n)]


def write(path: Path, rows: Sequence[Any]) -> str:
    """Rows in the form that the file's name says, of another form their JSON lines (texts as they are); its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    packing = next((ending for ending in PACK if name.endswith(ending)), "")
    form = Path(name.removesuffix(packing)).suffix
    data = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()
    if form == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue()
    elif form == ".json" and len(rows) % 2 == 0:
        data = json.dumps(rows, indent=1).encode()
    elif form in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="," if form == ".csv" else "\t")
        writer.writerow(rows[0])
        writer.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)
        data = text.getvalue().encode()
    path.write_bytes(PACK[packing](data) if packing else data)
    return str(path)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}  # fmt: skip


def chatting(tokenizer: Any, template: str | None = CHATML) -> Any:
    """A copy of the tokenizer, with a chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def all_examples(task: Task) -> list[Example]:
    return [example for split in task.splits for example in task.examples(split)]


def apart(task: Task, key: Callable[[Example], Any], least: int = 2) -> None:
    """Every key, or each of several in a set, is in one split only, and there are at least so many."""
    places = defaultdict(set)
    for split in task.splits:
        for example in task.examples(split):
            for name in keys if isinstance(keys := key(example), set) else {keys}:
                places[name].add(split)
    assert all(len(splits) == 1 for splits in places.values()), places
    assert len(places) >= least
