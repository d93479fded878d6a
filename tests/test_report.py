"""The pieces that every report is made of."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from moeopt import report
from moeopt.errors import StudyError
from moeopt.report.tables import csv_of, json_text, table, write


def test_records_become_lines_and_their_objects_columns() -> None:
    records = [
        {"name": "a, b", "gap": None, "scores": {"dev": {"loss": 0.5}}, "list": [1, 2]},
        {"name": "c", "gap": {"mean": 1.0, "low": 0.5}, "scores": {"dev": {"loss": 0.25}}},
    ]
    assert list(csv.DictReader(io.StringIO(csv_of(records, lifted=("scores",))))) == [
        {"name": "a, b", "dev_loss": "0.5", "gap_mean": "", "gap_low": ""},
        {"name": "c", "dev_loss": "0.25", "gap_mean": "1.0", "gap_low": "0.5"},
    ]


def test_json_has_no_number_that_json_has_not() -> None:
    assert json.loads(json_text({"a": [math.nan, (math.inf, 1.5)], "é": "é"})) == {"a": [None, [None, 1.5]], "é": "é"}


def test_sections_and_styles_follow_the_rows() -> None:
    rows = [("a", 1), ("b", 1), ("c", 2)]
    shown = table(
        "t", [("", lambda row: row[0]), ("n", lambda row: str(row[1]))], rows,
        section=lambda row: row[1], style=lambda row: "bold" if row[0] == "b" else "",
    )  # fmt: skip
    assert [(row.style, row.end_section) for row in shown.rows] == [("", False), ("bold", True), ("", False)]
    console = Console(width=40, file=io.StringIO())
    console.print(shown)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split() for line in text.splitlines() if line.strip()[:1] in tuple("abc")] == [
        ["a", "1"], ["b", "1"], ["c", "2"],
    ]  # fmt: skip


def test_what_cannot_be_written_or_is_no_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cannot write .*no.a\.json"):
        write({tmp_path / "no" / "a.json": "{}"}, StudyError)
    with pytest.raises(TypeError, match="dict"):
        report.view({})
