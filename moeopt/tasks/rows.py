"""Rows of data by split, from local JSONL or parquet files, a folder of them, or a data set of the Hugging Face hub or
one that was saved to disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.showing import shown
from moeopt.tasks.base import Example
from moeopt.tasks.splits import OWN

Data = str | Path
"""A .jsonl or .parquet file, a folder with one for each split, a folder that `save_to_disk` of the datasets package
wrote, or a hub id such as "google/boolq"."""

ROW_SUFFIXES = (".jsonl", ".parquet")
_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "search": "train", "dev": "validation"}
_SPLIT_FILE = re.compile(rf"(?P<split>{'|'.join((*OWN, *_ALIASES))})(?![a-z])", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+")


@dataclass(frozen=True)
class Row:
    """A row's columns, and where it stands, for error messages."""

    where: str
    values: Mapping[str, Any]

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            have = ", ".join(map(shown, list(self.values)[:20])) or "nothing"
            raise TaskError(f"{self.where}: no {column!r}{nearest(column, list(self.values))} (it has {have})")
        return self.values[column]

    def text(self, column: str) -> str:
        """A column that must be text."""
        value = self[column]
        if not isinstance(value, str):
            raise TaskError(f"{self.where}: {column!r} must be text, got {shown(value)}")
        return value

    def texts(self, column: str) -> list[str]:
        """A column that must be a list of at least one text."""
        value = self[column]
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise TaskError(f"{self.where}: {column!r} must be a list of texts, got {shown(value)}")
        return value

    def number(self, column: str) -> int:
        """A column that must be an integer >= 0."""
        value = self[column]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TaskError(f"{self.where}: {column!r} must be a number >= 0, got {shown(value)}")
        return value

    def inner(self, column: str) -> Row:
        """A column that must be an object, as a row of its own."""
        value = self[column]
        if not isinstance(value, Mapping):
            raise TaskError(f"{self.where}: {column!r} must be an object, got {shown(value)}")
        return Row(f"{self.where}, {column!r}", value)

    def inners(self, column: str) -> list[Row]:
        """A column that must be a list of objects, as rows of their own."""
        value = self[column]
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise TaskError(f"{self.where}: {column!r} must be a list of objects, got {shown(value)}")
        return [Row(f"{self.where}, {column!r} {i}", item) for i, item in enumerate(value)]


def load(data: Data, config: str | None = None, *, also: Collection[str] = ()) -> dict[str, list[Row]]:
    """Rows by the data set's own split ("train", "validation", "test"); those of a lone file are "train".

    Args:
        data: see `Data`. In a folder, files called `train*`, `val*` (`valid*`, `validation*`, `dev*`) and `test*`,
            ending in .jsonl or .parquet, are the splits. A data set without splits that was saved to disk is "train".
        config: the configuration of a hub data set, such as "wic" of "aps/super_glue".
        also: further splits to read under their own name, such as the "dev" of MMLU, which is not its validation split.

    Raises:
        TaskError: if the file, folder or data set is missing, unreadable, empty or malformed.
    """
    if not isinstance(data, (str, Path)):
        raise TaskError(f"data must be a path or a hub id, got {shown(data)}")
    path = Path(data)
    if is_saved(path):
        return from_disk(path, also=also)
    if path.is_dir():
        own: dict[str, list[Row]] = {}
        for file in sorted(path.iterdir()):
            if file.suffix in ROW_SUFFIXES and (match := _SPLIT_FILE.match(file.stem)):
                split = match["split"].lower()
                own.setdefault(split if split in also else _ALIASES.get(split, split), []).extend(read(file))
        if not own:
            raise TaskError(f"folder {path} has no train, validation or test file ending in .jsonl or .parquet")
        return own
    if path.exists() or is_missing_file(data):
        return {"train": read(path)}
    return from_hub(str(data), config, also=also)


def is_missing_file(data: str | Path) -> bool:
    """Whether something that does not exist was meant as a local path, rather than as a hub id."""
    return isinstance(data, Path) or bool(Path(data).suffix) or _HUB_ID.fullmatch(data) is None


