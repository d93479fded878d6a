"""What is written and shown: files, the page, the terminal; and that a hostile study does no harm there."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from rich.console import Console

from moeopt.cli import main
from moeopt.errors import ExportError
from moeopt.results.optimiser_comparison import Comparison, compare, view
from moeopt.results.optimiser_comparison.svg import Axis, spread

Make = Callable[..., Any]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e" + "x" * 300
VOID = {"meta", "link"}


class Page(HTMLParser):
    """Tags, text and attributes; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(c: Comparison) -> Page:
    """Well formed, nothing that runs or is fetched, and every number of every figure is one."""
    page = Page(c.page)
    assert not {"script", "iframe", "object", "img", "base", "form"} & set(page.tags)
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "link", "style", "body", "main", "header", "h1", "h2", "dl", "div", "dt", "dd",
        "section", "ul", "li", "figure", "figcaption", "svg", "path", "text", "circle", "table", "thead", "tbody", "tr",
        "th", "td", "span", "small", "b", "p", "details", "summary", "code",
    }  # fmt: skip
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name != "src"
        if name in ("d", "cx", "cy", "x", "y", "r", "viewbox"):
            assert re.fullmatch(r"[MLHVZv\d\s.\-]*", value), (name, value)
    assert "http" not in c.page.replace("http-equiv", "")
    return page


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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cost", ["layer-tokens", "time", "trials"])
def test_everything_that_can_be_compared_can_be_shown(
    case: str, cost: Any, make: Make, grid: Make, trial: Make, tmp_path: Path
) -> None:
    found = compare(CASES[case](make, grid, trial), cost=cost)
    page = check_page(found)
    found.save(tmp_path)
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert not re.search(r"\b(nan|inf|infinity|None)\b", " ".join(page.text))
    console = Console(width=120, record=True, file=(tmp_path / "terminal").open("w"))
    console.print(view(found))
    shown = console.export_text()
    assert all(one.name in shown for one in found.optimisers)


def test_names_do_no_harm(make: Make, tmp_path: Path) -> None:
    change = {"task.name": HOSTILE, "model.architecture": HOSTILE, "evaluation.score": HOSTILE, "space.kind": HOSTILE}
    studies = [
        make(HOSTILE[: 300 + i], [0.5, 0.4], HOSTILE, seed, change=change, options={HOSTILE: HOSTILE[:60] + option})
        for i, (seed, option) in enumerate([(0, "a"), (1, "a"), (0, "b"), (1, "b")])
    ]
    found = compare([*studies, make(HOSTILE + "empty", [], "tpe", change=change)])
    page = check_page(found)
    assert any("<script>alert(1)</script>" in text for text in page.text)
    console = Console(width=120, record=True, file=(tmp_path / "terminal").open("w"))
    console.print(view(found))
    for shown in (found.page, console.export_text()):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    found.save(tmp_path)
    with (tmp_path / "studies.csv").open(newline="") as file:
        assert [row["study"] for row in csv.DictReader(file)] == [run.study for run in found.runs]


def test_files_hold_the_numbers(grid: Make, tmp_path: Path) -> None:
    found = compare(grid({"a": 1.0, "b": 0.3, "c": 2.0}, 4), target=0.2)
    found.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    record = json.loads((folder / "comparison.json").read_text())
    assert record == json.loads(json.dumps(found.record))
    assert record["conclusions"] == found.conclusions
    for name in ("optimisers", "studies"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [{k: None if v == "" else v for k, v in row.items()} for row in rows] == [
            {k: None if v is None else str(v) for k, v in row.items()} for row in record[name]
        ]
    with (folder / "studies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for one in found.optimisers:
        own = [row for row in rows if row["optimiser"] == one.name]
        np.testing.assert_array_equal([float(row["loss_at_budget"]) for row in own], one.losses)
        np.testing.assert_array_equal([float(row["to_target"] or "inf") for row in own], one.times)


def test_a_folder_that_cannot_be_written_is_one_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write to"):
        compare([make("a", [0.5])]).save(tmp_path / "file")


def test_the_command_takes_names_prefixes_and_several_storages(
    grid: Make, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    capsys.readouterr()
    for arguments, message in (
        ([], "name the studies to compare, or give --study-prefix"),
        (["b-9"], "no study 'b-9'"),
        (["--study-prefix", "zz"], "no study in"),
    ):
        assert main(["compare", *arguments, *stored]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert main(["compare", "a", "--storage", f"sqlite:///{tmp_path}/none.db"]) == 2


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (0, 690_242, False), (-3, 2, False), (0.0204, 1.6, True), (0.3, 0.9, True), (1e-9, 1e12, True)],
)
def test_ticks_are_few_round_and_within(low: float, high: float, log: bool) -> None:
    axis = Axis(low, high, 0, 100, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= axis.most + 1
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.2g}") == tick for tick in ticks)
    places = [float(axis(tick)) for tick in ticks]
    assert places == sorted(places)
    assert 0 <= places[0] < places[-1] <= 100


def test_labels_are_moved_apart_and_stay_near() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = sorted(rng.uniform(0, 300, size=rng.integers(1, 12)))
        found = spread(wanted, 16, 0, 300)
        assert all(b - a >= 16 - 1e-9 for a, b in pairwise(found))
        assert -1e-9 <= found[0] <= found[-1] <= 300 + 1e-9
        if all(b - a >= 16 for a, b in pairwise(wanted)):
            np.testing.assert_allclose(found, wanted)
