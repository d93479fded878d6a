"""Yes/no labels as data sets write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.errors import TaskError

if TYPE_CHECKING:
    from moeopt.tasks.rows import Row

_YES_NO = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def has_label(row: Row, *columns: str) -> bool:
    """Whether one of the columns holds a label; unlabelled rows lack it, or say null or -1."""
    return any(row.values.get(column) not in (None, -1, "-1") for column in columns)


def yes_no(row: Row, *columns: str) -> bool:
    """The label in the first of the columns that the row has: a bool, 0 or 1, or "true" or "false" as text."""
    column = next((c for c in columns if c in row.values), columns[0])
    label = _YES_NO.get(str(row[column]).strip().lower())
    if label is None:
        raise TaskError(f"{row.where}: {column!r} must be true or false (or 0 or 1), got {row[column]!r}")
    return label
