"""Generation tasks: prompts, references, data of the hub's schema, errors."""

from __future__ import annotations

import numpy as np
import pytest
from rows_of import write

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks import Example, GenerationTask


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
    ("row", "options", "message"),
    [
        ({"prompt": "p", "answer": [""]}, {}, "line 1: 'answer' must be a text or a list of texts"),
        ({"prompt": "p"}, {}, "line 1: no 'answer'"),
        ({}, {"metric": "f2"}, "unknown metric 'f2'; did you mean 'f1'"),
        ({"prompt": "p", "answer": "a"}, {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got"),
        ({"prompt": "p", "answer": "a"}, {"stop": ["\n", ""]}, "stop must be non-empty texts"),
    ],
)
def test_bad_rows_and_options_are_named(tmp_path, row, options, message):
    with pytest.raises(TaskError, match=message):
        tasks.get("generation", write(tmp_path / "bad.jsonl", [row]), **options)


def test_an_answer_that_is_minus_one_is_one(tmp_path):
    task = tasks.get("generation", write(tmp_path / "r.jsonl", [{"prompt": "2 - 3 =", "answer": "-1"}]))
    assert [option.strip() for option in task.examples(task.splits[0])[0].options] == ["-1"]
