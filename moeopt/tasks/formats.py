"""Files of rows: how each kind is written, told by its ending."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moeopt.errors import TaskError
from moeopt.showing import shown

Rows = Iterator[tuple[str, dict[str, Any]]]

PACKED = (".gz", ".bz2", ".xz", ".zst")
ENDINGS = ".jsonl, .json, .parquet, .csv or .tsv (also packed, as .gz, .bz2, .xz or .zst)"


def form_of(path: Path) -> str | None:
    """The ending that says how a file's rows are written, such as ".csv" of "Test.CSV.gz"; None for other files."""
    endings = [ending.lower() for ending in path.suffixes]
    form = "".join(endings[-2:-1] if endings and endings[-1] in PACKED else endings[-1:])
    return form if form in _READERS else None


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Where each row of a file stands, for messages, and its columns; at least one row.

    A .json file is a list of objects, or has an object a line as .jsonl. In .csv and .tsv all columns are text, but for
    cells with a JSON list of texts or objects, or an object.

    Raises:
        TaskError: naming the file, and the line where there is one, of whatever is missing, unreadable or malformed.
    """
    form = form_of(path)
    if not path.exists():
        raise TaskError(f"data file {path} does not exist")
    if form is None:
        raise TaskError(f"data file {path} must end in {ENDINGS}")
    try:
        with _opened(path) as file:
            rows = list(_READERS[form](path, file))
    except TaskError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # of the disk, or a packed file that is damaged
        raise TaskError(f"cannot read data file {path}: {getattr(error, 'strerror', None) or shown(error)}") from error
    if not rows:
        raise TaskError(f"data file {path} has no rows")
    return rows


def _opened(path: Path) -> IO[bytes]:
    packed = path.suffix.lower()
    if packed == ".zst":
        from pyarrow import CompressedInputStream  # type: ignore[import-untyped]

        with path.open("rb") as source, CompressedInputStream(source, "zstd") as stream:
            return io.BytesIO(stream.read())
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    file: IO[bytes] = openers.get(packed, open)(path, "rb")
    return file


def _lines(path: Path, file: IO[bytes]) -> Rows:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(where, _json(where, line, "utf-8-sig" if number == 1 else "utf-8"))


def _objects(path: Path, file: IO[bytes]) -> Rows:
    data = file.read()
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _lines(path, io.BytesIO(data))
        return
    for number, values in enumerate(_json(str(path), data, "utf-8-sig")):
        where = f"{path}, row {number}"
        yield where, _object(where, values)


def _json(where: str, text: bytes, encoding: str) -> Any:
    try:
        values = json.loads(text.decode(encoding))
        if b"\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise TaskError(f"{where}: half of a surrogate pair, which is no text") from error
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise TaskError(f"{where}: JSON that Python does not read ({error})") from error
    return values


def _object(where: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TaskError(f"{where}: expected a JSON object, got {shown(values)}")
    return values


def _table(path: Path, file: IO[bytes], delimiter: str) -> Rows:
    columns: list[str] = []
    line = 1
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for cells in reader:
                where, line = f"{path}, line {line}", reader.line_num + 1
                if columns and cells and len(cells) != len(columns):
                    raise TaskError(f"{where}: {len(cells)} cells in a table of {len(columns)} columns")
                if columns and cells:
                    yield where, dict(zip(columns, map(_cell, cells), strict=True))
                columns = columns or cells
                if len(set(columns)) < len(columns) or "" in columns:
                    raise TaskError(f"{where}: the first line must name every column, once, got {shown(columns)}")
    except csv.Error as error:
        raise TaskError(f"{path}, line {line}: {error}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"data file {path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _cell(text: str) -> Any:
    """A list of texts or of objects, or an object, where the cell holds its JSON; the text otherwise, as "[1, 2]"."""
    if not re.match(r'\s*(?:\[\s*["{]|\{\s*")', text):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    parts = value if isinstance(value, list) else [value]
    return value if all(isinstance(part, str) for part in parts) or all(isinstance(p, dict) for p in parts) else text


def _parquet(path: Path, file: IO[bytes]) -> Rows:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        source = BufferReader(file.read()) if path.suffix.lower() in PACKED else path
        table = read_table(source, partitioning=None).to_pylist()  # a path such as a=1/ adds no column
    except (ArrowException, ValueError, TypeError, OverflowError) as error:
        raise TaskError(f"cannot read data file {path}: {shown(error)}") from error
    for number, values in enumerate(table):
        yield f"{path}, row {number}", values


_READERS: dict[str, Callable[[Path, IO[bytes]], Rows]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _objects,
    ".csv": lambda path, file: _table(path, file, ","),
    ".tsv": lambda path, file: _table(path, file, "\t"),
    ".parquet": _parquet,
}
