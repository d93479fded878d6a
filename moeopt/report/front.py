"""How a front is shown and written: a table, sentences, CSV, JSON, a page, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from moeopt import __version__
from moeopt.errors import ExportError
from moeopt.report.facts import facts
from moeopt.report.formatting import DASH, loss, number, quantity, size
from moeopt.report.tables import Columns, csv_of, json_text, table, write
from moeopt.results.front.making import spread
from moeopt.results.front.result import Front, Point, size_name
from moeopt.showing import line
from moeopt.statistics import Floats

if TYPE_CHECKING:
    from moeopt.report.figures import style

FORMAT, VERSION = "moeopt-front", 1
SUFFIXES = (".html", ".csv", ".json", ".png")
SHOWN = 40
"""Points that are listed where none was judged on dev."""


def view(front: Front) -> RenderableType:
    """The full model, the one-shot plans that no other of them beats, and the front, with what may be said.

    Of a long front those points that were judged are listed, or some that are spread along it.
    """
    points = front.judged or [front.points[i] for i in spread(front.bounds.scaled(front.at), SHOWN)]
    more = len(front.points) - len(points)
    shown = table(
        f"{line(front.study)}: {' and '.join(line(name, 40) for name in front.objectives)}",
        columns(front),
        [*([] if front.full is None else [front.full]), *front.best_one_shot, *points],
        caption=f"and {more:,} more points" if more else None,
        section=lambda point: point.kind,
        style=lambda point: "bold" if point in front.on_dev else "dim" if point.broken else "",
        text=("",),
    )
    said = (Text(f"• {line(text, 1000)}") for text in front.sentences)
    return Group(shown, *said, *(Text(line(f"Left out: {why}", 400), style="yellow") for why in front.left_out))


def columns(front: Front) -> Columns:
    """What is told of a point: its objectives on search and on dev, the difference to the full model, remarks."""

    def cell(split: str, name: str) -> Callable[[Point], str]:
        return lambda point: told(name, getattr(point, split).get(name))

    def remark(point: Point) -> str:
        if point.broken:
            return f"breaks {', '.join(line(name, 60) for name in point.broken)}"
        beaten = front.beaten.get(point.name)
        return f"beaten by {beaten[0]}" if beaten else "on the front" if point in front.on_dev else ""

    yield "plan", lambda point: line(point.name, 60)
    of_scores = [name for name in front.objectives if name != size_name(front.objectives)]
    for name in front.objectives:
        if name not in of_scores:
            yield line(name, 40), cell("numbers", name)
    for split in ("search", *(() if front.examples is None else ("dev",))):
        yield from ((f"{split} {line(name, 40)}", cell(split, name)) for name in of_scores)
    if front.examples is not None:
        yield "dev loss − full [95%]", lambda p: DASH if p.against_full is None else str(p.against_full)
    guards = dict.fromkeys(each.name for point in front.everything for each in point.guards)
    yield from ((f"guard {line(name, 40)} − full [95%]", partial(_guarded, name)) for name in guards)
    yield "", remark


def _guarded(name: str, point: Point) -> str:
    return next((str(each.change) for each in point.guards if each.name == name), DASH)


def told(name: str, value: float | None) -> str:
    """A number of an objective, as it is written."""
    if value is None:
        return DASH
    return size(value) if name == "bytes" else number(value, 2) if name == "active" else loss(value)


def save(front: Front, path: Path) -> None:
    """Write a page, a table, all of it, or a picture: by the path's suffix, .html, .csv, .json or .png.

    Raises:
        ExportError: when it is another suffix, or the file cannot be written.
        FigureError: when plotly, or for a picture matplotlib, is not installed.
    """
    check_path(path)
    if path.suffix == ".png":
        from moeopt.report.figures import write_png

        return write_png(figure(front), path, width=900, height=560)
    texts = {
        ".html": page,
        ".csv": lambda f: csv_of(record(f)["points"]),
        ".json": lambda f: json_text(record(f)) + "\n",
    }
    return write({path: texts[path.suffix](front)}, ExportError)


def check_path(path: Path) -> None:
    """Raise ExportError unless a front can be written there."""
    if path.suffix not in SUFFIXES:
        raise ExportError(f"a front is written to a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {str(path.parent)!r}")


def record(front: Front) -> dict[str, Any]:
    """All numbers as JSON; what is unknown or infinite is null."""
    f = front
    model = {key: value for key, value in f.description["model"].items() if key != "name_or_path"}
    return {
        "format": FORMAT, "version": VERSION, "moeopt": __version__, "study": f.study,
        "description": {**f.description, "model": model}, "objectives": list(f.objectives),
        "dev_examples": f.examples, "sentences": f.sentences, "left_out": list(f.left_out),
        "points": [_point(f, point) for point in f.everything],
        "hypervolume": {
            "cost": f.cost, "spent": f.costs.tolist(), "value": f.hypervolume.tolist(),
            "ideal": list(f.bounds.ideal), "reference": list(f.bounds.reference),
        },
    }  # fmt: skip


def _point(front: Front, point: Point) -> dict[str, Any]:
    gap = point.against_full
    return {
        "name": point.name, "kind": point.kind, "trial": point.trial,
        "plan": None if point.plan is None else point.plan.fingerprint,
        "search": {name: point.search.get(name) for name in front.objectives},
        "dev": {name: point.dev.get(name) for name in front.objectives},
        "dev_loss_minus_full": {part: getattr(gap, part, None) for part in ("mean", "low", "high")},
        "on_front": point in front.on_dev, "beaten_by": front.beaten.get(point.name, []), "breaks": point.broken,
        "constraints": dict(point.constraints), "guards": {each.name: each.record for each in point.guards},
        "health": None if point.health is None else dict(point.health),
    }  # fmt: skip


def figure(front: Front, title: str = "") -> style.Figure:
    """Points by their size and the first other objective, on dev where they were judged there.

    Raises:
        FigureError: when plotly is not installed.
    """
    from moeopt.report import figures

    across, up = axes(front)
    unit, scale = _unit(across, [point.numbers.get(across, np.nan) for point in front.everything])
    rows = []
    for point in (p for p in [*front.one_shot, *front.points] if across in p.numbers and up in p.numbers):
        if front.examples is not None and not point.dev:
            continue
        gap = point.against_full if up == "loss" else None
        value = point.numbers[up]
        ends = {} if gap is None else {"low": value + gap.low - gap.mean, "high": value + gap.high - gap.mean}
        series = "search" if point.kind == "search" else point.name.partition(",")[0]
        rows.append(
            {"name": point.name, "series": series, "x": point.numbers[across] / scale, "y": value, **ends}
        )  # fmt: skip
    split = "search" if front.examples is None else f"dev, {front.examples:,} examples"
    return figures.front(
        rows, reference=None if front.full is None else front.full.numbers.get(up), x=f"{across}{unit}",
        y=f"{up} on {split}", title=title or f"Front of {line(front.study, 60)}",
    )  # fmt: skip


def axes(front: Front) -> tuple[str, str]:
    """The objectives that a picture shows: what says how small a plan is, and the first other."""
    across = size_name(front.objectives) or front.objectives[-1]
    return across, next((name for name in front.objectives if name != across), across)


def growth(front: Front) -> style.Figure:
    """The hypervolume of the front so far, against what had been spent."""
    from moeopt.report.figures import style

    there = np.isfinite(front.hypervolume)
    spent, grown = front.costs[there], front.hypervolume[there]
    margin = {"l": 66, "r": 28, "t": 20, "b": 50}
    figure = style.dressed(style.plotly().Figure(layout={"height": 330, "showlegend": False, "margin": margin}))
    hover = "%{x:.4s}: %{y:.4f}"
    style.line_of_bests(figure, spent, grown, float(front.costs[-1]), hover, style.CATEGORICAL[0], 2.2)
    x = {"title": {"text": front.cost}, "exponentformat": "B", "rangemode": "tozero"}
    style.panel(figure, 0, 1, None, x=x, y={"title": {"text": "hypervolume"}, "range": [0, 1.02]})
    return figure


def page(front: Front) -> str:
    """Everything as one HTML page that needs nothing else.

    Raises:
        FigureError: when plotly is not installed.
    """
    from moeopt.report.figures import pages

    drawn = {"front": figure(front, "What is left at which size"), "growth": growth(front)}
    heads, cells = zip(*columns(front))
    rows = [[pages.escape(cell(point)) for cell in cells] for point in front.everything]
    title = f"Front of {line(front.study, 80)}"
    described = facts(record(front)["description"])
    about = "".join(f"<div><dt>{key}</dt><dd>{pages.escape(text, 150)}</dd></div>" for key, text in described)
    body = [
        f"<header><h1>{pages.escape(title, 90)}</h1><dl>{about}</dl></header>",
        pages.section("What may be said", pages.bullets(front.sentences), "conclusions"),
        pages.section("The front", pages.place("front", drawn["front"], caption(front))),
        pages.section(f"Hypervolume against {front.cost}", pages.place("growth", drawn["growth"], bounds(front))),
        pages.section("All plans", pages.table(heads, rows, texts=(0, len(heads) - 1))),
        pages.section("Left out", pages.bullets(front.left_out)) if front.left_out else "",
        f'<p class="small">moeopt {__version__}; {quantity(float(front.costs[-1]), front.cost)} were spent.</p>',
    ]
    return pages.page(title, "\n".join(body), drawn)


def caption(front: Front) -> str:
    """What the marks and bars of the picture are."""
    if front.examples is None:
        return "On the examples that were searched, where every plan looks better than it is."
    bars = " Bars: 95% intervals of the paired difference to the full model." if axes(front)[1] == "loss" else ""
    return f"On {front.examples:,} dev examples, which no plan was chosen on.{bars}"


def bounds(front: Front) -> str:
    """What the hypervolume is a share of."""
    from moeopt.trials.objectives import direction

    signs = [-1.0 if direction(name) == "maximize" else 1.0 for name in front.objectives]
    ends = [
        f"{line(name, 40)} from {told(name, sign * best)} to {told(name, sign * worst)}"
        for name, sign, best, worst in zip(front.objectives, signs, front.bounds.ideal, front.bounds.reference)
    ]
    return (
        f"Of the trials so far, on search: the share that they beat of the box {' and '.join(ends)}, which reaches a "
        "tenth of the front's range beyond its worst values."
    )


def _unit(name: str, values: Sequence[float] | Floats) -> tuple[str, float]:
    """What the size's axis says after its name, and what its numbers are divided by."""
    if name != "bytes":
        return "", 1.0
    most = float(np.nanmax(values))
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= s), ("B", 1.0))
    return f" ({unit})", scale
