"""Generation tasks: prompts, references, data of the hub's schema, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks import Example, GenerationTask

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def own_row(i: int) -> dict[str, object]:
    return {"prompt": f"{i} is", "answer": [NUMBERS[i % 10], f"number {i}"] if i % 2 else NUMBERS[i % 10]}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_prompts_leave_room_for_the_answer(tiny_tokenizer):
    task = GenerationTask("t", [Example("1", "abcdefgh", (" no",), 0)], max_new_tokens=5)
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        (prompt,) = task.prompts("search", tiny_tokenizer, max_length=9)
    assert tiny_tokenizer.decode(prompt.ids) == "<s>fgh"
    with pytest.raises(TaskError, match="5 new tokens leave no room for its prompt within 5"):
        task.prompts("search", tiny_tokenizer, max_length=5)


def test_the_loss_is_that_of_the_reference(tiny_tokenizer):
    task = GenerationTask("t", [Example(str(i), f"q{i}:", (" yes", " no"), 1) for i in range(3)])
    requests = task.requests("search", tiny_tokenizer)
    assert [tiny_tokenizer.decode(r.ids[r.scored_from :]) for r in requests] == [" no"] * 3
    scores = task.reduce("search", requests, np.asarray([-6.0, -3.0, 0.0]), np.asarray([3, 2, 3]))
    np.testing.assert_allclose(scores.losses, [2, 1, 0])
    np.testing.assert_array_equal(scores.correct, [1, 0, 1])
    assert task.metrics("search", scores) == {"greedy_match": pytest.approx(2 / 3)}


def test_references_are_part_of_the_fingerprint():
    def fingerprint(**facts):
        return GenerationTask("t", [Example("1", "p", ("a",), 0, **facts)]).fingerprint()

    assert fingerprint() != fingerprint(references=(("b",),))
    for bad in ("18", ("18",), ((),), ((18,),)):
        with pytest.raises(TaskError, match=r"references must be tuples of texts|expected text, got 18"):
            fingerprint(references=bad)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("generation", {"prompt": "p", "answer": [""]}, "line 1: 'answer' must be a text or a list of texts"),
        ("generation", {"prompt": "p"}, "line 1: no 'answer'"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, row, message):
    with pytest.raises(TaskError, match=message):
        tasks.get(name, write(tmp_path / "bad.jsonl", [row]))


def test_bad_options_are_named(tmp_path):
    file = write(tmp_path / "rows.jsonl", [own_row(i) for i in range(9)])
    with pytest.raises(TaskError, match="unknown metric 'f2'; did you mean 'f1'"):
        tasks.get("generation", file, metric="f2")
    with pytest.raises(TaskError, match="max_new_tokens must be an integer of at least 1, got 0"):
        tasks.get("generation", file, max_new_tokens=0)
    with pytest.raises(TaskError, match="stop must be non-empty texts"):
        tasks.get("generation", file, stop=["\n", ""])
