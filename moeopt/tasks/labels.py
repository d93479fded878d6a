"""Labels as data sets write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.errors import TaskError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeopt.tasks.rows import Row

_YES_NO = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def has_label(row: Row, *columns: str) -> bool:
    """Whether one of the columns holds a label; unlabelled rows lack it, or say null, -1, "" or []."""
    return any(row.values.get(column) not in (None, -1, "-1", "", []) for column in columns)


def yes_no(row: Row, *columns: str) -> bool:
    """The label in the first of the columns that the row has: a bool, 0 or 1, or "true" or "false" as text."""
    column = next((c for c in columns if c in row.values), columns[0])
    label = _YES_NO.get(str(row[column]).strip().lower())
    if label is None:
        raise TaskError(f"{row.where}: {column!r} must be true or false (or 0 or 1), got {row[column]!r}")
    return label


def which(row: Row, column: str, names: Sequence[str], *, index: bool = True) -> int:
    """The position in `names` of the label in a column: one of the names or, if `index`, its index from 0."""
    text = str(row[column]).strip()
    if text in names:
        return names.index(text)
    if index and text.isdecimal() and int(text) < len(names):
        return int(text)
    other = f" (or an index below {len(names)})" if index else ""
    raise TaskError(f"{row.where}: {column!r} must be {' or '.join(names)}{other}, got {row[column]!r}")
