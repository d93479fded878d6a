"""Rows of data by split, from local files or a folder of them (`moeopt.tasks.formats`, `moeopt.tasks.folders`), a data
set of the Hugging Face hub or one that was saved to disk; and the examples that become of them."""

from __future__ import annotations

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
from moeopt.tasks.labels import has_label, integer
from moeopt.tasks.likeness import group_names
from moeopt.tasks.splits import OWN

Data = str | Path
"""A file of rows (.jsonl, .json, .parquet, .csv or .tsv, also packed as .gz, .bz2, .xz or .zst), a folder with one for
each split, a folder that `save_to_disk` of the datasets package wrote, or a hub id such as "google/boolq"."""

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
        """A column that must be an integer >= 0, also as text or as a float."""
        value = integer(self[column])
        if value is None:
            raise TaskError(f"{self.where}: {column!r} must be a number >= 0, got {shown(self[column])}")
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
    datasets = _datasets(f"reading {name!r} from the hub")
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(
            f"cannot load {name!r}{f' ({config})' if config else ''}: it is no local file, and the hub answered:"
            f" {reason}"
        ) from error
    return _own(name, splits)


def is_saved(path: str | Path) -> bool:
    """Whether `save_to_disk` of the datasets package wrote a folder."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def from_disk(path: str | Path) -> dict[str, list[Row]]:
    """As `from_hub`, of a folder that `save_to_disk` wrote; a data set without splits is "train"."""
    datasets = _datasets(f"reading {path}")
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise TaskError(f"cannot read the saved data set {path}: {shown(error)}") from error
    return _own(str(path), saved if isinstance(saved, datasets.DatasetDict) else {"train": saved})


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"{what} needs the datasets package: pip install datasets") from error
    return datasets


def _own(name: str, splits: Mapping[str, Iterable[Any]]) -> dict[str, list[Row]]:
    chosen = {split: split for split in OWN if split in splits}
    for split in splits:  # "val" or "eval" where there is no "validation" or "test"
        if split not in chosen.values() and split.lower() in WORDS:
            chosen.setdefault(WORDS[split.lower()], split)
    rows = {
        split: [Row(f"{name} {key}, row {i}", row) for i, row in enumerate(splits[key])]
        for split, key in chosen.items()
    }
    if not any(rows.values()):
        raise TaskError(f"data set {name!r} has no train, validation or test split (it has {', '.join(splits)})")
    over = [line(split, 80) for split in splits if split not in chosen.values()]
    if over:
        read = listed(f"{split} from {key}" if split != key else split for split, key in chosen.items())
        warnings.warn(f"{name}: not read: the splits {listed(over)} (read are {read})", stacklevel=5)
    return rows


def own_examples(
    task: str,
    own: Mapping[str, Iterable[Row]],
    to_example: Callable[[Row], Example],
    columns: Sequence[str],
    labelled: Callable[[Row], bool] | None = None,
) -> dict[str, list[Example]]:
    """Examples by own split. Rows without a label, such as all of a published test split, are left out with a warning.

    A row's column "group", a text or a number, says with whom it stays in one split, beside what `to_example` says.

    Args:
        task: its name, for messages.
        own: rows by own split.
        to_example: what becomes of a row.
        columns: which hold the label; one is enough.
        labelled: whether a row has one; None: by `moeopt.tasks.labels.has_label`.

    Raises:
        TaskError: when no row has a label.
    """
    rows = {split: list(items) for split, items in own.items()}
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


def origin(own: Mapping[str, Sequence[Row | Example]], rows: Mapping[str, Sequence[Row]]) -> str:
    """Which split was read from where, in words; `own` are the data set's own splits in use, of these `rows`."""
    return sources({split: _places(rows[split]) for split in OWN if own.get(split)})


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
