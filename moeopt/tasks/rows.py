"""Rows of data by split, from local files or a folder of them (`moeopt.tasks.formats`, `moeopt.tasks.folders`), a data
set of the Hugging Face hub or one that was saved to disk; and the examples that become of them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from moeopt.errors import TaskError, nearest
from moeopt.showing import line, listed, shown
from moeopt.tasks.base import Example
from moeopt.tasks.folders import WORDS, split_files
from moeopt.tasks.formats import read_rows
from moeopt.tasks.likeness import group_names
from moeopt.tasks.splits import OWN

Data = str | Path
"""A file of rows (.jsonl, .json, .parquet, .csv or .tsv, also packed as .gz, .bz2, .xz or .zst), a folder with one for
each split, a folder that `save_to_disk` of the datasets package wrote, or a hub id such as "google/boolq"."""

_YES_NO = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_WHOLE = re.compile(r"(\d{1,18})(?:\.0*)?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+")


@dataclass(frozen=True)
class Row:
    """A row's columns, and where it stands, for error messages."""

    where: str
    values: Mapping[str, Any]

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            raise TaskError(f"{self.where}: no {column!r}{nearest(column, list(self.values))} ({self.has})")
        return self.values[column]

    @property
    def has(self) -> str:
        """Which columns there are, for messages."""
        return f"it has {', '.join(map(shown, list(self.values)[:20])) or 'nothing'}"

    def _checked(self, column: str, holds: Callable[[Any], bool], what: str) -> Any:
        if not holds(value := self[column]):
            raise TaskError(f"{self.where}: {column!r} must be {what}, got {shown(value)}")
        return value

    def text(self, column: str) -> str:
        """A column that must be text."""
        return str(self._checked(column, lambda value: isinstance(value, str), "text"))

    def texts(self, column: str) -> list[str]:
        """A column that must be a list of at least one text."""
        return list(self._checked(column, lambda value: bool(value) and _all(value, str), "a list of texts"))

    def number(self, column: str) -> int:
        """A column that must be an integer >= 0, also as text or as a float."""
        return int(self._checked(column, lambda value: integer(value) is not None, "a number >= 0"))

    def inner(self, column: str) -> Row:
        """A column that must be an object, as a row."""
        value = self._checked(column, lambda value: isinstance(value, Mapping), "an object")
        return Row(f"{self.where}, {column!r}", value)

    def inners(self, column: str) -> list[Row]:
        """A column that must be a list of objects, as rows."""
        values = self._checked(column, lambda value: _all(value, Mapping), "a list of objects")
        return [Row(f"{self.where}, {column!r} {i}", item) for i, item in enumerate(values)]


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def load(data: Data, config: str | None = None) -> dict[str, list[Row]]:
    """Rows by the data set's own split ("train", "validation", "test"); those of a lone file are "train".

    Args:
        data: see `Data`; `moeopt.tasks.folders` says which files of a folder are the splits. A data set without splits
            that was saved to disk is "train".
        config: the configuration of a hub data set, such as "wic" of "aps/super_glue".

    Raises:
        TaskError: if the file, folder or data set is missing, unreadable, empty or malformed, or it is ambiguous which
            file is a split.
    """
    if not isinstance(data, (str, Path)):
        raise TaskError(f"data must be a path or a hub id, got {shown(data)}")
    path = Path(data)
    if is_saved(path):
        return from_disk(path)
    if path.is_dir():
        files = split_files(path)
        return {split: [row for file in files[split] for row in read(file)] for split in files}
    if path.exists() or is_missing_file(data):
        return {"train": read(path)}
    return from_hub(str(data), config)


def is_missing_file(data: str | Path) -> bool:
    """Whether something that does not exist was meant as a local path, rather than as a hub id."""
    return isinstance(data, Path) or bool(Path(data).suffix) or _HUB_ID.fullmatch(data) is None


def read(path: Path) -> list[Row]:
    """The rows of one file, at least one; raises as `moeopt.tasks.formats.read_rows`."""
    return [Row(where, values) for where, values in read_rows(path)]