def read(path: Path) -> list[Row]:
    """The rows of one .jsonl or .parquet file, at least one."""
    if not path.exists():
        raise TaskError(f"data file {path} does not exist")
    if path.suffix not in ROW_SUFFIXES:
        raise TaskError(f"data file {path} must end in {' or '.join(ROW_SUFFIXES)}")
    try:
        rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    except OSError as error:
        raise TaskError(f"cannot read data file {path}: {error.strerror or shown(error)}") from error
    if not rows:
        raise TaskError(f"data file {path} has no rows")
    return rows


def from_hub(name: str, config: str | None, *, also: Collection[str] = ()) -> dict[str, list[Row]]:
    """The train, validation and test splits, and those of `also`, of a hub data set (or those of them that it has)."""
    datasets = _datasets(f"reading {name!r} from the hub")
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(
            f"cannot load {name!r}{f' ({config})' if config else ''}: it is no local file, and the hub answered:"
            f" {reason}"
        ) from error
    return _own(name, splits, also)


def is_saved(path: str | Path) -> bool:
    """Whether `save_to_disk` of the datasets package wrote a folder."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def from_disk(path: str | Path, *, also: Collection[str] = ()) -> dict[str, list[Row]]:
    """As `from_hub`, of a folder that `save_to_disk` wrote; a data set without splits is "train"."""
    datasets = _datasets(f"reading {path}")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise TaskError(f"cannot read the saved data set {path}: {shown(error)}") from error
    return _own(str(path), found if isinstance(found, datasets.DatasetDict) else {"train": found}, also)


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"{what} needs the datasets package: pip install datasets") from error
    return datasets


def _own(name: str, splits: Mapping[str, Iterable[Any]], also: Collection[str]) -> dict[str, list[Row]]:
    own = {
        split: [Row(f"{name} {split}, row {i}", row) for i, row in enumerate(splits[split])]
        for split in (*OWN, *also)
        if split in splits
    }
    if not any(own.values()):
        raise TaskError(f"data set {name!r} has no train, validation or test split (it has {', '.join(splits)})")
    return own


def own_examples(
    own: Mapping[str, Iterable[Row]], to_example: Callable[[Row], Example], labelled: Callable[[Row], bool]
) -> dict[str, list[Example]]:
    """Examples by own split. A test split in which no row is labelled, as in published benchmarks, is left out."""
    rows = {split: list(items) for split, items in own.items()}
    if len(rows) > 1 and not any(labelled(row) for row in rows.get("test", [])):
        rows.pop("test", None)
    return {split: [to_example(row) for row in items] for split, items in rows.items()}


def examples_of(
    task: str, rows: Iterable[Mapping[str, Any]], to_example: Callable[[Mapping[str, Any]], Example]
) -> list[Example]:
    """Examples from any rows; raises `TaskError` also when `to_example` fails on one, and names it."""
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(to_example(row))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TaskError(f"task {task!r}, row {number}: {type(error).__name__}: {error}") from error
    return examples


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise TaskError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise TaskError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
                raise TaskError(f"{where}: JSON that Python does not read ({error})") from error
            if not isinstance(values, dict):
                raise TaskError(f"{where}: expected a JSON object, got {shown(values)}")
            if b"\\u" in line:
                try:
                    json.dumps(values, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise TaskError(f"{where}: half of a surrogate pair, which is no text") from error
            rows.append(Row(where, values))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import read_table  # type: ignore[import-untyped]
    except ImportError as error:
        raise TaskError(f"reading {path} needs the pyarrow package: pip install pyarrow") from error
    try:
        table = read_table(path).to_pylist()
    except (ArrowException, ValueError, TypeError, OverflowError) as error:
        raise TaskError(f"cannot read data file {path}: {shown(error)}") from error
    return [Row(f"{path}, row {i}", values) for i, values in enumerate(table)]
