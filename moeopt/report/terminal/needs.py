"""What a search will need, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.table import Table

from moeopt.report.tables import table

if TYPE_CHECKING:
    from moeopt.study.needs import Needs


def needs_table(needs: Needs) -> Table:
    """A line for each thing that takes room, with what is free where below."""
    free = ", ".join(f"{decimal(size)} of {where}" for where, size in sorted(needs.free.items()))
    columns = [
        ("the search needs, about", lambda row: row.what),
        ("of", lambda row: row.where),
        ("at most", lambda row: decimal(row.bytes)),
        ("", lambda row: row.how),
    ]
    return table(None, columns, needs.rows, caption=f"free: {free}", text=("of", ""))
