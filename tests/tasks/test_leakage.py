"""No passage, group or near-duplicate stands in two splits, whatever the file; unlabelled rows are left out alike."""

from __future__ import annotations

import json
import random
import re
import tempfile
import unicodedata
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import fuzzing
from rows_of import rows_of
from test_data_files import write

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks import Example, GenerationTask, MixtureTask, MultipleChoiceTask, TextTask
from moeopt.tasks.likeness import families, group_names, plain
from moeopt.tasks.splits import from_own

FORMS = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl.gz", "rows.csv.xz")


def places(task: tasks.Task, key: Any) -> dict[Any, set[str]]:
    """The splits of every key."""
    found = defaultdict(set)
    for split in task.splits:
        for example in task.examples(split):
            found[key(example)].add(split)
    return found


def apart(task: tasks.Task, key: Any, least: int = 2) -> None:
    found = places(task, key)
    assert all(len(splits) == 1 for splits in found.values()), found
    assert len(found) >= least


PASSAGES = {
    "boolq": "passage", "cb": "premise", "copa": "premise", "multirc": "paragraph", "record": "passage",
    "sglue_rte": "premise", "wsc": "text", "arc_easy": "question", "openbookqa": "question_stem",
    "hellaswag": "source_id", "squad": "context", "drop": "passage",
}  # fmt: skip


