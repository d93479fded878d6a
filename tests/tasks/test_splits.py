"""No passage, group or near-duplicate stands in two splits, whatever the file, and no example is lost in silence."""

from __future__ import annotations

import json
import random
import re
import tempfile
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import fuzzing
from rows_of import all_examples, apart, rows_of, write

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks import SPLITS, Example, GenerationTask, MixtureTask, MultipleChoiceTask, TextTask
from moeopt.tasks.likeness import families, group_names, plain
from moeopt.tasks.splits import divide, divide_given

FORMS = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl.gz", "rows.csv.xz")
PASSAGES = {
    "boolq": "passage", "cb": "premise", "copa": "premise", "multirc": "paragraph", "record": "passage",
    "sglue_rte": "premise", "wsc": "text", "arc_easy": "question", "openbookqa": "question_stem",
    "hellaswag": "source_id", "squad": "context", "drop": "passage",
}  # fmt: skip


def about_passages(name: str) -> list[dict[str, Any]]:
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
@pytest.mark.parametrize("name", PASSAGES)
def test_rows_of_one_passage_stay_in_one_split(tmp_path, name):
    """Whether the file is lone, or the data set has splits of its own, of which the earlier loses the passage."""
    rows = about_passages(name)

    def passage(example: Example) -> str:
        names = [plain(group) for group in group_names(example.group)]
        return next(str(row["qid"]) for row in rows if plain(row[PASSAGES[name]]) in names)

    apart(tasks.get(name, write(tmp_path / "rows.jsonl", rows)), passage, least=25)
    for split, part in (("train", rows[::2]), ("validation", rows[1::4]), ("test", rows[3::8])):
        write(tmp_path / "own" / f"{split}.jsonl", part)
    with pytest.warns(UserWarning, match="left out .* examples of search .*: a later split has them"):
        apart(tasks.get(name, tmp_path / "own"), passage, least=20)


def test_sentences_twins_and_quotations_stay_in_one_split(tmp_path):
    words = [f"word{i}" for i in range(40)]
    wic = [
        {"word": "was", "sentence1": f"{w} was one.", "sentence2": f"{v} was one.", "label": i % 2}
        for i, (w, v) in enumerate([*zip(words[::2], words[1::2]), *zip(words[2::4], words[::4])])
    ]
    apart(tasks.get("wic", write(tmp_path / "wic.jsonl", wic)), lambda e: set(e.group), least=40)
    twins = []
    for i in range(60):
        for kind, answer in (("easy", "2"), ("hard", "1")):
            twins.append({"sentence": f"Ann {i} taught Bea {i} since _ found it {kind}.", "option1": f"Ann {i}",
                          "option2": f"Bea {i}", "answer": answer, "qID": f"pair{i}-{answer}"})  # fmt: skip
    for rows in (twins, [{k: v for k, v in row.items() if k != "qID"} for row in twins]):
        task = tasks.get("winogrande", write(tmp_path / "w.jsonl", rows))
        apart(task, lambda e: e.group[-1].split(" found")[0].split("_")[0], least=60)
    rows = rows_of("mmlu", 120)
    for i, row in enumerate(rows):
        quoted = f"This question refers to the following information.\n“Text {i % 30}”\nSomeone, 1776\n"
        row["question"] = quoted + row["question"]
    task = tasks.get("mmlu", write(tmp_path / "test.jsonl", rows))
    apart(task, lambda e: e.prompt.split("Text ")[1].split("”")[0], least=30)


def variant(rng: random.Random, text: str) -> str:
    text = unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
    text = rng.choice([str, str.upper, str.lower])(text)
    return rng.choice(["", " ", "\n", "\ufeff"]) + rng.choice([text, text.replace(" ", " \u00a0 "), f"{text} \t"])


