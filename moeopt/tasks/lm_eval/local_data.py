"""Local files in place of the data set that a task of the harness reads, in the schema of that data set.

The rows are read as those of any task (`moeopt.tasks.rows`), so that whatever is malformed is named by file and line,
and those without a label are left out with a warning. Which file is which split is told by the names of the task's own
splits: `test.jsonl`, shards as `test-00000-of-00002.parquet`, or `test/` of a folder that `save_to_disk` of the
datasets package wrote; of a split that the task calls as others do, also `dev.jsonl` for "validation".
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeopt.errors import TaskError
from moeopt.showing import listed, shown
from moeopt.tasks.folders import WORDS, files_of, splits_named, topmost, warn_passed_over
from moeopt.tasks.formats import form_of
from moeopt.tasks.lm_eval.data_sets import SEARCHED, form, subject
from moeopt.tasks.rows import Row, has_label, is_saved, numbered, read, refuse_unlabelled, saved

Data = str | Path
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_ROLES = ("training_split", "validation_split", "test_split")


class LocalData:
    """A file of rows or a folder of them.

    Args:
        path: of a file, which is the split that the harness evaluates, or of a folder.

    Raises:
        TaskError: if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise TaskError(f"data file {path} does not exist")
        self.path = path
        self.columns = ""
        self._read: dict[tuple[str, ...], dict[str, list[Row]]] = {}
        self._rows: dict[str, list[Row]] = {}
        self._said: set[str] = set()

    def __str__(self) -> str:
        return str(self.path)

    def changes(self, task: str, config: Mapping[str, Any], num_fewshot: int | None) -> dict[str, Any] | None:
        """The part of a task's configuration that makes it read these data; splits without a file are dropped.

        None if no row is of the task, where rows say of which configuration of the data set they are.

        Raises:
            TaskError: naming file and line of what is malformed, or what is missing in the folder.
        """
        roles = {role: config[role] for role in (*_ROLES, "fewshot_split") if config.get(role)}
        evaluated = str(roles.get("test_split") or roles.get("validation_split"))
        source, name = str(config.get("dataset_path")), config.get("dataset_name")
        searched = [SEARCHED[source]] if source in SEARCHED else []
        splits = self._splits(task, evaluated, (*dict.fromkeys(roles.values()), *searched))
        parts = {split: self._values(rows, source, name, split) for split, rows in splits.items()}
        if not any(parts.get(str(roles.get(role))) for role in ("test_split", "validation_split")):
            return None
        shots = config.get("num_fewshot") if num_fewshot is None else num_fewshot
        if shots and not parts.get(roles.get("fewshot_split", evaluated)):
            raise TaskError(
                f"data {self.path} has no file for split {roles['fewshot_split']!r}, from which lm_eval task {task!r}"
                f" takes its {shots} few-shot examples"
            )
        return {
            "dataset_path": source,
            "custom_dataset": lambda **_: self._data_set(parts),
            "metadata": {**(config.get("metadata") or {}), "local_data": self._builder},
            **{role: split if parts.get(split) else None for role, split in roles.items()},
        }

    def required(self, task: str, config: Mapping[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
        """The changes, which there must be; raises `TaskError` that says why no row has a label."""
        if changes is None:
            labels = form(str(config.get("dataset_path")), config.get("dataset_name")).labels
            rows = [row for split in self._rows.values() for row in split]
            if any(has_label(row, *labels) for row in rows):
                raise TaskError(f"{self.path} has no row of {task!r}")
            refuse_unlabelled(task, rows, labels)
        return changes

    @property
    def _builder(self) -> str:
        """The reader of the datasets package for such files, as a study records them."""
        if is_saved(self.path):
            return "arrow"
        file = next((f for f in files_of(self.path) if form_of(f)), self.path) if self.path.is_dir() else self.path
        return _BUILDERS.get(form_of(file) or "", "json")

    def _splits(self, task: str, evaluated: str, names: tuple[str, ...]) -> dict[str, list[Row]]:
        """Rows by the task's own split, read once for all tasks of a group."""
        if names not in self._read:
            if not self.path.is_dir():
                splits = {evaluated: read(self.path)}
            elif is_saved(self.path):
                parts = saved(self.path, evaluated)
                splits = {split: numbered(str(self.path), split, parts[split]) for split in parts if split in names}
            else:
                files = {split: split_files for split in names if (split_files := _files_of(self.path, split, names))}
                splits = {split: [row for file in files[split] for row in read(file)] for split in files}
                if evaluated in files:
                    warn_passed_over(self.path, files_of(self.path, hidden=True), files)
            if evaluated not in splits:
                have = listed(sorted(path.name for path in self.path.iterdir())) or "nothing"
                raise TaskError(
                    f"data folder {self.path} has no {evaluated}.jsonl, .json, .parquet or .csv, which lm_eval task"
                    f" {task!r} is evaluated on (it has {have})"
                )
            self.columns = ", ".join(map(shown, list(splits[evaluated][0].values)[:20]))
            self._read[names] = splits
        self._rows = self._read[names]
        return self._rows

    def _values(self, rows: Sequence[Row], source: str, name: str | None, split: str) -> list[Mapping[str, Any]]:
        """The rows of one configuration that have a label, in the hub's schema."""
        how = form(source, name)
        labelled = [row for row in rows if not how.labels or has_label(row, *how.labels)]
        if len(labelled) < len(rows):
            self._say(
                f"{self.path}: left out {len(rows) - len(labelled):,} of {len(rows):,} rows of {split}, which have no"
                f" label: {' or '.join(map(repr, how.labels))} is missing, null, -1 or empty"
            )
        mine = [row for row in labelled if name is None or subject(source, row.values) in (None, name)]
        return [values for row in mine for values in how.rows(row)]

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)

    def _data_set(self, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
        try:
            return data_set(parts)
        except (ValueError, TypeError, OverflowError) as error:  # of pyarrow: a column of numbers and texts, say
            raise TaskError(f"the rows of {self.path} are not of one kind: {shown(str(error))}") from error


def data_set(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Rows by split as the datasets package has them."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(_squared(rows)) for split, rows in parts.items() if rows})


def _squared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with all columns that any of them has."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _files_of(folder: Path, split: str, roles: Collection[str]) -> list[Path]:
    files = [path for path in files_of(folder) if form_of(path)]
    mine = [path for path in files if _is_called(path, split)]
    if not mine and split in WORDS:
        free = (path for path in files if not any(_is_called(path, role) for role in roles))
        mine = [path for path in free if splits_named(path.relative_to(folder)) == {WORDS[split]}]
    return topmost(folder, split, mine) if mine else []


def _is_called(path: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![a-z])", path.name, re.IGNORECASE) is not None