def from_hub(name: str, config: str | None) -> dict[str, list[Row]]:
    """The train, validation and test splits of a hub data set (or those of them that it has).

    Other splits are named in a warning.
    """
    import datasets

    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(
            f"cannot load {name!r}{f' ({config})' if config else ''}: it is no local file, and the hub answered:"
            f" {reason}"
        ) from error
    return _by_split(name, splits)


def is_saved(path: str | Path) -> bool:
    """Whether `save_to_disk` of the datasets package wrote a folder."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved(path: str | Path, alone: str = "train") -> Mapping[str, Iterable[Any]]:
    """The splits of a folder that `save_to_disk` wrote; a data set without splits is the one called `alone`."""
    import datasets

    try:
        read = datasets.load_from_disk(str(path))
    except Exception as error:
        raise TaskError(f"cannot read the saved data set {path}: {shown(error)}") from error
    return read if isinstance(read, datasets.DatasetDict) else {alone: read}


def from_disk(path: str | Path) -> dict[str, list[Row]]:
    """As `from_hub`, of a folder that `save_to_disk` wrote; a data set without splits is "train"."""
    return _by_split(str(path), saved(path))


def numbered(name: str, split: str, rows: Iterable[Any]) -> list[Row]:
    """The rows of a split of a data set."""
    return [Row(f"{name} {split}, row {i}", row) for i, row in enumerate(rows)]


def _by_split(name: str, splits: Mapping[str, Iterable[Any]]) -> dict[str, list[Row]]:
    chosen = {split: split for split in OWN if split in splits}
    for split in splits:  # "val" or "eval" where there is no "validation" or "test"
        if split not in chosen.values() and split.lower() in WORDS:
            chosen.setdefault(WORDS[split.lower()], split)
    rows = {split: numbered(name, key, splits[key]) for split, key in chosen.items()}
    if not any(rows.values()):
        raise TaskError(f"data set {name!r} has no train, validation or test split (it has {', '.join(splits)})")
    over = [line(split, 80) for split in splits if split not in chosen.values()]
    if over:
        read = listed(f"{split} from {key}" if split != key else split for split, key in chosen.items())
        warnings.warn(f"{name}: not read: the splits {listed(over)} (read are {read})", stacklevel=5)
    return rows


def labelled_examples(
    task: str,
    rows: Mapping[str, Sequence[Row]],
    to_example: Callable[[Row], Example],
    columns: Sequence[str],
    labelled: Callable[[Row], bool] | None = None,
) -> dict[str, list[Example]]:
    """Examples by the data set's own split; rows without a label, as in published test splits, left out with a warning.

    A row's column "group", a text or a number, says with whom it stays in one split, beside what `to_example` says.

    Args:
        task: its name, for messages.
        rows: by the data set's own split.
        to_example: what becomes of a row.
        columns: which hold the label; one is enough.
        labelled: whether a row has one; None: by `has_label`.

    Raises:
        TaskError: when no row has a label.
    """
    has = labelled or (lambda row: has_label(row, *columns))
    labelled_rows = {split: [row for row in items if has(row)] for split, items in rows.items()}
    label = " or ".join(map(repr, columns))
    if not any(labelled_rows.values()):
        refuse_unlabelled(task, [row for items in rows.values() for row in items], columns)
    usual = {column for items in labelled_rows.values() for column in (items[0].values if items else ())}
    for items in (rows[split] for split in rows if rows[split] and not labelled_rows[split]):
        if not usual & items[0].values.keys():
            wanted = ", ".join(map(shown, sorted(usual)[:20]))
            raise TaskError(
                f"{items[0].where}: none of the columns {wanted}, which the other splits have ({items[0].has})"
            )
    counts = [(split, len(items) - len(labelled_rows[split]), len(items)) for split, items in rows.items()]
    said = [f"{n:,} of {total:,} rows of {split}" for split, n, total in counts if n]
    if said:
        warnings.warn(
            f"task {task!r}: left out {listed(said)}, which have no label: {label} is missing, null, -1 or empty",
            stacklevel=4,
        )
    return {split: [grouped(to_example(row), row) for row in items] for split, items in labelled_rows.items() if items}


def refuse_unlabelled(task: str, rows: Sequence[Row], columns: Sequence[str]) -> NoReturn:
    """Raise the `TaskError` of a task none of whose rows has a label, in one of the columns."""
    if not rows:
        raise TaskError(f"task {task!r} has no rows")
    label = " or ".join(map(repr, columns))
    first = rows[0]
    hint = "" if first.values.keys() & columns else nearest(columns[0], list(first.values))
    raise TaskError(
        f"{first.where}: no {label}: missing, null, -1 or empty in this row, as in all"
        f" {len(rows):,} ({first.has}){hint}"
    )


def grouped(example: Example, row: Row) -> Example:
    """The example, also of the group in its row's column "group"."""
    try:
        names = group_names(row.values.get("group"))
    except TaskError as error:
        raise TaskError(f"{row.where}: {error}") from None
    return replace(example, group=(*names, *group_names(example.group))) if names else example


