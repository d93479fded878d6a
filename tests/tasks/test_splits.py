"""Splits never overlap, whatever the rows; samples are nested."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeopt.errors import TaskError
from moeopt.tasks import SPLITS, Example, MultipleChoiceTask, TextTask
from moeopt.tasks.splits import divide, from_own

prompts = st.text(alphabet="ab", max_size=3)
rows = st.lists(
    st.builds(lambda p, a: Example(p, p, ("x", "y"), a), prompts, st.integers(0, 1)), min_size=1, max_size=60
)
fractions = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)).map(
    lambda f: tuple(x / sum(f) for x in f)
)


def question(example: Example) -> tuple[str, tuple[str, ...]]:
    return example.prompt, example.options


@given(rows, fractions)
def test_divide_keeps_every_example_and_equal_questions_together(rows, fractions):
    parts = divide(rows, fractions)
    assert Counter(e for part in parts.values() for e in part) == Counter(rows)
    questions = [{question(e) for e in parts[split]} for split in SPLITS]
    assert sum(map(len, questions)) == len(set.union(*questions))
    assert all(not part for split, part in parts.items() if fractions[SPLITS.index(split)] == 0)


@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), rows, min_size=1))
def test_own_splits_do_not_overlap_and_lose_no_question(own):
    parts = from_own(own)
    MultipleChoiceTask("t", **parts)
    assert {question(e) for part in parts.values() for e in part} == {
        question(e) for part in own.values() for e in part
    }
    if len(own) > 1:
        last = "test" if "test" in own else "validation"
        assert parts["test"] == own[last]


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=40))
def test_equal_documents_share_a_split(documents):
    task = TextTask.from_documents("t", documents)
    seen = [{e.options[0] for e in task.examples(split)} for split in task.splits]
    assert sum(map(len, seen)) == len(set(documents))


@given(rows)
def test_a_growing_file_moves_no_example(rows):
    small, large = divide(rows[: len(rows) // 2]), divide(rows)
    assert all(set(small[split]) <= set(large[split]) for split in SPLITS)


def test_fractions_are_met_on_many_rows():
    parts = divide(Example(str(i), str(i), ("x", "y"), 0) for i in range(4000))
    assert [len(parts[split]) / 4000 for split in SPLITS] == pytest.approx([0.4, 0.2, 0.4], abs=0.03)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.2, -0.2, 0.0)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(TaskError, match="sum to 1"):
        divide([Example("1", "p", ("x", "y"), 0)], fractions)


def test_overlap_given_by_the_caller_is_refused():
    example = Example("q7", "p", ("x", "y"), 0)
    with pytest.raises(TaskError, match="'q7' is in both 'search' and 'test'"):
        MultipleChoiceTask("t", search=[example], test=[example])


def test_no_examples_and_empty_or_unknown_splits_are_refused():
    with pytest.raises(TaskError, match="no examples"):
        MultipleChoiceTask("t")
    task = MultipleChoiceTask("t", search=[Example("1", "p", ("x", "y"), 0)])
    assert task.splits == ("search",)
    with pytest.raises(TaskError, match="'dev' of task 't' is empty"):
        task.examples("dev")
    with pytest.raises(TaskError, match="unknown split 'train'"):
        task.examples("train")


def test_fingerprint_depends_on_the_data_and_its_split_and_not_on_its_order():
    a, b = Example("1", "p", ("x", "y"), 0), Example("2", "q", ("x", "y"), 0)
    task = MultipleChoiceTask("t", search=[a, b])
    assert task.fingerprint() == MultipleChoiceTask("t", search=[b, a]).fingerprint()
    changed = Example("1", "p", ("x", "y"), 1)
    others = [MultipleChoiceTask("t", search=[changed, b]), MultipleChoiceTask("t", search=[a], test=[b])]
    assert len({task.fingerprint(), *(other.fingerprint() for other in others)}) == 3
    assert task.fingerprint("search") != others[0].fingerprint("search")
