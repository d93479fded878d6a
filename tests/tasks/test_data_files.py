"""Files of data: every form is read alike, and a file that looks like a split is read as it or named."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows_of import PACK, all_examples, write
from rows_of import rows_of as benchmark

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks.rows import from_disk, load

FORMS = (".jsonl", ".ndjson", ".json", ".JSON", ".csv", ".Csv", ".tsv", ".parquet", ".PARQUET")
PACKED = ("", *PACK, ".GZ")


def rows_of(name: str, n: int = 20) -> list[dict[str, Any]]:
    return [
        {"prompt": f'{name} "{i}",\n\tis it?\nAnswer:', "options": ["yes", f"no {i}"], "answer": i % 2}
        for i in range(n)
    ]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike(tmp_path, form, packing):
    plain = tasks.get("multiple_choice", write(tmp_path / "plain.jsonl", rows_of("q")))
    for count in (20, 19):  # an array, and an object a line, where the form has both
        path = write(tmp_path / f"rows.{count}{form}{packing}", rows_of("q", count))
        task = tasks.get("multiple_choice", path)
        assert count != 20 or task.describe() == plain.describe()
        assert len(all_examples(task)) == count


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv", ".tsv", ".parquet.gz", ".jsonl.bz2", ".csv.xz"])
def test_a_folder_is_read_alike_in_every_form(tmp_path, form):
    for split in ("train", "validation", "test"):
        write(tmp_path / "plain" / f"{split}.jsonl", rows_of(split))
        write(tmp_path / "other" / f"{split}{form}", rows_of(split))
    plain, other = (tasks.get("multiple_choice", tmp_path / name) for name in ("plain", "other"))
    assert plain.describe() == other.describe()
    assert other.summary == (
        f"search 20, dev 20 and test 20 examples (from train{form}, validation{form} and test{form})"
    )


NAMES = {
    **dict.fromkeys(
        ("test.jsonl", "Test.JSONL", "mytask_test.jsonl", "my-task.test.csv", "eval.jsonl", "evaluation.json",
         "testing2.parquet", "test-00000-of-00001.parquet", "test-00000-of-00001-0a1b2c.parquet", "data/test.jsonl",
         "data/en/test-00000-of-00001.parquet", "test/part.jsonl"),
        "test",
    ),
    **dict.fromkeys(
        ("val.jsonl", "valid.tsv", "dev.jsonl.xz", "my_dev_1.jsonl", "VALIDATION.csv.gz", "validation/0.jsonl"),
        "validation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_tell_the_split(tmp_path, name):
    write(tmp_path / "train.jsonl", rows_of("train"))
    write(tmp_path / name, rows_of("other"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load(tmp_path)
    first = {split: rows[0].text("prompt").split()[0] for split, rows in splits.items()}
    assert first == {"train": "train", NAMES[name]: "other"}


@pytest.mark.parametrize(
    "name",
    ["test.txt", "test", "test.zip", "eval.arrow", "test/data.bin", "more.jsonl", "latest.csv", "train_or_test.csv"],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path, name):
    write(tmp_path / "train.jsonl", rows_of("train"))
    write(tmp_path / name, rows_of("other"))
    with pytest.warns(UserWarning, match=rf"not read: {name} \(read are train from train.jsonl\)"):
        task = tasks.get("multiple_choice", tmp_path)
    assert task.summary.endswith("examples (divided by hash from train.jsonl)")


def test_the_file_with_the_split_s_own_name_at_the_top_is_the_split(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "test_answers.csv", "old/test.jsonl", "README.md", ".cache/test.jsonl"):
        write(tmp_path / name, rows_of(name))
    write(tmp_path / "dataset_info.json", [{"a": 1}])
    said = r"not read: .cache/test.jsonl, old/test.jsonl and test_answers.csv \(read are"
    with pytest.warns(UserWarning, match=said) as seen:
        splits = load(tmp_path)
    assert len(seen) == 1
    assert splits["test"][0].text("prompt").startswith("test.jsonl")


@pytest.mark.parametrize(
    "names",
    [
        ("test.jsonl", "test.csv"), ("test.jsonl", "test.jsonl.gz"), ("test.jsonl", "eval.jsonl"),
        ("a_test.jsonl", "b_test.jsonl"), ("en/test.jsonl", "de/test.jsonl"), ("val.jsonl", "dev.jsonl"),
        ("train.csv", "train2.csv"),
    ],
)  # fmt: skip
def test_two_files_for_one_split_are_refused(tmp_path, names):
    for name in ("train.jsonl", *names) if "train" not in names[0] else names:
        write(tmp_path / name, rows_of(name))
    with pytest.raises(TaskError, match=r"several files that may be its .* split") as error:
        tasks.get("multiple_choice", tmp_path)
    assert all(name in str(error.value) for name in names)


def test_pieces_of_one_split_are_read_together_and_missing_ones_told(tmp_path):
    for i in range(2):
        write(tmp_path / f"train-0000{i}-of-00003.parquet", rows_of(f"train {i}"))
        write(tmp_path / f"test_{i}.jsonl", rows_of(f"test {i}"))
        write(tmp_path / "validation" / f"{'ab'[i]}.csv", rows_of(f"validation {i}"))
    with pytest.warns(UserWarning, match="has 2 of 3 pieces of its train split"):
        splits = load(tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == dict.fromkeys(("train", "validation", "test"), 40)


def test_a_folder_with_one_file_of_rows_is_that_file(tmp_path):
    write(tmp_path / "folder" / "piqa.jsonl", rows_of("q"))
    task = tasks.get("multiple_choice", tmp_path / "folder")
    assert task.describe() == tasks.get("multiple_choice", tmp_path / "folder" / "piqa.jsonl").describe()
    write(tmp_path / "folder" / "more.csv", rows_of("q"))
    with pytest.raises(TaskError, match=r"several files that may be its train split: more.csv and piqa.jsonl"):
        tasks.get("multiple_choice", tmp_path / "folder")


def test_a_link_out_of_the_folder_is_followed_and_a_circle_ends(tmp_path):
    write(tmp_path / "folder" / "train.jsonl", rows_of("train"))
    write(tmp_path / "elsewhere" / "test.jsonl", rows_of("test"))
    (tmp_path / "folder" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(load(tmp_path / "folder")) == {"train", "test"}


STEMS = st.sampled_from(
    ["train", "test", "val", "dev", "eval", "my_test", "more", "train_test", "notes", "test-0", "test-1"]
)
PLACES = st.sampled_from(["", "", "data/", "test/", "a/b/", ".old/"])
ENDINGS = st.sampled_from([".jsonl", ".JSONL", ".csv", ".json", ".jsonl.gz", ".txt", ".xlsx"])


@given(st.sets(st.tuples(PLACES, STEMS, ENDINGS).map("".join), min_size=1, max_size=5))
def test_whatever_the_folder_no_split_is_passed_over_in_silence(names):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in names:
            write(Path(folder, name), rows_of(f"<{name}>", 2))
        try:
            splits = load(folder)
        except TaskError as error:
            if re.search("several files|no train, validation or test file", str(error)):
                return
            raise
        prompts = [row.text("prompt") for rows in splits.values() for row in rows]
        said = " ".join(str(warning.message).partition("(read are")[0] for warning in seen)
        for name in names:
            read = any(prompt.startswith(f"<{name}>") for prompt in prompts)
            looks = any(word in name for word in ("train", "test", "val", "dev", "eval")) or (
                name.endswith(("jsonl", "JSONL", "csv", "gz"))
            )
            named = re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w/.-])", said) is not None
            if name.startswith(".") and name.endswith((".txt", ".xlsx")):
                assert not read
            else:
                assert read != named or (not looks and not read), name
        assert len(seen) <= 1


def test_cells_are_text_but_for_lists_of_texts_and_objects(tmp_path):
    path = tmp_path / "r.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b,c,d,e\r\n\r\n1,"[""x""]","[1, 2]","{""k"": 1}",{x\r\n')
    (row,) = load(path)["train"]
    assert row.values == {"a": "1", "b": ["x"], "c": "[1, 2]", "d": {"k": 1}, "e": "{x"}
    assert row.where == f"{path}, line 3"


def test_columns_of_another_table_are_no_unlabelled_split(tmp_path):
    write(tmp_path / "train.jsonl", rows_of("train"))
    (tmp_path / "test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TaskError, match=r"test.csv, line 2: none of the columns 'answer', 'options', 'prompt'"):
        tasks.get("multiple_choice", tmp_path)


def test_other_splits_of_a_data_set_are_named(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list(rows_of(name)) for name in ("train", "val", "eval", "extra")}
    DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.warns(UserWarning, match=r"not read: the splits extra \(read are train, validation from val and test"):
        splits = from_disk(tmp_path / "set")
    assert {split: rows[0].text("prompt").split()[0] for split, rows in splits.items()} == {
        "train": "train", "validation": "val", "test": "eval",
    }  # fmt: skip


def test_mmlu_does_not_read_its_auxiliary_split(tmp_path):
    for i, name in enumerate(("validation", "test", "dev", "auxiliary_train")):
        write(tmp_path / f"{name}-00000-of-00001.parquet", benchmark("mmlu", 40, seed=i))
    with pytest.warns(UserWarning, match="not read: auxiliary_train"):
        task = tasks.get("mmlu", tmp_path, num_fewshot=1)
    assert len(task.examples("test")) == 40
    assert "auxiliary" not in task.summary


def test_text_files_named_as_splits_are_these(tmp_path):
    for split in ("train", "valid", "test"):
        text = "".join(f"line {i} of {split}, with words of its own\n" for i in range(90))
        (tmp_path / f"wiki.{split}.txt").write_text(text)
    task = tasks.get("text", tmp_path, piece=100)
    for split, name in (("search", "train"), ("dev", "valid"), ("test", "test")):
        assert {example.options[0].split()[3] for example in task.examples(split)} == {f"{name},"}
    assert task.summary.endswith("documents (from wiki.train.txt, wiki.valid.txt and wiki.test.txt)")
    (tmp_path / "more.txt").write_text("".join(f"line {i} of more, with words of its own\n" for i in range(90)))
    with pytest.warns(UserWarning, match="not read as splits.*wiki.test.txt, wiki.train.txt and wiki.valid.txt"):
        assert "divided by hash from more.txt" in tasks.get("text", tmp_path, piece=100).summary


@pytest.mark.parametrize("name", ["c4.jsonl.gz", "c4-train.00000-of-00001.json.gz", "c4.parquet.xz", "c4.csv.bz2"])
def test_packed_rows_of_text_are_documents(tmp_path, name):
    path = write(tmp_path / name, [{"text": f"document {i}, " * 9} for i in range(40)])
    task = tasks.get("text", path)
    assert len(all_examples(task)) == 40


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".csv"])
def test_local_data_of_the_harness(tmp_path, harness_tasks, form):
    rows = [{"a": i, "b": 1, "gold": i % 2, "choices": f"{i}", "one": str(i)} for i in range(40)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ndataset_path: none\nvalidation_split: validation\ntest_split: test\ntraining_split: train\n"
        'output_type: multiple_choice\ndoc_to_text: "{{a}}+{{b}}="\ndoc_to_target: "{{gold}}"\ndoc_to_choice: [x, y]\n'
    )
    data = tmp_path / "data"
    write(data / f"train{form}", rows[:20])
    write(data / f"sub/dev{form}", rows[20:30])
    write(data / f"test{form}", rows[30:])
    write(data / "test.txt", rows)
    with pytest.warns(UserWarning, match="not read: test.txt"):
        task = tasks.get("lm_eval:mine", data, include_path=tmp_path / "tasks")
    assert task.summary == (
        "search 20, dev 10 and test 10 examples (from the train documents, the validation documents and the test"
        " documents)"
    )
    shutil.copy(data / f"test{form}", data / "test.ndjson")
    with pytest.raises(TaskError, match="several files that may be its test split"):
        tasks.get("lm_eval:mine", data, include_path=tmp_path / "tasks")
