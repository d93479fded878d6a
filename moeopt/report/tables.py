"""The one way to a table and to files: columns make a rich table, records make JSON and, flattened, CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moeopt.errors import MoeoptError
from moeopt.files import csv_text, write_atomically

Columns = Iterable[tuple[str, Callable[[Any], str]]]
"""Each column's head, and the cell that it makes of a row."""


def table(
    title: str | None,
    columns: Columns,
    rows: Iterable[Any],
    *,
    caption: str | None = None,
    text: Collection[str] = (),
    section: Callable[[Any], object] = lambda row: None,
    style: Callable[[Any], str] = lambda row: "",
    padding: tuple[int, int] = (0, 1),
) -> Table:
    """A table with a line a row; its first column is text, others are numbers, never wrapped. No markup is read.

    Args:
        title, caption: what stands above and below it.
        columns: what it shows of a row. Cells that are text of others go through `moeopt.showing.line`.
        rows: what it shows.
        text: heads of further columns that are text.
        section: a line is drawn where this changes from a row to the next.
        style: of the row.
        padding: of cells, as rich takes it.
    """
    columns = list(columns)
    shown = Table(
        title=title and Text(title, style="bold"), caption=caption and Text(caption), title_justify="left",
        caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=padding,
    )  # fmt: skip
    for i, (head, _) in enumerate(columns):
        words = i == 0 or head in text
        shown.add_column(Text(head), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for part, (_, members) in enumerate(groupby(rows, key=section)):
        if part:
            shown.add_section()
        for row in members:
            shown.add_row(*(Text(cell(row)) for _, cell in columns), style=style(row))
    return shown


def finite(record: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have; tuples become lists."""
    if isinstance(record, Mapping):
        return {key: finite(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def json_text(record: Any) -> str:
    """A `finite` record as JSON of ASCII characters."""
    return json.dumps(finite(record), indent=2, allow_nan=False)


def csv_of(records: Sequence[Mapping[str, Any]], *, lifted: Collection[str] = ()) -> str:
    """`finite` records as CSV: an object within one becomes columns of its own, lists are left out.

    Args:
        records: a line each.
        lifted: keys of objects whose columns do not begin with the key.
    """
    flat = [_flat(record, lifted) for record in finite(records)]
    columns = dict.fromkeys(name for record in flat for name in record)
    grouped = {name for name in columns if any(other.startswith(f"{name}_") for other in columns)}
    empty = {name for name in grouped if all(record.get(name) is None for record in flat)}
    return csv_text(
        ({name: value for name, value in record.items() if name not in empty} for record in flat),
        [name for name in columns if name not in empty],
    )


def _flat(record: Mapping[str, Any], lifted: Collection[str] = ()) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            prefix = "" if name in lifted else f"{name}_"
            flat |= {f"{prefix}{part}": inner for part, inner in _flat(value).items()}
        elif not isinstance(value, (list, tuple)):
            flat[name] = value
    return flat


def write(files: Mapping[Path, str], error: type[MoeoptError], *, folder: Path | None = None) -> None:
    """Write files, each whole or not at all, into a folder that is made if need be.

    Raises:
        MoeoptError: `error`, naming the place that cannot be written.
    """
    path = folder
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as reason:
        raise error(f"cannot write {str(path)!r}: {reason.strerror or reason}") from None
