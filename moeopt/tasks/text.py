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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example, Request, Scores
from moeopt.tasks.rows import ROW_SUFFIXES, from_disk, from_hub, is_missing_file, is_saved, read
from moeopt.tasks.splits import FRACTIONS, DividedTask, Splits, checked_limit, content_hash, divide, from_own
from moeopt.tasks.tokens import Encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHORTEST = 16


class TextTask(DividedTask):
    """A task from documents that are already in splits; each is an example with an empty prompt and a single option.

    Args:
        name: what studies record.
        search, dev, test: texts; a split may be empty, the same text may not be in two of them.
        window: tokens a window, at least 16; a window shorter than 16 tokens, at the end of a document, is dropped.

    Raises:
        TaskError: if splits overlap, a text is not one, or there are none.
    """

    def __init__(
        self,
        name: str,
        search: Iterable[str] = (),
        dev: Iterable[str] = (),
        test: Iterable[str] = (),
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
        parts = divide(_examples("document", documents), fractions)
        return cls(name, **_texts(parts), window=window)

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

    def reduce(
        self,
        split: str,
        requests: Sequence[Request],
        log_likelihood: NDArray[np.float64],
        greedy: NDArray[np.int64],
    ) -> Scores:
        tokens = _scored(requests)
        return Scores(
            (-log_likelihood / tokens).astype(np.float32),
            tokens.astype(np.float32),
            (greedy / tokens).astype(np.float32),
        )

    def weights(self, split: str, tokenizer: Any, max_length: int | None = None) -> NDArray[np.float32]:
        return _scored(self.requests(split, tokenizer, max_length=max_length)).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "text",
            "fingerprint": self.fingerprint(),
            "examples": self._splits.counts(),
            "template": f"windows of {self.window} v1",
        }


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
            that `save_to_disk` of the datasets package wrote, or a hub id. A .jsonl or .parquet file holds a document a
            row, any other file is one document.
        column: the column that holds the text, in .jsonl and .parquet files and data sets.
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

    def documents(kind: str, texts: Iterable[str]) -> list[Example]:
        return _examples(kind, [part for text in texts for part in _pieces(text, piece)])

    saved = isinstance(data, str | Path) and is_saved(data)
    hub = isinstance(data, str) and not Path(data).exists() and not _is_pattern(data) and not is_missing_file(data)
    if isinstance(data, str | Path) and (saved or hub):
        own = from_disk(data) if saved else from_hub(str(data), config)
        parts = from_own(
            {name: documents(name, [r.text(column) for r in rows]) for name, rows in own.items()}, fractions
        )
    else:
        listed = [data] if isinstance(data, str | Path) else data
        texts = [text for path in listed for text in _read_all(path, column, keep)]
        parts = divide(documents("document", texts), fractions)
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if fraction > 0 and not parts[split]:
            raise TaskError(
                f"split {split!r} is empty: {sum(map(len, parts.values()))} documents are too few to divide"
                f" {':'.join(map(str, fractions))}; give more files, or piece=2000 to cut them"
            )
    return TextTask("text", **_texts(parts), window=window)


def _scored(requests: Sequence[Request]) -> NDArray[np.int64]:
    return np.asarray([request.scored for request in requests], np.int64)


def _examples(kind: str, texts: Iterable[str]) -> list[Example]:
    """Documents as examples; empty texts are left out."""
    return [Example(f"{kind} {i}", "", (text,), 0) for i, text in enumerate(texts) if text != ""]


def _texts(parts: Mapping[str, Iterable[Example]]) -> dict[str, list[str]]:
    return {split: [example.options[0] for example in examples] for split, examples in parts.items()}


def _pieces(text: str, size: int | None) -> list[str]:
    if size is None:
        return [text]
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += line
    return pieces


def _is_pattern(path: str | Path) -> bool:
    return not Path(path).exists() and glob.has_magic(str(path))


def _read_all(path: str | Path, column: str, suffixes: tuple[str, ...] | None) -> list[str]:
    """The documents of one file, or of all the files of a folder or pattern."""
    if Path(path).is_dir():
        root = Path(path)
        found = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    elif _is_pattern(path):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    else:
        return _read_file(Path(path), column)
    files = sorted(p for p in found if p.is_file() and (suffixes is None or p.name.endswith(suffixes)))
    texts: list[str] = []
    skipped = []
    for file in files:
        try:
            texts += _read_file(file, column)
        except _NotTextError:
            skipped.append(file)
    if skipped:
        warnings.warn(
            f"{path}: skipped {len(skipped)} of {len(files)} files, not UTF-8 text, such as {skipped[0]}",
            stacklevel=2,
        )
    if not texts:
        ending = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        raise TaskError(f"{path} has no text files{ending}")
    return texts


def _read_file(path: Path, column: str) -> list[str]:
    if path.suffix in ROW_SUFFIXES:
        return [row.text(column) for row in read(path)]
    try:
        data = path.read_bytes()
        if b"\0" in data:
            raise _NotTextError(f"data file {path} is not text: it has a zero byte at {data.index(0)}")
        return [data.decode("utf-8-sig")]
    except FileNotFoundError as error:
        raise TaskError(f"data file {path} does not exist") from error
    except OSError as error:
        raise TaskError(f"cannot read data file {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise _NotTextError(f"data file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


class _NotTextError(TaskError):
    """A file that is not UTF-8 text."""