def origin(examples: Mapping[str, Sequence[Row | Example]], rows: Mapping[str, Sequence[Row]]) -> str:
    """Which split was read from where, in words: of the data set's own splits, those with examples, of these rows."""
    return sources({split: _places(rows[split]) for split in OWN if examples.get(split)})


def sources(names: Mapping[str, str]) -> str:
    """The same, from what each of the data set's own splits was read from."""
    places = [names[split] for split in OWN if split in names]
    if len(places) == 1:
        return f"divided by hash from {places[0]}"
    if len(places) == 2:
        return f"search and dev divided by hash from {places[0]}, test from {places[1]}"
    return f"from {listed(places)}"


def _places(rows: Sequence[Row]) -> str:
    """The files, or the split of a data set, that rows are from."""
    places = dict.fromkeys(re.split(r", (?:line|row) \d", row.where)[0] for row in rows)
    return listed((line(Path(place).name if Path(place).exists() else place, 80) for place in places), most=2)


def has_label(row: Row, *columns: str) -> bool:
    """Whether one of the columns holds a label; unlabelled rows lack it, or say null, NaN, -1, "-1", "" or []."""
    return any(is_label(row.values.get(column)) for column in columns)


def integer(value: Any) -> int | None:
    """The integer >= 0 that a value is, as a number (1, 1.0) or as text ("1", "1.0"); None if it is none."""
    match = None if isinstance(value, bool) else _WHOLE.fullmatch(str(value).strip())
    return int(match[1]) if match else None


def yes_no(row: Row, *columns: str) -> bool:
    """The label in the first of the columns that the row has: a bool, 0 or 1, or "true" or "false" as text."""
    column = next((c for c in columns if is_label(row.values.get(c))), columns[0])
    label = _YES_NO.get(text_of(row[column]).lower())
    if label is None:
        raise TaskError(f"{row.where}: {column!r} must be true or false (or 0 or 1), got {row[column]!r}")
    return label


def which(row: Row, column: str, names: Sequence[str], *, index: bool = True) -> int:
    """The position in `names` of the label in a column: one of the names or, if `index`, its index from 0."""
    text, number = text_of(row[column]), integer(row[column])
    if text in names:
        return names.index(text)
    if index and number is not None and number < len(names):
        return number
    other = f" (or an index below {len(names)})" if index else ""
    raise TaskError(f"{row.where}: {column!r} must be {' or '.join(names)}{other}, got {row[column]!r}")


def text_of(value: Any) -> str:
    """A label as text, a whole number without a fraction: 1.0 is "1"."""
    number = integer(value)
    return str(value).strip() if number is None else str(number)


def is_label(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "-1")
    if isinstance(value, float) and math.isnan(value):
        return False
    return value not in (None, -1, [])
