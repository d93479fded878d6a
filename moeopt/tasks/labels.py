"""Labels as data sets write them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from moeopt.errors import TaskError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeopt.tasks.rows import Row

_YES_NO = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_WHOLE = re.compile(r"(\d{1,18})(?:\.0*)?")


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
