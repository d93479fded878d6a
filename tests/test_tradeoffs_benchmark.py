"""The benchmark of trade-offs, on the shipped model: every approach is judged at equal bytes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import tradeoffs


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tradeoffs, "UNIFORM", ("reap",))
    tradeoffs.main(["--small", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "tradeoffs.csv").open(encoding="utf-8")))
    searched = {f"{name}, seed 0" for name in tradeoffs.SEARCHES}
    assert {row["series"] for row in rows} == {"reap", tradeoffs.BUDGETS, *searched}
    assert all(int(row["x"]) <= int(rows[0]["x"]) for row in rows)
    table = (tmp_path / "tradeoffs.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert (tmp_path / "tradeoffs.png").stat().st_size
