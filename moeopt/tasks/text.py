"""Text modelling: the next token of any text.

    "def add(a, b):\\n    return a + b\\n"

A document (a file, or a row of a column) belongs to one split whole. Its tokens are cut into windows of `window`
tokens. What the tokenizer puts before a text, such as <s>, stands before every window. That, or else the first token of
a window, is context only, the others are scored. The loss of a window is its mean negative log-likelihood, its
weight the number of scored tokens, so that the weighted mean over windows is the loss per token; accuracy is the
share of tokens that are the model's first choice.
"""

from __future__ import annotations

import glob
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.showing import listed
from moeopt.tasks.base import SPLITS, Example, Float32, Float64, Int64, Request, Scores
from moeopt.tasks.folders import files_of, splits_named
from moeopt.tasks.formats import PACKED, form_of
from moeopt.tasks.rows import Row, from_disk, from_hub, grouped, is_missing_file, is_saved, origin, read, sources
from moeopt.tasks.splits import FRACTIONS, OWN, DividedTask, Splits, checked_limit, content_hash, divide, divide_given
from moeopt.tasks.tokens import Encoder

SHORTEST = 16


class TextTask(DividedTask):
    """A task from documents that are already in splits; each is an example with an empty prompt and a single option.

    Args:
        name: what studies record.
        search, dev, test: texts, or examples that hold one; a split may be empty, the same text, or group of examples,
            may not be in two of them.
        window: tokens a window, at least 16; a window shorter than 16 tokens, at the end of a document, is dropped.

    Raises:
        TaskError: if splits overlap, a text is not one, or there are none.
    """

    unit = "documents"

    def __init__(
        self,
        name: str,
        search: Iterable[str | Example] = (),
        dev: Iterable[str | Example] = (),
        test: Iterable[str | Example] = (),
        *,
        window: int = 256,
    ) -> None:
        if window < SHORTEST:
            raise TaskError(f"window must be at least {SHORTEST} tokens, got {window}")
        self.name = name
        self.window = window
        self._splits = Splits(name, _examples("search", search), _examples("dev", dev), _examples("test", test))

    @classmethod
    def from_documents(
        cls, name: str, documents: Iterable[str], *, window: int = 256, fractions: Sequence[float] = FRACTIONS
    ) -> TextTask:
        """A task from any texts, divided into search, dev and test by a hash of each."""
        return cls(name, **divide(_examples("document", documents), fractions), window=window)

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request a window, in a fixed random order over all documents; `limit` counts windows.

        Raises:
            TaskError: if a window is longer than `max_length`, or no document gives a window of 16 tokens.
        """
        windows = self.windows(split, tokenizer, max_length)[: checked_limit(limit)]
        first = max(1, len(Encoder(tokenizer).start))
        return [Request(i, 0, ids, first) for i, (_, _, ids) in enumerate(windows)]

    def windows(
        self, split: str, tokenizer: Any, max_length: int | None = None
    ) -> list[tuple[str, int, tuple[int, ...]]]:
        """Name, document and token ids of all windows, in their order; raises as `requests`."""
        if max_length is not None and self.window > max_length:
            raise TaskError(f"task {self.name!r}: windows of {self.window} tokens exceed the limit of {max_length}")
        encoder = Encoder(tokenizer)
        stride = self.window - len(encoder.start)
        windows: list[tuple[str, int, tuple[int, ...]]] = []
        for number, document in enumerate(self.examples(split)):
            ids = encoder.body(document.options[0])
            key = content_hash(document)
            for start in range(0, len(ids), stride):
                piece = (*encoder.start, *ids[start : start + stride])
                if len(piece) >= SHORTEST:
                    windows.append((hashlib.sha256(f"{key} {start}".encode()).hexdigest(), number, piece))
        if not windows:
            raise TaskError(f"task {self.name!r}: no document of split {split!r} has {SHORTEST} tokens")
        return sorted(windows)

    def reduce(self, split: str, requests: Sequence[Request], log_likelihood: Float64, greedy: Int64) -> Scores:
        tokens = _scored(requests)
        losses, correct = (-log_likelihood / tokens).astype(np.float32), (greedy / tokens).astype(np.float32)
        return Scores(losses, tokens.astype(np.float32), correct)

    def weights(self, split: str, tokenizer: Any, max_length: int | None = None) -> Float32:
        return _scored(self.requests(split, tokenizer, max_length=max_length)).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return self.facts("text", f"windows of {self.window} v1")


def text_task(
    data: str | Path | Sequence[str | Path],
    *,
    column: str = "text",
    suffixes: Sequence[str] | str | None = None,
    window: int = 256,
    piece: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    config: str | None = None,
) -> TextTask:
    """A text task from files or from a column of a data set.

    Args:
        data: a file, a list of files, a glob pattern, a folder (all its files, recursively, hidden ones aside), one
            that `save_to_disk` of the datasets package wrote, or a hub id. A .jsonl or .parquet file, or a packed one
            of rows such as .json.gz, holds a document a row, any other file is one document. Where every file is a
            split by its name (`wiki.train.txt`, `wiki.test.txt`), it is that split; otherwise all are divided together.
        column: the column that holds the text, in files of rows and data sets; rows of one "group" stay in one split.
        suffixes: of a folder or pattern, keep only files that end so, such as ".py".
        window: tokens a window.
        piece: cut documents at line ends into pieces of at least this many characters, each then a document of its own;
            for data that is one long file.
        fractions: of search, dev and test where the data has no splits of its own.
        config: configuration of a hub data set.

    Raises:
        TaskError: naming the file that is missing, malformed or, if it was named itself, not UTF-8. Files that are not
            UTF-8 text in a folder or pattern are skipped, and counted in a warning.
    """
    if piece is not None and piece < 1:
        raise TaskError(f"piece must be at least 1 character, got {piece}")
    keep = (suffixes,) if isinstance(suffixes, str) else None if suffixes is None else tuple(suffixes)
    saved = isinstance(data, str | Path) and is_saved(data)
    hub = isinstance(data, str) and not Path(data).exists() and not _is_pattern(data) and not is_missing_file(data)
    if isinstance(data, str | Path) and (saved or hub):
        rows = from_disk(data) if saved else from_hub(str(data), config)
        documents, said = {split: _of_rows(rows[split], column) for split in rows}, origin(rows, rows)
    else:
        paths = [data] if isinstance(data, str | Path) else data
        documents, said = _by_name([file for path in paths for file in _read_all(path, column, keep)])
    pieces = {split: [part for text in texts for part in _pieces(text, piece)] for split, texts in documents.items()}
    parts = divide_given(pieces, fractions, "text")
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if fraction > 0 and not parts[split]:
            raise TaskError(
                f"split {split!r} is empty: {sum(map(len, parts.values()))} documents are too few to divide"
                f" {':'.join(map(str, fractions))}; give more files, or piece=2000 to cut them"
            )
    task = TextTask("text", **parts, window=window)
    task.origin = said
    return task


def _scored(requests: Sequence[Request]) -> Int64:
    return np.asarray([request.scored for request in requests], np.int64)


def _examples(kind: str, texts: Iterable[str | Example]) -> list[Example]:
    """Documents as examples; empty texts are left out."""
    return [
        text if isinstance(text, Example) else Example(f"{kind} {i}", "", (text,), 0)
        for i, text in enumerate(texts)
        if text != ""
    ]


def _of_rows(rows: Iterable[Row], column: str) -> list[Example]:
    return [grouped(Example(row.where, "", (text,), 0), row) for row in rows if (text := row.text(column))]


def _pieces(document: Example, size: int | None) -> list[Example]:
    if size is None:
        return [document]
    pieces = [""]
    for text in document.options[0].splitlines(keepends=True):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += text
    return [replace(document, id=f"{document.id}, piece {i}", options=(text,)) for i, text in enumerate(pieces)]


def _is_pattern(path: str | Path) -> bool:
    return not Path(path).exists() and glob.has_magic(str(path))


Document = tuple[Path, list[Example]]
"""A file's path below the folder that was named, and what it holds."""