@st.composite
def grouped_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows with groups, some of which ask the same in another form; "n" says which question it is."""
    rng = random.Random(draw(st.integers(0, 99)))
    groups = st.one_of(st.none(), st.integers(0, 6), st.sampled_from(["a", "b", "Ä", "0", "1"]))
    rows = []
    for _ in range(draw(st.integers(6, 30))):
        n = draw(st.integers(0, 12))
        options = [variant(rng, f"é option {j} of {n}") for j in range(3)]
        rng.shuffle(options)
        prompt = variant(rng, f"Is ﬁve Ångström {n} ?")
        rows.append({"prompt": prompt, "options": options, "answer": rng.randrange(3), "n": n, "group": draw(groups)})
    return rows


def as_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    if kind == "lettered":
        listed = ["\n".join(f"{letter}. {o.strip()}" for letter, o in zip("ABC", row["options"])) for row in rows]
        return [
            row | {"prompt": f"{row['prompt']}\n{options}\nAnswer:", "options": ["A", "B", "C"]}
            for row, options in zip(rows, listed)
        ]
    return [{**row, "answer": row["options"][:2]} for row in rows] if kind == "generation" else rows


@fuzzing(60)
@given(grouped_rows(), st.sampled_from(FORMS), st.sampled_from(["multiple_choice", "lettered", "generation", "text"]))
def test_no_group_and_no_near_duplicate_is_in_two_splits(rows, form, kind):
    def check(data: str | Path, everything: bool) -> None:
        options = {"column": "prompt"} if kind == "text" else {}
        try:
            task = tasks.get(kind.replace("lettered", "multiple_choice"), data, **options)
        except TaskError as error:
            if kind != "text" or "too few to divide" not in str(error):  # it needs all three splits
                raise
            return
        apart(task, lambda e: int(re.findall(r"\d+", e.prompt or e.options[0])[0]), least=1)
        names = {str(row["group"]) for row in rows} - {"None"}
        apart(task, lambda e: set(group_names(e.group)) & names, least=0)
        if everything:
            assert len(all_examples(task)) == len(rows)
            assert {name for e in all_examples(task) for name in group_names(e.group)} >= names

    if kind == "text" and form in ("rows.json", "rows.csv", "rows.tsv"):  # each is one document
        form += ".gz"
    made = as_kind(rows, kind)
    if "parquet" in form:  # where a column has one type
        made = [row | {"group": None if row["group"] is None else str(row["group"])} for row in made]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(write(Path(folder, form), made), everything=True)
        for split, part in (("train", made[::2]), ("validation", made[1::4]), ("test", made[3::4])):
            write(Path(folder, "own", f"{split}{''.join(Path(form).suffixes)}"), part)
        check(Path(folder, "own"), everything=False)


examples = st.lists(
    st.builds(
        lambda prompt, option, groups: Example(prompt, f"{prompt}?", (option, "x"), 0, groups),
        st.sampled_from("abcdefgh"),
        st.sampled_from("yz"),
        st.lists(st.sampled_from("pqrst"), max_size=2).map(tuple),
    ),
    max_size=30,
)
fractions = st.tuples(*[st.integers(0, 9)] * 2, st.integers(1, 9)).map(lambda f: tuple(x / sum(f) for x in f))


def linked(rows: list[Example]) -> list[set[int]]:
    """Sets of examples that share a question or a group, also by others in between: by repetition."""
    tied = [{*group_names(e.group), (e.prompt, frozenset(e.options))} for e in rows]
    sets = [{i} for i in range(len(rows))]
    for _ in rows:
        sets = [{j for j in range(len(rows)) if any(tied[i] & tied[j] for i in members)} for members in sets]
    return sets


@fuzzing(100)
@given(examples, fractions)
def test_families_are_what_is_tied_directly_or_by_others_and_divided_whole(rows, fractions):
    names = families(rows)
    for i, members in enumerate(linked(rows)):
        assert {j for j, name in enumerate(names) if name == names[i]} == members
    assert sorted(zip(names, rows), key=repr) == sorted(zip(families(rows[::-1]), rows[::-1]), key=repr)
    parts = divide(rows, fractions)
    assert Counter(e for part in parts.values() for e in part) == Counter(rows)
    assert all(not part for split, part in parts.items() if fractions[SPLITS.index(split)] == 0)
    place = {id(e): split for split, part in parts.items() for e in part}
    assert len({(name, place[id(e)]) for name, e in zip(names, rows)}) == len(set(names))


@fuzzing(100)
@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), examples, min_size=2))
@pytest.mark.filterwarnings("ignore:left out")
def test_an_earlier_split_loses_what_is_tied_to_a_later_one_and_nothing_else(given_splits):
    given_parts = [given_splits[name] for name in ("train", "validation", "test") if given_splits.get(name)]
    parts = divide_given(given_splits)
    if len(given_parts) < 2:
        return
    assert parts["test"] == given_parts[-1]
    every = [e for part in given_parts for e in part]
    first = len(every) - len(given_parts[-1])
    lost = [e for e, members in zip(every[:first], linked(every)) if any(j >= first for j in members)]
    if len(given_parts) == 2:
        assert len(parts["search"]) + len(parts["dev"]) == first - len(lost)
    MultipleChoiceTask("t", **parts) if any(parts.values()) else None


@given(st.lists(st.text(alphabet="ab", max_size=3), max_size=60))
def test_a_growing_file_moves_no_example(prompts):
    rows = [Example(prompt, prompt, ("x", "y"), 0) for prompt in prompts]
    small, large = divide(rows[: len(rows) // 2]), divide(rows)
    assert all(set(small[split]) <= set(large[split]) for split in SPLITS)


def test_fractions_are_met_on_many_rows():
    parts = divide(Example(str(i), str(i), ("x", "y"), 0) for i in range(4000))
    assert [len(parts[split]) / 4000 for split in SPLITS] == pytest.approx([0.4, 0.2, 0.4], abs=0.03)
    for bad in ((0.5, 0.5), (0.5, 0.5, 0.5), (1.2, -0.2, 0.0)):
        with pytest.raises(TaskError, match="sum to 1"):
            divide([Example("1", "p", ("x", "y"), 0)], bad)


def test_what_is_left_out_is_counted(tmp_path):
    rows = [{"prompt": f"{i}?", "options": ["a", "b"], "answer": 0, "group": i % 30} for i in range(60)]
    later = [{**row, "prompt": row["prompt"].replace("?", " ?")} for row in rows[40:]] + rows[:3]
    write(tmp_path / "train.jsonl", rows[:40])
    write(tmp_path / "test.jsonl", later)
    counted = "left out (.*) of (.*) examples of search and .* of .* of dev: a later"
    with pytest.warns(UserWarning, match=counted) as seen:
        task = tasks.get("multiple_choice", tmp_path, delimiter=" ")
    assert len(seen) == 1
    numbers = [int(n) for n in re.findall(r"(\d+) of \d+ examples", str(seen[0].message))]
    assert sum(len(task.examples(split)) for split in ("search", "dev")) == 40 - sum(numbers) == 14
    assert len(task.examples("test")) == 23


@given(st.text(max_size=40), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_forms_of_a_text_are_plainly_the_same(text, form):
    assert plain(unicodedata.normalize(form, text)) == plain(text)
    assert plain(f"\u200b {text}\n") == plain(text)
    assert plain(text.replace(" ", "\t \u00a0")) == plain(text)


def test_different_texts_stay_different():
    texts = ["1 23", "12 3", "123", "a b", "ab", "is it?", "is it!", "-1", "1", "é", "e", ""]
    assert len({plain(text) for text in texts}) == len(texts)


ASKED = [Example(str(i), f"{i}?", (" yes", " no"), 0, group) for i, group in enumerate(["p", ("q", "p"), 7, 7.0])]
ICE = Example("1", "Is ice cold?", (" yes", " no"), 0), Example("2", "is ice  cold ?", ("NO", " Yes"), 1)
OTHER = Example("9", "9?", ("a", "b"), 0), Example("0", "x", ("a", "b"), 0, "P")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultipleChoiceTask("t", ICE[:1], (), ICE[1:]), "'t': example '2' is in 'test' and in 'search'"),
        (lambda: MultipleChoiceTask("t", ASKED[:1], ASKED[1:2]), "'1' of 'dev' and example '0' of 'search' are of one"),
        (lambda: GenerationTask("t", ASKED[2:3], (), ASKED[3:]), r"of one group \('7'\), which must stay in one split"),
        (
            lambda: MixtureTask(
                [(MultipleChoiceTask("a", ASKED[:1], (), ASKED[2:3]), 1),
                 (MultipleChoiceTask("b", OTHER[:1], (), OTHER[1:]), 1)]
            ),
            "example '0' of 'test' of 'b' and example '0' of 'search' of 'a' are of one",
        ),
        (lambda: TextTask("t", ["a", Example("b", "", ("b",), 0, "g")], [Example("c", "", ("c",), 0, "g")]), "of one"),
        (lambda: MultipleChoiceTask("t"), "task 't' has no examples"),
        (lambda: MultipleChoiceTask("t", ICE[:1]).examples("dev"), "'dev' of task 't' is empty"),
    ],
)  # fmt: skip
def test_splits_that_share_or_lack_examples_are_refused(make, message):
    with pytest.raises(TaskError, match=message):
        make()


@pytest.mark.parametrize("group", [True, {"a": 1}, [["a", {}]], {1}])
def test_bad_groups_are_named(tmp_path, group):
    with pytest.raises(TaskError, match="example '1': a group must be a text or a number, got"):
        Example("1", "p", ("a",), 0, group)
    row = {"prompt": "p", "options": ["a", "b"], "answer": 0, "group": group}
    if group != {1}:
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


def test_fingerprint_depends_on_the_data_and_its_split_and_not_on_its_order():
    a, b = ASKED[0], OTHER[0]
    task = MultipleChoiceTask("t", search=[a, b])
    assert task.fingerprint() == MultipleChoiceTask("t", search=[b, a]).fingerprint()
    changed = Example(a.id, a.prompt, a.options, 1)
    others = [MultipleChoiceTask("t", search=[changed, b]), MultipleChoiceTask("t", search=[a], test=[b])]
    assert len({task.fingerprint(), *(other.fingerprint() for other in others)}) == 3
    assert task.fingerprint("search") != others[0].fingerprint("search")