def of_passages(name: str) -> list[dict[str, Any]]:
    """Four rows about each of 25 passages; "qid" numbers the passages."""
    rows = []
    for i in range(100):
        row, passage = rows_of(name, 1, seed=i)[0], f"Passage {i // 4} is about this."
        if name == "wsc":
            passage = f"The cat {i // 4} told it , who was here , that he and it left ."
        if name == "record":
            about = rows_of(name, 1, seed=i // 4)[0]
            row = about | {"query": f"{i}: @placeholder left"}
            passage = f"{about['passage']} {i // 4}"
        row |= {"question": f"{i}?"} if name in ("squad", "drop") else {}
        row |= {"fact1": f"fact {i}"} if name == "openbookqa" else {}
        rows.append({**row, PASSAGES[name]: passage, "qid": i // 4})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "eep_"])
@pytest.mark.parametrize("name", PASSAGES)
def test_rows_of_one_passage_stay_in_one_split(tmp_path, name, prefix):
    """Whether the file is lone, or the data set has splits of its own, of which the earlier loses the passage."""
    rows = of_passages(name)
    if (name, prefix) == ("drop", "eep_"):
        rows = [{**row, "answer": rows_of("drop", 2)[1]["answer"]} for row in rows]
    task_name = "eep_rte" if (name, prefix) == ("sglue_rte", "eep_") else prefix + name

    def passage(example: Example) -> str:
        return next(str(row["qid"]) for row in rows if plain(row[PASSAGES[name]]) in map(plain, names(example)))

    def names(example: Example) -> tuple[str, ...]:
        return example.group if isinstance(example.group, tuple) else (str(example.group),)

    task = tasks.get(task_name, write(tmp_path / "rows.jsonl", rows))
    apart(task, passage, least=25)
    for split, part in (("train", rows[::2]), ("validation", rows[1::4]), ("test", rows[3::8])):
        write(tmp_path / "own" / f"{split}.jsonl", part)
    with pytest.warns(UserWarning, match="left out .* examples of search .*: a later split has them"):
        apart(tasks.get(task_name, tmp_path / "own"), passage, least=20)


def test_sentences_and_twins_stay_in_one_split(tmp_path):
    words = [f"word{i}" for i in range(40)]
    wic = [
        {"word": "was", "sentence1": f"{w} was one.", "sentence2": f"{v} was one.", "label": i % 2}
        for i, (w, v) in enumerate([*zip(words[::2], words[1::2]), *zip(words[2::4], words[::4])])
    ]
    task = tasks.get("wic", write(tmp_path / "wic.jsonl", wic))
    sentences = defaultdict(set)
    for split in task.splits:
        for example in task.examples(split):
            for sentence in example.group:
                sentences[sentence].add(split)
    assert len(sentences) == 40
    assert all(len(splits) == 1 for splits in sentences.values())
    twins = []
    for i in range(60):
        for kind, answer in (("easy", "2"), ("hard", "1")):
            twins.append({"sentence": f"Ann {i} taught Bea {i} since _ found it {kind}.", "option1": f"Ann {i}",
                          "option2": f"Bea {i}", "answer": answer, "qID": f"pair{i}-{answer}"})  # fmt: skip
    for rows in (twins, [{k: v for k, v in row.items() if k != "qID"} for row in twins]):
        for name in ("winogrande", "eep_winogrande"):
            task = tasks.get(name, write(tmp_path / "w.jsonl", rows))
            apart(task, lambda e: e.group[-1].split(" found")[0].split("_")[0], least=60)


def test_questions_of_mmlu_about_one_quotation_stay_in_one_split(tmp_path):
    rows = rows_of("mmlu", 120)
    for i, row in enumerate(rows):
        quoted = f"This question refers to the following information.\n“Text {i % 30}”\nSomeone, 1776\n"
        row["question"] = quoted + row["question"]
    task = tasks.get("mmlu", write(tmp_path / "test.jsonl", rows))
    apart(task, lambda e: e.prompt.split("Text ")[1].split("”")[0], least=30)


GROUPS = st.one_of(st.none(), st.integers(0, 6), st.sampled_from(["a", "b", "Ä", "0", "1"]))


def variant(rng: random.Random, text: str) -> str:
    text = unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
    text = rng.choice([str, str.upper, str.lower])(text)
    return rng.choice(["", " ", "\n", "\ufeff"]) + rng.choice([text, text.replace(" ", " \u00a0 "), f"{text} \t"])


@st.composite
def own_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows with groups, some of which ask the same in another form; "n" says which question it is."""
    rng = random.Random(draw(st.integers(0, 99)))
    rows = []
    for _ in range(draw(st.integers(6, 30))):
        n = draw(st.integers(0, 12))
        options = [variant(rng, f"é option {j} of {n}") for j in range(3)]
        rng.shuffle(options)
        prompt = variant(rng, f"Is ﬁve Ångström {n} ?")
        rows.append({"prompt": prompt, "options": options, "answer": rng.randrange(3), "n": n, "group": draw(GROUPS)})
    return rows


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    if kind == "lettered":
        listed = ["\n".join(f"{letter}. {o.strip()}" for letter, o in zip("ABC", row["options"])) for row in rows]
        return [
            row | {"prompt": f"{row['prompt']}\n{options}\nAnswer:", "options": ["A", "B", "C"]}
            for row, options in zip(rows, listed)
        ]
    if kind == "generation":
        return [{**row, "answer": row["options"][:2]} for row in rows]
    return rows


def read(kind: str, data: Path) -> tasks.Task | None:
    try:
        if kind == "text":
            return tasks.get("text", data, column="prompt")
        return tasks.get("generation" if kind == "generation" else "multiple_choice", data)
    except TaskError as error:
        if kind != "text" or "too few to divide" not in str(error):  # it needs all three splits
            raise
        return None


@fuzzing(60)
@given(own_rows(), st.sampled_from(FORMS), st.sampled_from(["multiple_choice", "lettered", "generation", "text"]))
def test_no_group_and_no_near_duplicate_is_in_two_splits(rows, form, kind):
    def check(task: tasks.Task | None, everything: bool) -> None:
        if task is None:
            return
        apart(task, lambda e: int(re.findall(r"\d+", e.prompt or e.options[0])[0]), least=1)
        groups = defaultdict(set)
        for split in task.splits:
            for example in task.examples(split):
                for name in set(group_names(example.group)) & {"0", "1", "2", "3", "4", "5", "6", "a", "b", "Ä"}:
                    groups[name].add(split)
        assert all(len(splits) == 1 for splits in groups.values())
        if everything:
            assert sum(len(task.examples(split)) for split in task.splits) == len(rows)
            assert set(groups) == {str(row["group"]) for row in rows} - {"None"}

    if kind == "text" and form in ("rows.json", "rows.csv", "rows.tsv"):  # each is one document
        form += ".gz"
    made = of_kind(rows, kind)
    if "parquet" in form:  # where a column has one type
        made = [row | {"group": None if row["group"] is None else str(row["group"])} for row in made]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(read(kind, write(Path(folder, form), made)), everything=True)
        own = Path(folder, "own")
        for split, part in (("train", made[::2]), ("validation", made[1::4]), ("test", made[3::4])):
            write(own / f"{split}{''.join(Path(form).suffixes)}", part)
        check(read(kind, own), everything=False)


examples = st.lists(
    st.builds(
        lambda prompt, option, groups: Example(prompt, f"{prompt}?", (option, "x"), 0, groups),
        st.sampled_from("abcdefgh"),
        st.sampled_from("yz"),
        st.lists(st.sampled_from("pqrst"), max_size=2).map(tuple),
    ),
    max_size=30,
)


def linked(rows: list[Example]) -> list[set[int]]:
    """Sets of examples that share a question or a group, also by others in between: by repetition."""
    tied = [{*group_names(e.group), (e.prompt, frozenset(e.options))} for e in rows]
    sets = [{i} for i in range(len(rows))]
    for _ in rows:
        sets = [{j for j in range(len(rows)) if any(tied[i] & tied[j] for i in one)} for one in sets]
    return sets


@fuzzing(100)
@given(examples)
def test_families_are_what_is_tied_directly_or_by_others(rows):
    names = families(rows)
    for i, one in enumerate(linked(rows)):
        assert {j for j, name in enumerate(names) if name == names[i]} == one
    assert sorted(zip(names, rows), key=repr) == sorted(zip(families(rows[::-1]), rows[::-1]), key=repr)


@fuzzing(100)
@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), examples, min_size=2))
@pytest.mark.filterwarnings("ignore:left out")
def test_an_earlier_split_loses_what_is_tied_to_a_later_one_and_nothing_else(own):
    given_parts = [own[name] for name in ("train", "validation", "test") if own.get(name)]
    parts = from_own(own)
    if len(given_parts) < 2:
        return
    assert parts["test"] == given_parts[-1]
    every = [e for part in given_parts for e in part]
    sets = linked(every)
    first = len(every) - len(given_parts[-1])
    lost = [e for e, one in zip(every[:first], sets) if any(j >= first for j in one)]
    if len(given_parts) == 2:
        assert len(parts["search"]) + len(parts["dev"]) == first - len(lost)
    MultipleChoiceTask("t", **parts) if any(parts.values()) else None


def test_what_is_left_out_is_counted(tmp_path):
    rows = [{"prompt": f"{i}?", "options": ["a", "b"], "answer": 0, "group": i % 30} for i in range(60)]
    write(tmp_path / "train.jsonl", rows[:40])
    write(
        tmp_path / "test.jsonl", [{**row, "prompt": row["prompt"].replace("?", " ?")} for row in rows[40:]] + rows[:3]
    )
    with pytest.warns(
        UserWarning, match="left out (.*) of (.*) examples of search and .* of .* of dev: a later"
    ) as seen:
        task = tasks.get("multiple_choice", tmp_path, delimiter=" ")
    assert len(seen) == 1
    numbers = [int(n) for n in re.findall(r"(\d+) of \d+ examples", str(seen[0].message))]
    left = sum(len(task.examples(split)) for split in ("search", "dev"))
    assert left == 40 - sum(numbers) == 14
    assert len(task.examples("test")) == 23


@given(st.text(max_size=40), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_forms_of_a_text_are_plainly_the_same(text, form):
    assert plain(unicodedata.normalize(form, text)) == plain(text)
    assert plain(f"\u200b {text}\n") == plain(text)
    assert plain(text.replace(" ", "\t \u00a0")) == plain(text)


def test_different_texts_stay_different():
    texts = ["1 23", "12 3", "123", "a b", "ab", "is it?", "is it!", "-1", "1", "é", "e", ""]
    assert len({plain(text) for text in texts}) == len(texts)


def test_splits_of_the_caller_s_that_share_are_refused():
    one = Example("1", "Is ice cold?", (" yes", " no"), 0)
    same = Example("2", "is ice  cold ?", ("NO", " Yes"), 1)
    with pytest.raises(TaskError, match="task 't': example '2' is in both 'search' and 'test'"):
        MultipleChoiceTask("t", search=[one], test=[same])
    asked = [Example(str(i), f"{i}?", (" yes", " no"), 0, group) for i, group in enumerate(["p", ("q", "p"), 7, 7.0])]
    with pytest.raises(TaskError, match=r"example '1' of 'dev' and example '0' of 'search' are of one group"):
        MultipleChoiceTask("t", asked[:1], asked[1:2])
    with pytest.raises(TaskError, match=r"of one group \('7'\), which must stay in one split"):
        GenerationTask("t", asked[2:3], (), asked[3:])
    with pytest.raises(TaskError, match="example '0' of 'test' of 'b' and example '0' of 'search' of 'a' are of one"):
        MixtureTask(
            {
                "a": (MultipleChoiceTask("a", asked[:1], (), asked[2:3]), 1),
                "b": (
                    MultipleChoiceTask(
                        "b", [Example("9", "9?", ("a", "b"), 0)], (), [Example("0", "x", ("a", "b"), 0, "P")]
                    ),
                    1,
                ),
            }
        )
    with pytest.raises(TaskError, match="of one group"):
        TextTask("t", ["a", Example("b", "", ("b",), 0, "g")], [Example("c", "", ("c",), 0, "g")])


@pytest.mark.parametrize("group", [True, {"a": 1}, [["a", {}]], {1}])
def test_bad_groups_are_named(tmp_path, group):
    with pytest.raises(TaskError, match="example '1': a group must be a text or a number, got"):
        Example("1", "p", ("a",), 0, group)
    row = {"prompt": "p", "options": ["a", "b"], "answer": 0, "group": list(group) if isinstance(group, set) else group}
    if row["group"] != [1]:
        with pytest.raises(TaskError, match="line 1: a group must be a text or a number, got"):
            tasks.get("multiple_choice", write(tmp_path / "r.jsonl", [row]))


def test_a_group_is_the_same_as_a_number_and_as_text():
    for group in (7, 7.0, "7", "7.0", (7,), ["7.0"], np.int64(7)):
        assert Example("1", "p", ("a",), 0, group).group == "7"
    for none in (None, "", "  ", float("nan"), (), ("", None)):
        assert Example("1", "p", ("a",), 0, none).group is None
    assert Example("1", "p", ("a",), 0, (2.5, "x", "x")).group == ("2.5", "x")


def test_groups_hold_across_the_tasks_of_a_mixture(tmp_path):
    rows = [{"prompt": f"{i}?", "options": ["a", "b"], "answer": i % 2, "group": i // 4} for i in range(160)]
    write(tmp_path / "choices.jsonl", rows[::2])
    write(tmp_path / "written.csv", [{**row, "options": "", "answer": "yes"} for row in rows[1::2]])
    entries = [{"task": "multiple_choice", "data": "choices.jsonl"}, {"task": "generation", "data": "written.csv"}]
    (tmp_path / "mixture.json").write_text(json.dumps({"tasks": entries}))
    task = tasks.get("mixture", tmp_path / "mixture.json", use="all")
    apart(task, lambda e: int(e.prompt[:-1]) // 4, least=40)
    assert "multiple_choice: search" in task.summary
    assert "divided by hash from written.csv" in task.summary


def test_groups_and_passages_of_local_data_of_the_harness(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: none\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{n}}?"\ndoc_to_target: "{{n % 2}}"\ndoc_to_choice: [x, y]\n'
    )
    for column, name in (("group", 3), ("passage", "Text {}."), ("group", "g{}")):
        rows = [{"n": i, column: i // 5 if name == 3 else name.format(i // 5)} for i in range(100)]
        task = tasks.get("lm_eval:mine", write(tmp_path / "rows.jsonl", rows), include_path=tmp_path)
        apart(task, lambda e: int(e.prompt[:-1]) // 5, least=20)


def test_an_index_as_text_or_float_and_an_answer_that_is_minus_one(tmp_path):
    row = {"prompt": "2 - 3 =", "options": ["1", "-1"]}
    for answer, index in (("-1", 1), (1, 1), (1.0, 1), ("1", 0), (0.0, 0)):
        task = tasks.get("multiple_choice", write(tmp_path / "r.jsonl", [{**row, "answer": answer}]))
        assert task.examples(task.splits[0])[0].answer == index
    written = tasks.get("generation", write(tmp_path / "r.jsonl", [{"prompt": "2 - 3 =", "answer": "-1"}]))
    assert [option.strip() for option in written.examples(written.splits[0])[0].options] == ["-1"]
