"""Text: documents to windows."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows_of import all_examples, write

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks import TextTask

DOCUMENTS = [f"document {i} " + "abcdefghij" * i for i in range(30)]


def texts(task: tasks.Task) -> set[str]:
    return {example.options[0] for example in all_examples(task)}


@given(st.integers(0, 300), st.integers(16, 64))
def test_windows_score_every_token_once_but_for_short_ends(tiny_tokenizer, length, window):
    document = "".join(chr(97 + i % 26) for i in range(length))
    task = TextTask("t", search=[document + "z" * 16], window=window)
    requests = task.requests("search", tiny_tokenizer)
    assert all(r.ids[0] == tiny_tokenizer.bos_token_id and r.scored_from == 1 for r in requests)
    assert all(16 <= len(r.ids) <= window for r in requests)
    full, rest = divmod(length + 16, window - 1)
    assert sum(len(r.ids) - 1 for r in requests) == full * (window - 1) + (rest if rest >= 15 else 0)


def test_without_a_bos_token_the_first_of_a_window_is_context(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    (request,) = TextTask("t", search=["a" * 20]).requests("search", tokenizer)
    assert (len(request.ids), request.scored_from) == (20, 1)


def test_files_folder_list_and_pattern_agree(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "deep" / ".hidden" / "x.py").write_text("hidden")
    (tmp_path / "note.md").write_text("a note")
    files = [tmp_path / ("deep" if i % 2 else ".") / f"{i}.py" for i in range(30)]
    for file, text in zip(files, DOCUMENTS, strict=True):
        file.write_text(text)
    folder = tasks.get("text", str(tmp_path), suffixes=".py")
    assert texts(folder) == set(DOCUMENTS)
    assert texts(tasks.get("text", tmp_path)) == {*DOCUMENTS, "a note"}
    for data in (files, f"{tmp_path}/**/*.py"):
        assert tasks.get("text", data).describe() == folder.describe()


def test_rows_of_a_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"body": text} for text in DOCUMENTS])
    assert texts(tasks.get("text", path, column="body")) == set(DOCUMENTS)
    with pytest.raises(TaskError, match=r"rows\.jsonl, line 1: no 'text'"):
        tasks.get("text", path)


def test_one_long_file_can_be_cut(tmp_path):
    path = tmp_path / "long.txt"
    lines = [f"line {i} of a long file\n" for i in range(500)]
    path.write_text("".join(lines))
    with pytest.raises(TaskError, match=r"is empty: 1 documents are too few .* piece=2000"):
        tasks.get("text", path)
    pieces = texts(tasks.get("text", path, piece=300))
    assert sum(map(len, pieces)) == sum(map(len, lines))
    assert {line for piece in pieces for line in piece.splitlines(keepends=True)} == set(lines)


def test_files_that_are_not_text(tmp_path):
    for file, text in zip((tmp_path / f"{i}.txt" for i in range(30)), DOCUMENTS, strict=True):
        file.write_text(text)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match="skipped 2 of 32 files"):
        assert texts(tasks.get("text", tmp_path)) == set(DOCUMENTS)
    with pytest.raises(TaskError, match=r"latin\.txt is not UTF-8 text: .* at byte 3"):
        tasks.get("text", tmp_path / "latin.txt")
    with pytest.raises(TaskError, match=r"image\.png is not text: it has a zero byte"):
        tasks.get("text", [tmp_path / "image.png"])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("none.txt", {}, "none.txt does not exist"),
        ("none", {}, "none does not exist"),
        ("*.py", {}, r"has no text files"),
        ("", {}, "has no text files"),
        ("", {"suffixes": [".py"]}, r"ending in \.py"),
        ("", {"piece": 0}, "piece must be at least 1"),
    ],
)
def test_missing_files_and_bad_options_are_named(tmp_path, data, options, message):
    with pytest.raises(TaskError, match=message):
        tasks.get("text", f"{tmp_path}/{data}", **options)


def test_bad_tasks_are_refused(tiny_tokenizer):
    with pytest.raises(TaskError, match="windows of 256 tokens exceed the limit of 128"):
        TextTask("t", search=DOCUMENTS).requests("search", tiny_tokenizer, max_length=128)
    with pytest.raises(TaskError, match="no document of split 'search' has 16 tokens"):
        TextTask("t", search=["short"]).requests("search", tiny_tokenizer)
    with pytest.raises(TaskError, match="window must be at least 16 tokens, got 2"):
        TextTask("t", search=["a"], window=2)
    with pytest.raises(TaskError, match="expected text, got 3"):
        TextTask("t", search=[3])  # type: ignore[list-item]
