"""What is written and shown: files, the page, the terminal; and that a hostile study does no harm there."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from optuna.trial import TrialState
from rich.console import Console

from moeopt.cli import main
from moeopt.errors import ExportError
from moeopt.report.optimiser_comparison import conclusions, page, record, save, view
from moeopt.results.optimiser_comparison import OptimiserComparison, compare

Make = Callable[..., Any]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e" + "x" * 300
SCRIPT = re.compile(r"<script(?: [^>]*)?>(.*?)</script>", re.DOTALL)


def check_page(c: OptimiserComparison) -> list[str]:
    """The texts of a page that is well formed, fetches nothing, and in which nothing runs that its policy does not name
    by its hash."""
    html = page(c)
    main = ElementTree.fromstring(html[html.index("<main>") : html.index("</main>")] + "</main>")
    for element in main.iter():
        assert element.tag not in ("script", "iframe", "object", "img", "base", "form", "link")
        assert not [name for name in element.attrib if name.startswith("on") or name == "src"]
    figures, *scripts = SCRIPT.findall(html)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src "
    assert policy + " ".join(f"'sha256-{value}'" for value in hashes) in html
    assert len(scripts) == 2
    json.loads(figures, parse_constant=lambda name: pytest.fail(name))
    assert "<" not in figures
    return [*main.itertext(), figures]


def mixed(make: Make, trial: Make) -> list[Any]:
    """Two optimisers with odd trials and odd losses."""
    fail, pruned = TrialState.FAIL, TrialState.PRUNED
    return [
        make("failed-first", [trial(state=fail, layer_tokens=5), trial(0.5, start=1, layer_tokens=10)], "eep", 0),
        make("pruned", [trial(0.1, state=pruned, layer_tokens=5), trial(-0.5, start=1, layer_tokens=10)], "eep", 1),
        make("endless", [trial(math.inf, layer_tokens=10), trial(0.7, start=1, layer_tokens=9)], "tpe", 0),
        make("never", [trial(state=fail, start=i, layer_tokens=30) for i in range(3)], "tpe", 1),
    ]


CASES: dict[str, Callable[[Make, Make, Make], list[Any]]] = {
    "a single study": lambda make, grid, trial: [make("a", [0.5, 0.4])],
    "a single trial": lambda make, grid, trial: [make("a", [0.5])],
    "a single seed": lambda make, grid, trial: grid({"a": 1.0, "b": 2.0, "c": 0.1}, 1),
    "equal losses": lambda make, grid, trial: [make(f"{s}{i}", [0.5, 0.5], s, i) for s in "ab" for i in range(3)],
    "losses of both signs": lambda make, grid, trial: [make("a", [2.0, -1.0]), make("b", [3.0, 0.0], "tpe")],
    "great losses": lambda make, grid, trial: [make("a", [1e12, 1e-9]), make("b", [1e308, 1e300], "tpe")],
    "failed, pruned and infinite": lambda make, grid, trial: mixed(make, trial),
    "many optimisers": lambda make, grid, trial: grid({f"o{i}": 1.0 + i for i in range(19)}, 2),
    "many seeds": lambda make, grid, trial: grid({"a": 1.0, "b": 2.0}, 20, trials=3),
    "no cost at all": lambda make, grid, trial: [make("a", [trial(0.5, layer_tokens=0), trial(0.4, layer_tokens=0)])],
}


@pytest.mark.parametrize(
    ("case", "cost"),
    [
        *((case, "layer-tokens") for case in CASES),
        *((case, cost) for case in ("failed, pruned and infinite", "no cost at all") for cost in ("time", "trials")),
    ],
)
def test_everything_that_can_be_compared_can_be_shown(
    case: str, cost: Any, make: Make, grid: Make, trial: Make, tmp_path: Path
) -> None:
    comparison = compare(CASES[case](make, grid, trial), cost=cost)
    *texts, _ = check_page(comparison)
    save(comparison, tmp_path)
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert not re.search(r"\b(nan|inf|infinity|None)\b", " ".join(texts))
    shown = printed(comparison)
    assert all(optimiser.name in shown for optimiser in comparison.optimisers)


def printed(comparison: OptimiserComparison) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(view(comparison))
    return console.export_text()


def test_names_do_no_harm(make: Make, tmp_path: Path) -> None:
    change = {"task.name": HOSTILE, "model.architecture": HOSTILE, "evaluation.score": HOSTILE, "space.kind": HOSTILE}
    studies = [
        make(HOSTILE[: 300 + i], [0.5, 0.4], HOSTILE, seed, change=change, options={HOSTILE: HOSTILE[:60] + option})
        for i, (seed, option) in enumerate([(0, "a"), (1, "a"), (0, "b"), (1, "b")])
    ]
    comparison = compare([*studies, make(HOSTILE + "empty", [], "tpe", change=change)])
    texts = check_page(comparison)
    assert any("<script>alert(1)</script>" in text for text in texts)
    for shown in (*texts, printed(comparison)):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    save(comparison, tmp_path)
    with (tmp_path / "studies.csv").open(newline="") as file:
        assert [row["study"] for row in csv.DictReader(file)] == [run.study for run in comparison.runs]


def test_files_hold_the_numbers(grid: Make, tmp_path: Path) -> None:
    comparison = compare(grid({"a": 1.0, "b": 0.3, "c": 2.0}, 4), target=0.2)
    folder = tmp_path / "new" / "folder"
    assert save(comparison, folder) == folder / "index.html"
    numbers = json.loads((folder / "comparison.json").read_text())
    assert numbers == json.loads(json.dumps(record(comparison)))
    assert numbers["conclusions"] == conclusions(comparison)
    for name in ("optimisers", "studies"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [{k: None if v == "" else v for k, v in row.items()} for row in rows] == [
            {k: None if v is None else str(v) for k, v in row.items()} for row in numbers[name]
        ]
    with (folder / "studies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for optimiser in comparison.optimisers:
        mine = [row for row in rows if row["optimiser"] == optimiser.name]
        np.testing.assert_array_equal([float(row["loss_at_budget"]) for row in mine], optimiser.losses)
        np.testing.assert_array_equal([float(row["to_target"] or "inf") for row in mine], optimiser.times)


def test_without_plotly_all_but_the_page_is_written(make: Make, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("moeopt.report.optimiser_comparison.find_spec", lambda name: None)
    assert save(compare([make("a", [0.5])]), tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"optimisers.csv", "studies.csv", "comparison.json"}


def test_a_folder_that_cannot_be_written_is_one_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        save(compare([make("a", [0.5])]), tmp_path / "file")


def test_the_command_takes_names_prefixes_and_several_storages(
    grid: Make, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Make
) -> None:
    first, second = (f"sqlite:///{tmp_path / name}.db" for name in ("first", "second"))
    grid({"a": 1.0, "b": 0.3}, 2, trials=3, storage=first)
    make("other", [0.5], "tpe", storage=second)
    out = tmp_path / "out"
    stored = ["--storage", first, "--storage", second, "--out", str(out)]
    assert main(["compare", "other", "--study-prefix", "b-", *stored]) == 0
    shown = capsys.readouterr().out
    assert "tpe" in shown
    assert "No order" in shown
    assert {row["study"] for row in json.loads((out / "comparison.json").read_text())["studies"]} == {
        "other", "b-0", "b-1"
    }  # fmt: skip
    assert main(["compare", "a-0", "a-0", "b-0", *stored, "--cost", "time", "--target", "0.4"]) == 0
    assert json.loads((out / "comparison.json").read_text())["target"] == 0.4
    for arguments, message in (
        ([], "name the studies to compare, or give --study-prefix"),
        (["b-9"], "no study 'b-9'"),
        (["--study-prefix", "zz"], "no study in"),
    ):
        assert message in refused(["compare", *arguments, *stored])
    refused(["compare", "a", "--storage", f"sqlite:///{tmp_path}/none.db"])
