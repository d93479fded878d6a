"""The numbers that benchmarks publish, against slow references written from their definitions."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows_of import SUBJECTS, rows_of

from moeopt import tasks
from moeopt.tasks import Scores, answers
from moeopt.tasks.f1 import class_f1
from moeopt.tasks.mmlu_subjects import CATEGORY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tasks.Task, list[dict[str, Any]]]]:
    """Tasks whose test split is 40 rows, with the rows."""
    folder, found = Path(tmp_path_factory.mktemp("rows")), {}
    for name in ("cb", "multirc", "record", "mmlu"):
        (folder / name).mkdir()
        for split, seed in (("train", 1), ("validation", 0)):
            rows = rows_of(name, 40, seed=seed)
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = tasks.get(name, str(folder / name)), rows_of(name, 40)
    return found


def scored(task: tasks.Task, chosen: list[int]) -> Scores:
    """What `reduce` makes of likelihoods under which these options are chosen."""
    requests, likelihood = [], []
    for i, (example, choice) in enumerate(zip(task.examples("test"), chosen)):
        for j in range(len(example.options)):
            requests.append(tasks.Request(i, j, (0, 1, 2), 1))
            likelihood.append(-1.0 if j == choice else -2.0)
    return task.reduce("test", requests, np.asarray(likelihood), np.zeros(len(requests), np.int64))


picks = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def slow_f1(chosen: list[bool], true: list[bool]) -> float:
    hits = sum(c and t for c, t in zip(chosen, true))
    if hits == 0:
        return 0.0
    precision, recall = hits / sum(chosen), hits / sum(true)
    return 2 * precision * recall / (precision + recall)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_f1_of_a_class(pairs):
    chosen, true = [c for c, _ in pairs], [t for _, t in pairs]
    assert class_f1(np.asarray(chosen, bool), np.asarray(true, bool)) == pytest.approx(slow_f1(chosen, true))


@given(picks.map(lambda chosen: [c % 3 for c in chosen]))
def test_cb(made, chosen):
    task, _ = made["cb"]
    answers = [example.answer for example in task.examples("test")[: len(chosen)]]
    each = [slow_f1([c == label for c in chosen], [a == label for a in answers]) for label in range(3)]
    assert task.metrics("test", scored(task, chosen)) == pytest.approx(
        {"accuracy": sum(c == a for c, a in zip(chosen, answers)) / len(chosen), "macro_f1": sum(each) / 3}
    )


@given(picks.map(lambda chosen: [c % 2 for c in chosen]))
def test_multirc(made, chosen):
    task, rows = made["multirc"]
    by_text = {f"{r['paragraph']}\nQuestion: {r['question']}\nAnswer: {r['answer']}\n": r for r in rows}
    judged = [
        (by_text[example.prompt.removesuffix("Is the answer correct?")], choice == 0)
        for example, choice in zip(task.examples("test"), chosen)
    ]
    wanted = {
        "accuracy": np.mean([judged_right == bool(row["label"]) for row, judged_right in judged]),
        "f1a": slow_f1([judged_right for _, judged_right in judged], [bool(row["label"]) for row, _ in judged]),
    }
    whole = []
    for question in {row["idx"]["question"] for row in rows}:
        seen = [(row, judged_right) for row, judged_right in judged if row["idx"]["question"] == question]
        if len(seen) == 4:
            whole.append(all(judged_right == bool(row["label"]) for row, judged_right in seen))
    if whole:
        wanted["em"] = np.mean(whole)
    assert task.metrics("test", scored(task, chosen)) == pytest.approx(wanted)


def slow_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def slow_token_f1(answer: str, gold: str) -> float:
    words, left, hits = slow_words(answer), slow_words(gold), 0
    total = len(left)
    if not words or not left:
        return 0.0
    for word in words:
        if word in left:
            left.remove(word)
            hits += 1
    return 0.0 if hits == 0 else 2 * (hits / len(words)) * (hits / total) / (hits / len(words) + hits / total)


texts = st.lists(st.sampled_from(["the", "The", "a", "U.S.", "US", "us,", "ice", "Ice-9", "9", "!"]), max_size=6)


@given(texts.map(" ".join), texts.map(" ".join))
def test_squad_normalisation_and_f1(answer, gold):
    assert answers.normalised(answer).split() == slow_words(answer)
    assert answers.f1(answer, [(gold,)]) == pytest.approx(slow_token_f1(answer, gold))


@given(picks)
def test_record(made, chosen):
    task, rows = made["record"]
    em, f1 = [], []
    for example, choice in zip(task.examples("test"), chosen):
        row = next(
            r
            for r in rows
            if example.options[0].endswith(r["query"].split("@placeholder")[1])
            and r["query"].split("@placeholder")[0] in example.options[0]
            and r["passage"] == example.group
        )
        entity = sorted(row["entities"])[choice]
        em.append(any(slow_words(entity) == slow_words(answer) for answer in row["answers"]))
        f1.append(max(slow_token_f1(entity, answer) for answer in row["answers"]))
    scores = scored(task, chosen)
    assert task.metrics("test", scores) == pytest.approx({"em": np.mean(em), "f1": np.mean(f1)})
    assert scores.losses.tolist() == [0.5 if right else 1.0 for right in em]


def test_record_counts_every_form_of_a_right_answer_and_takes_the_likeliest(made):
    task, _ = made["record"]
    examples = task.examples("test")
    several = next(i for i, example in enumerate(examples) if len(task.right(example)) > 1)
    first, second = task.right(examples[several])[:2]
    for choice in (first, second):
        scores = scored(task, [choice] * (several + 1))
        assert scores.correct[several] == 1
        assert scores.losses[several] == 0.5


def test_record_fingerprint_depends_on_the_gold_answers(tmp_path):
    rows = rows_of("record", 8)
    prints = set()
    for gold in (rows[0]["answers"], rows[0]["entities"]):
        path = tmp_path / f"{len(gold)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | {"answers": gold}, *rows[1:]]))
        prints.add(tasks.get("record", str(path)).fingerprint())
    assert len(prints) == 2


@given(picks)
def test_mmlu(made, chosen):
    task, rows = made["mmlu"]
    subject_of = {row["question"]: row["subject"] for row in rows}
    by_subject: dict[str, list[bool]] = {}
    for example, choice in zip(task.examples("test"), chosen):
        question = example.prompt.split("\n\n")[1].split("\n")[0]
        by_subject.setdefault(subject_of[question], []).append(choice == example.answer)
    everything = [right for subject in by_subject.values() for right in subject]
    wanted = {
        "accuracy": np.mean(everything),
        "macro_accuracy": np.mean([np.mean(subject) for subject in by_subject.values()]),
    }
    for category in {CATEGORY[subject] for subject in by_subject}:
        inside = [right for s in SUBJECTS if CATEGORY[s] == category for right in by_subject.get(s, [])]
        wanted[f"accuracy_{category}"] = np.mean(inside)
    assert task.metrics("test", scored(task, chosen)) == pytest.approx(wanted)
