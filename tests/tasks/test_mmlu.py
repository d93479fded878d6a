"""MMLU: subjects, EEP's protocol of held-out subjects, shots, and which split is which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows_of import SUBJECTS, rows_of

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks.mmlu import names_of
from moeopt.tasks.mmlu_subjects import CATEGORIES, CATEGORY


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """The hub's splits, by number of rows a subject: dev 5, validation 12, test 8."""
    for seed, (split, n) in enumerate((("dev", 5), ("validation", 12), ("test", 8))):
        write(tmp_path / f"{split}.jsonl", rows_of("mmlu", n * len(SUBJECTS), seed=seed))
    return str(tmp_path)


def subjects_of(task: tasks.Task, split: str) -> set[str]:
    return {example.subject for example in task.examples(split)}


def questions(rows: list[dict[str, Any]]) -> set[str]:
    return {row["question"] for row in rows}


def asked(task: tasks.Task, split: str) -> set[str]:
    return {example.prompt.split("\n")[-6] for example in task.examples(split)}


def test_there_are_57_subjects_in_four_categories():
    assert {category: len(subjects) for category, subjects in CATEGORIES.items()} == {
        "stem": 19,
        "humanities": 13,
        "social_sciences": 12,
        "other": 13,
    }
    assert len(CATEGORY) == 57


def test_hub_splits_become_ours(folder):
    task = tasks.get("mmlu", folder)
    validation, test = (questions(rows_of("mmlu", n * 5, seed=seed)) for n, seed in ((12, 1), (8, 2)))
    assert asked(task, "search") | asked(task, "dev") == validation
    assert asked(task, "test") == test
    assert len(task.examples("search")) > len(task.examples("dev")) > 0


def test_eep_protocol(folder):
    searched = tasks.get("mmlu", folder, subjects="stem, philosophy")
    unseen = tasks.get("mmlu", folder, subjects=["stem", "philosophy"], held_out=True)
    assert all(subjects_of(searched, split) == {"anatomy", "astronomy", "philosophy"} for split in searched.splits)
    assert len(searched.examples("test")) == 3 * 8
    assert unseen.splits == ("test",)
    assert subjects_of(unseen, "test") == {"sociology", "virology"}
    assert len(unseen.examples("test")) == 2 * 8
    assert set(searched.examples("test")) | set(unseen.examples("test")) == set(
        tasks.get("mmlu", folder).examples("test")
    )
    assert searched.describe()["subjects"] == ["anatomy", "astronomy", "philosophy"]
    assert searched.fingerprint() != unseen.fingerprint()


@pytest.mark.parametrize("template", ["harness", "eep"])
def test_shots_are_the_first_of_the_subject_and_never_scored(folder, template):
    plain, shown = (tasks.get("mmlu", folder, template=template, shots=n) for n in (0, 2))
    rows = rows_of("mmlu", 5 * len(SUBJECTS))
    bare = {example.id: example for split in plain.splits for example in plain.examples(split)}
    scored = [example for split in shown.splits for example in shown.examples(split)]
    assert len(scored) == len(bare)
    for example in scored:
        text = ""
        for row in [row for row in rows if row["subject"] == example.subject][:2]:
            choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"]))
            answer = "ABCD"[row["answer"]]
            if template == "harness":
                text += f"{row['question']}\n{choices}Answer: {answer}\n\n"
            else:
                text += (
                    f"There is a single choice question about {example.subject}. Answer the question by replying"
                    f" A, B, C or D.\nQuestion: {row['question']}\n{choices}Answer: {answer}\n"
                )
        header, gap, question = bare[example.id].prompt.rpartition("\n\n")
        assert example.prompt == f"{header}{gap}{text}{question}"
    assert not {example.prompt.split("\n")[-6].removeprefix("Question: ") for example in scored} & questions(rows)
    assert shown.describe()["template"] == f"{template} v1, 2 shots"


def test_what_cannot_be_is_refused(folder, tmp_path):
    lone = write(tmp_path / "lone.jsonl", rows_of("mmlu", 60))
    (tmp_path / "tests").mkdir()
    write(tmp_path / "tests" / "test.jsonl", rows_of("mmlu", 60))
    for data, options, message in (
        (folder, {"subjects": "anatomie"}, "unknown subject 'anatomie'; did you mean 'anatomy'"),
        (folder, {"subjects": 3}, "subjects must be names with commas .*, got 3"),
        (folder, {"subjects": "stem", "held_out": "yes"}, "held_out must be true or false, got 'yes'"),
        (folder, {"subjects": ()}, "at least one subject"),
        (folder, {"subjects": ["stem", "management"]}, "no question of 'management'"),
        (folder, {"held_out": True}, "held_out needs the subjects that were searched"),
        (folder, {"shots": 6}, "6 shots of [a-z]+ are wanted, but the 'dev' split of the data has 5"),
        (folder, {"shots": -1}, "shots must be a number >= 0, got -1"),
        (folder, {"shots": True}, "shots must be a number >= 0, got True"),
        (folder, {"template": "helm"}, "unknown template 'helm'"),
        (lone, {"shots": 1}, "1 shots of [a-z]+ are wanted, but the 'dev' split of the data has 0"),
        (lone, {"subjects": SUBJECTS, "held_out": True}, "no question of a subject that was not searched"),
        (str(tmp_path / "tests"), {}, "no validation split to search on"),
    ):
        with pytest.raises(TaskError, match=message):
            tasks.get("mmlu", data, **options)
    held_out = tasks.get("mmlu", str(tmp_path / "tests"), subjects="stem", held_out=True)
    assert subjects_of(held_out, "test") == {"philosophy", "sociology", "virology"}
    assert len(held_out.examples("test")) == 36


def test_names_of_subjects():
    assert names_of(None) == list(CATEGORIES)
    assert (
        names_of("World Religions,stem") == names_of(iter(["world_religions", "STEM"])) == ["world_religions", "stem"]
    )
