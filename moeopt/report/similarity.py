"""How it is shown and written how alike tasks use the experts: a table, sentences, and a heat map by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from moeopt.errors import MethodError
from moeopt.report.formatting import percent
from moeopt.report.tables import Columns, csv_of, json_text, table, write
from moeopt.results.similarity import Measure, Pair, Similarity
from moeopt.showing import line
from moeopt.statistics import Interval

if TYPE_CHECKING:
    from moeopt.report.figures import style

FORMAT, VERSION = "moeopt-similarity", 1
SUFFIXES = (".html", ".csv", ".json", ".png")
MEASURES: dict[Measure, str] = {
    "picks": "picks shared",
    "kept": "kept shared",
    "rank": "rank correlation",
}
STYLES = {"stands for": "green", "unclear": "yellow", "differs": "red"}


def view(result: Similarity) -> RenderableType:
    """A line a pair and measure, what a plan takes from each task, and what follows."""
    tables = []
    if result.pairs:
        rows = [(pair, measure) for pair in result.pairs for measure in MEASURES]
        pairs = table(
            f"how alike tasks use the experts ({_about(result)})", _columns(), rows, text=("measure", "verdict"),
            section=lambda row: id(row[0]), style=lambda row: STYLES[row[0].verdict],
        )  # fmt: skip
        tables.append(pairs)
    if result.dropped:
        heads: Columns = [
            ("task", lambda name: line(name, 60)),
            ("of its picks [95%]", lambda name: _interval(result.dropped[name].picks)),
            ("of its scores [95%]", lambda name: _interval(result.dropped[name].scores)),
        ]
        tables.append(table("what the plan drops of each task", heads, result.dropped))
    return Group(*tables, *(Text(f"• {line(text, 1000)}") for text in sentences(result)))


def sentences(result: Similarity) -> Iterator[str]:
    """What follows, in words."""
    r = result
    chance = percent(r.keep / r.shape.experts)
    for pair in r.pairs:
        kept = pair.measures["kept"]
        told = (
            f"of the {r.keep} of {r.shape.experts} experts that {r.method} keeps in a layer they share "
            f"{percent(kept.between.mean)}, two halves of one of them {percent(kept.within.mean)}, and chance {chance}"
        )
        if pair.verdict == "stands for":
            yield f"{pair.first} stands for {pair.second}: {told}."
        elif pair.verdict == "differs":
            yield f"{pair.first} does not stand for {pair.second}: {told}; where both count, calibrate by a mixture."
        else:
            yield f"Whether {pair.first} stands for {pair.second} is unclear: {told}; more examples would tell."
    if len(r.dropped) > 1:
        least = next(name for name in r.dropped if name not in r.harms)
        for name, more in sorted(r.harms.items(), key=lambda item: -item[1].mean):
            share = (
                f"{percent(r.dropped[name].scores.mean)} of its scores against {percent(r.dropped[least].scores.mean)}"
            )
            if more.low > 0:
                yield f"The plan takes more of {name} than of {least}: {share}. It will hurt {name} more."
            else:
                yield f"What the plan takes of {name} and of {least} is not told apart: {share}."


def save(result: Similarity, path: Path) -> None:
    """Write a page, a table by layer, all of it, or the figure: by the path's suffix, .html, .csv, .json or .png.

    Raises:
        MethodError: when it is another suffix, or the file cannot be written.
        FigureError: when plotly, or for a picture matplotlib, is not installed.
    """
    check_path(path)
    if path.suffix == ".png":
        from moeopt.report.figures import write_png

        return write_png(figure(result), path)
    texts = {".html": page, ".csv": lambda r: csv_of([*_by_layer(r)]), ".json": lambda r: json_text(record(r)) + "\n"}
    return write({path: texts[path.suffix](result)}, MethodError)


def check_path(path: Path) -> None:
    """Raise MethodError unless `save` knows what to write there."""
    if path.suffix not in SUFFIXES:
        raise MethodError(f"a similarity is written to {', '.join(SUFFIXES)}, got {str(path)!r}")


def record(result: Similarity) -> dict[str, Any]:
    """Everything as JSON."""
    r = result
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": r.shape.describe(),
        "method": r.method,
        "keep": r.keep,
        "tasks": {
            name: {
                "sequences": r.sequences[name],
                "tokens": r.tokens[name],
                "picks": r.picks[name].tolist(),
                "scores": r.scores[name].tolist(),
            }
            for name in r.sequences
        },
        "pairs": [
            {
                "tasks": [pair.first, pair.second],
                "verdict": pair.verdict,
                **{
                    name: {
                        "between": vars(each.between),
                        "within": vars(each.within),
                        "gap": vars(each.gap),
                        "layers": each.layers.tolist(),
                    }
                    for name, each in pair.measures.items()
                },
            }
            for pair in r.pairs
        ],
        "dropped": {
            name: {"picks": vars(each.picks), "scores": vars(each.scores), "layers": each.layers.tolist()}
            for name, each in r.dropped.items()
        },
        "harms": {name: vars(interval) for name, interval in r.harms.items()},
        "sentences": [*sentences(r)],
    }


def figure(result: Similarity) -> style.Figure:
    """Heat maps of all measures: pairs of tasks, and below each halves of one of its tasks, down, and layers across.

    Raises:
        FigureError: when plotly is not installed, or there are no pairs.
    """
    from moeopt.report.figures import task_similarity

    names = [name for pair in result.pairs for name in (f"{pair.first} – {pair.second}", "halves of one")]
    panels = {
        title: [row for pair in result.pairs for row in pair.measures[measure].layers.tolist()]
        for measure, title in MEASURES.items()
    }
    return task_similarity(names, panels, title=f"How alike tasks use the experts: {_about(result)}")


def page(result: Similarity) -> str:
    """Everything as one HTML page that needs nothing else.

    Raises:
        FigureError: when plotly is not installed.
    """
    from moeopt.report.figures import pages

    heads, cells = zip(*_columns())
    rows = [[pages.escape(cell((pair, name))) for cell in cells] for pair in result.pairs for name in MEASURES]
    drawn = {"layers": figure(result)} if result.pairs else {}
    dropped = [
        [pages.escape(name), _interval(each.picks), _interval(each.scores)] for name, each in result.dropped.items()
    ]
    body = [
        f"<header><h1>How alike tasks use the experts</h1><p>{pages.escape(_about(result))}</p></header>",
        pages.section("What follows", pages.bullets(sentences(result)), "conclusions"),
        pages.section("By layer", pages.place("layers", drawn["layers"])) if drawn else "",
        pages.section("Pairs of tasks", pages.table(heads, rows, texts=(0, 1, 5))) if rows else "",
        pages.section(
            "What the plan drops of each task", pages.table(["task", "of its picks", "of its scores"], dropped)
        )
        if dropped
        else "",
    ]
    return pages.page("How alike tasks use the experts", "\n".join(body), drawn)


def _about(result: Similarity) -> str:
    tokens = ", ".join(f"{line(name, 40)} {count:,} tokens" for name, count in result.tokens.items())
    return f"{result.method}, keep {result.keep} of {result.shape.experts}; {tokens}"


def _columns() -> Columns:
    """Of pairs and measures."""

    def cell(name: str) -> Any:
        def told(row: tuple[Pair, Measure]) -> str:
            interval: Interval = getattr(row[0].measures[row[1]], name)
            return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

        return told

    yield "tasks", lambda row: f"{line(row[0].first, 40)} – {line(row[0].second, 40)}" if row[1] == "picks" else ""
    yield "measure", lambda row: MEASURES[row[1]]
    yield "between them [95%]", cell("between")
    yield "halves of one [95%]", cell("within")
    yield "gap [95%]", cell("gap")
    yield "verdict", lambda row: row[0].verdict if row[1] == "kept" else ""


def _interval(interval: Interval) -> str:
    return f"{percent(interval.mean)} [{percent(interval.low)}, {percent(interval.high)}]"


def _by_layer(result: Similarity) -> Iterator[dict[str, Any]]:
    """A line a layer and pair of tasks, and a task from which a plan takes something."""
    for layer in range(result.shape.layers):
        for pair in result.pairs:
            between: dict[str, float] = {name: float(each.layers[0, layer]) for name, each in pair.measures.items()}
            within = {f"{name}_within": float(each.layers[1, layer]) for name, each in pair.measures.items()}
            yield {"layer": layer, "first": pair.first, "second": pair.second, **between, **within}
        for name, each in result.dropped.items():
            picks, scores = each.layers[:, layer].tolist()
            yield {"layer": layer, "first": name, "dropped_picks": picks, "dropped_scores": scores}
