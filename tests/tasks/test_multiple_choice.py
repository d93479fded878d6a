"""Multiple choice: tokens, losses and the built-in data sets."""

from __future__ import annotations

import gzip
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from rows_of import all_examples, write
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moeopt import tasks
from moeopt.demo.skills import MODEL
from moeopt.demo.skills import rows as demo_rows
from moeopt.errors import TaskError
from moeopt.evaluation import Evaluator
from moeopt.models import load
from moeopt.tasks import Example, MultipleChoiceTask
from moeopt.tasks.rows import from_hub
from moeopt.tasks.splits import OWN


def test_scored_tokens_are_exactly_the_options(tiny_tokenizer):
    task = MultipleChoiceTask("t", [Example(str(i), f"q{i}:", (" no", " maybe"), i % 2) for i in range(5)])
    examples = task.examples("search")
    for request in task.requests("search", tiny_tokenizer):
        example = examples[request.example]
        assert tiny_tokenizer.decode(request.ids[request.scored_from :]) == example.options[request.option]
        assert tiny_tokenizer.decode(request.ids[: request.scored_from]) == "<s>" + example.prompt


def bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=merges)))


def test_option_that_merges_with_the_prompt_is_scored_by_the_token_that_has_it():
    tokenizer = bpe({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")])
    task = MultipleChoiceTask("t", search=[Example("1", "ca", ("b", "c"), 0)])
    assert [(r.ids, r.scored_from) for r in task.requests("search", tokenizer)] == [((2, 3), 1), ((2, 0, 2), 2)]


def test_long_prompt_loses_its_beginning_but_not_the_bos_token(tiny_tokenizer):
    task = MultipleChoiceTask("t", search=[Example("1", "abcdefgh", (" no", " yes"), 0)])
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        requests = task.requests("search", tiny_tokenizer, max_length=9)
    assert [tiny_tokenizer.decode(r.ids) for r in requests] == ["<s>efgh no", "<s>efgh yes"]
    with pytest.raises(TaskError, match="example '1' has 4 tokens, which leaves no room"):
        task.requests("search", tiny_tokenizer, max_length=5)


def test_text_without_tokens_is_refused():
    for prompt, option in (("a", "?"), ("", "a")):
        task = MultipleChoiceTask("t", search=[Example("7", prompt, (option, "b"), 0)])
        with pytest.raises(TaskError, match="'7' has no tokens"):
            task.requests("search", bpe({"a": 0, "b": 1}, []))


def test_loss_is_length_normalised(tiny_tokenizer):
    task = MultipleChoiceTask("t", search=[Example("1", "q", ("ab", "abcd"), 1)])
    requests = task.requests("search", tiny_tokenizer)
    scores = task.reduce("search", requests, np.array([-3.0, -4.0]), np.zeros(2, np.int64))
    assert [scores.losses.item(), scores.correct.item(), scores.weights.item()] == [1.0, 1.0, 1.0]
    scores = task.reduce("search", requests, np.array([-1.0, -4.0]), np.zeros(2, np.int64))
    assert [scores.losses.item(), scores.correct.item()] == [1.0, 0.0]


def test_a_row_that_a_function_of_the_user_s_fails_on_is_named():
    with pytest.raises(TaskError, match="task 'sums', row 1: KeyError: 'a'"):
        MultipleChoiceTask.from_rows(
            "sums", [{"a": 1}, {}], lambda r: Example(str(r["a"]), "1 + 1 =", (" 2", f" {r['a']}"), 0)
        )


def test_hub_layout_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "validation"):
        write(folder / f"{name}.jsonl", [{"question": f"{name} {i}", "answer": True} for i in range(30)])
    rows = from_hub(str(folder), None)
    assert {split: len(part) for split, part in rows.items()} == {"train": 30, "validation": 30}
    assert rows["train"][0].text("question") == "train 0"


def test_a_data_set_saved_to_disk_equals_its_files(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {name: [{"question": f"{name} {i}", "passage": "p", "label": i % 2} for i in range(20)] for name in OWN}
    for name in OWN:
        write(tmp_path / f"{name}.jsonl", rows[name])
    DatasetDict({name: Dataset.from_list(rows[name]) for name in OWN}).save_to_disk(tmp_path / "all")
    Dataset.from_list(rows["train"]).save_to_disk(tmp_path / "one")
    file = tasks.get("boolq", tmp_path / "train.jsonl")
    assert tasks.get("boolq", tmp_path / "one").fingerprint() == file.fingerprint()
    texts = tasks.get("text", tmp_path / "all", column="question")
    assert {split: len(texts.examples(split)) for split in texts.splits} == {"search": 20, "dev": 20, "test": 20}
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(TaskError, match=r"cannot read the saved data set .*one"):
        tasks.get("boolq", tmp_path / "one")


@pytest.mark.parametrize(
    ("prompt", "options", "answer", "index"),
    [
        ("Ice is ", ["hot", "cold"], 1, 1), ("Ice is ", ["hot", "cold"], "cold", 1), ("2 - 3 =", ["1", "-1"], "-1", 1),
        ("2 - 3 =", ["1", "-1"], 1, 1), ("2 - 3 =", ["1", "-1"], 1.0, 1), ("2 - 3 =", ["1", "-1"], "1", 0),
        ("2 - 3 =", ["1", "-1"], 0.0, 0),
    ],
)  # fmt: skip
def test_an_answer_is_an_index_or_an_option(tmp_path, prompt, options, answer, index):
    row = {"prompt": prompt, "options": options, "answer": answer, "id": "a"}
    (example,) = all_examples(tasks.get("multiple_choice", write(tmp_path / "m.jsonl", [row])))
    assert example == Example("a", prompt, tuple(options), index)


def prompts_of(tmp_path, *rows, kind="multiple_choice", **options):
    """Prompt and options of each row, as one text, and what was warned."""
    answer = {"multiple_choice": lambda o: {"options": o, "answer": 0}, "generation": lambda o: {"answer": o}}[kind]
    lines = [{"prompt": prompt, "id": str(i), **answer(texts)} for i, (prompt, texts) in enumerate(rows)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = tasks.get(kind, write(tmp_path / "rows.jsonl", lines), **options)
    ordered = sorted(all_examples(task), key=lambda example: int(example.id))
    return [[e.prompt + option for option in e.options] for e in ordered], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("kind", ["multiple_choice", "generation"])
def test_a_space_of_the_rows_is_neither_doubled_nor_lost(tmp_path, kind):
    verbatim = [
        ("Answer: ", ["yes", "no"]), ("Answer:", [" yes", " no"]), ("Answer:\n", ["yes", "no"]), ("2+2=", ["4", "5"]),
        ("caesar abc>1=", ["bcd", "bce"]), ("sqrt(", ["4)", "5)"]), ("a path/", ["x", "y"]),
        ('He said "', ["yes", "no"]), ("Ice is cold", [".", "?"]), ("答案：", ["是", "否"]),
        ("ice is col", ["\td", "\nd"]),
    ]  # fmt: skip
    read, warned = prompts_of(tmp_path, *verbatim, kind=kind)
    assert read == [[prompt + option for option in options] for prompt, options in verbatim]
    assert warned == []
    spaced = [
        ("Is ice cold?", ["yes", "no"]), ("Answer:", ["yes", " no"]), ("Ice is", ["cold", ".5 cold"]),
        ("3 + 4 are", ["-7", "7"]), ('"Ice"', ["cold", "hot"]), ("**Answer:**", ["cold", "hot"]),
        ("얼음은", ["차다", "뜨겁다"]),
    ]  # fmt: skip
    read, warned = prompts_of(tmp_path, *verbatim, *spaced, kind=kind)
    assert read[len(verbatim) :] == [[f"{prompt} {option.strip()}" for option in options] for prompt, options in spaced]
    assert read[: len(verbatim)] == [[prompt + option for option in options] for prompt, options in verbatim]
    (said,) = warned
    assert said == (
        f"task {kind!r}: 7 of 18 rows have no white space between prompt and answer, and got a space, as in"
        " 'Is ice cold? yes'; delimiter='' leaves rows as they are"
    )


def test_a_delimiter_that_is_said_is_put_where_there_is_no_white_space(tmp_path):
    rows = [("Ice is", ["cold", " hot"]), ("2+2=", ["4", "5"]), ("Ice: ", ["cold", "hot"])]
    for delimiter in ("", " ", "\n", "|"):
        read, warned = prompts_of(tmp_path, *rows, delimiter=delimiter)
        assert read[0] == [f"Ice is{delimiter}cold", "Ice is hot"]
        assert read[1] == [f"2+2={delimiter}4", f"2+2={delimiter}5"]
        assert read[2] == ["Ice: cold", "Ice: hot"]
        assert warned == []
    with pytest.raises(TaskError, match="delimiter must be a text, got 3"):
        prompts_of(tmp_path, *rows, delimiter=3)


def test_rows_of_the_demo_give_the_full_model_its_accuracy_by_default(tmp_path):
    model, tokenizer = load(MODEL)
    rows = [{key: row[key] for key in ("prompt", "options", "answer")} for row in demo_rows("caesar", "test", 40)]
    task = tasks.get("multiple_choice", write(tmp_path / "caesar.jsonl", rows), fractions=(0, 0, 1))
    assert Evaluator(model, tokenizer, task, split="test").evaluate().accuracy > 0.8


GOOD = {"prompt": "p", "options": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 3: not JSON"),
        ("[1, 2]", "line 3: expected a JSON object"),
        ({"prompt": "p", "option": ["a", "b"], "answer": 0}, "line 3: no 'options'; did you mean 'option'"),
        (GOOD | {"prompt": 3}, "line 3: 'prompt' must be text, got 3"),
        (GOOD | {"options": ["a"]}, "line 3: 'options' must be a list of at least two"),
        (GOOD | {"options": "ab"}, "line 3: 'options' must be a list of at least two"),
        (GOOD | {"answer": 2}, "line 3: 'answer' must be an index below 2"),
        (GOOD | {"answer": "c"}, "line 3: 'answer' must be an index below 2 or one of the options, got 'c'"),
        (GOOD | {"answer": True}, "line 3: 'answer' must be an index below 2 or one of the options, got True"),
        ('{"prompt": "\\ud800", "options": ["a", "b"], "answer": 0}', "half of a surrogate pair"),
    ],
)
def test_malformed_line_is_named(tmp_path, row, message):
    path = write(tmp_path / "m.jsonl", [GOOD, "", row])
    with pytest.raises(TaskError, match=message) as error:
        tasks.get("multiple_choice", path)
    assert path in str(error.value) or "surrogate" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bytes.jsonl", b'{"prompt": "\xff"}\n', "bytes.jsonl, line 1: not UTF-8"),
        ("empty.jsonl", b"\n", "empty.jsonl has no rows"),
        ("broken.parquet", b"no parquet", "cannot read data file .*broken.parquet"),
        ("table.csv", b"a,b", "table.csv has no rows"),
        ("table.xlsx", b"a,b", r"table.xlsx must end in .jsonl, .json, .parquet, .csv or .tsv \(also packed"),
        ("missing.jsonl", None, "missing.jsonl does not exist"),
        ("r.csv", b'prompt,options,answer\nq,"[""a"", ""b""]"\n', "line 2: 2 cells in a table of 3 columns"),
        ("r.csv", b'prompt,answer\n"q,1\n', "line 2: unexpected end of data"),
        ("r.csv", b"prompt,prompt\na,b\n", "line 1: the first line must name every column, once"),
        ("r.csv", b"prompt,answer\n\xff,1\n", "is not UTF-8"),
        ("r.json", b"[1, 2]", "row 0: expected a JSON object, got 1"),
        ("r.json", b'[{"a": 1}', "not JSON"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot read data file .*r.jsonl.gz"),
        ("r.parquet.gz", gzip.compress(b"{}", mtime=0), "cannot read data file .*r.parquet.gz"),
        *((f"r.jsonl{end}", b"{}", f"cannot read data file .*r.jsonl{end}") for end in (".gz", ".xz", ".bz2", ".zst")),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        tasks.get("multiple_choice", tmp_path / name)


def test_unreachable_hub_data_set_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"cannot load 'nobody/nothing' \(boolq\): it is no local file, and the hub"):
        tasks.get("multiple_choice", "nobody/nothing", config="boolq")


def test_tasks_of_rows_need_neither_torch_nor_datasets_nor_the_harness(tmp_path):
    heavy = {"torch", "datasets", "pyarrow", "lm_eval"}
    code = f"import sys, moeopt.tasks as t; t.get('multiple_choice', sys.argv[1]); print({heavy} & sys.modules.keys())"
    command = [sys.executable, "-c", code, write(tmp_path / "rows.jsonl", [GOOD])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_unknown_names_get_a_hint():
    with pytest.raises(TaskError, match="unknown task 'bolq'; did you mean 'boolq'"):
        tasks.get("bolq")
    with pytest.raises(TaskError, match="no option 'windw'; did you mean 'window'"):
        tasks.get("text", "x", windw=3)
    with pytest.raises(TaskError, match="'text' needs data"):
        tasks.get("text")