def _by_name(files: Sequence[Document]) -> tuple[dict[str, list[Example]], str]:
    """Documents by split, and in words from where: by the files' names where these are splits, else all as one."""
    named = [splits_named(path) for path, _ in files]
    are_splits = all(len(splits) == 1 for splits in named) and {"train"} < set.union(*named)
    alike = [str(path) for (path, _), splits in zip(files, named, strict=True) if splits and _is_text(path)]
    if alike and len(files) > 1 and not are_splits:
        warnings.warn(
            f"divided by hash with the other files, not read as splits, whatever their names say: {listed(alike)}",
            stacklevel=3,
        )
    parts: dict[str, list[Example]] = {split: [] for split in OWN}
    names: dict[str, list[str]] = {split: [] for split in OWN}
    for (path, documents), splits in zip(files, named, strict=True):
        split = splits.pop() if are_splits else "train"
        parts[split] += documents
        names[split].append(path.name)
    return parts, sources({split: listed(names[split], most=2) for split in OWN if parts[split]})


def _is_text(path: Path) -> bool:
    return form_of(path) is not None or path.suffix.lower() in (".txt", "")


def _read_all(path: str | Path, column: str, suffixes: tuple[str, ...] | None) -> list[Document]:
    """The documents of one file, or of all the files of a folder or pattern."""
    root = Path(path)
    if root.is_dir():
        pairs = [(file, file.relative_to(root)) for file in files_of(root)]
    elif _is_pattern(path):
        pairs = [(Path(file), Path(Path(file).name)) for file in glob.glob(str(path), recursive=True)]
    else:
        return [(Path(root.name), _read_file(root, column))]
    files = sorted(
        pair for pair in pairs if pair[0].is_file() and (suffixes is None or pair[0].name.endswith(suffixes))
    )
    documents: list[Document] = []
    skipped = []
    for file, name in files:
        try:
            documents.append((name, _read_file(file, column)))
        except _NotTextError:
            skipped.append(file)
    if skipped:
        warnings.warn(
            f"{path}: skipped {len(skipped)} of {len(files)} files, not UTF-8 text, such as {skipped[0]}",
            stacklevel=2,
        )
    if not any(texts for _, texts in documents):
        ending = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        raise TaskError(f"{path} has no text files{ending}")
    return documents


def _read_file(path: Path, column: str) -> list[Example]:
    if form_of(path) in (".jsonl", ".ndjson", ".parquet") or (form_of(path) and path.suffix.lower() in PACKED):
        return _of_rows(read(path), column)
    try:
        data = path.read_bytes()
        if b"\0" in data:
            raise _NotTextError(f"data file {path} is not text: it has a zero byte at {data.index(0)}")
        text = data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise TaskError(f"data file {path} does not exist") from error
    except OSError as error:
        raise TaskError(f"cannot read data file {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise _NotTextError(f"data file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return [Example(str(path), "", (text,), 0)] if text else []


class _NotTextError(TaskError):
    """A file that is not UTF-8 text."""
