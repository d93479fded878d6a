"""The comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeopt import __version__
from moeopt.report.facts import facts
from moeopt.report.figures import pages
from moeopt.report.figures.pages import bullets, details, escape, place, section
from moeopt.report.formatting import DASH, count, loss, quantity, short
from moeopt.report.optimiser_comparison import figures, table
from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.report.optimiser_comparison.record import pair_rows, study_rows
from moeopt.results.optimiser_comparison import OptimiserComparison, Pair


def page(c: OptimiserComparison) -> str:
    """The whole page.

    Raises:
        FigureError: when plotly is not installed.
    """
    others = [cost for cost in c.costs if cost != c.cost]
    drawn = {
        "final": figures.final_losses(c),
        "best": figures.best_so_far(c, c.cost),
        "each": figures.by_optimiser(c),
        "runtime": figures.run_time(c),
        **{f"best-{cost}": figures.best_so_far(c, cost, height=330) for cost in others},
    }
    captions = {
        "final": f"One dot a study, a bar the median, a line its band. {table.about_bands(c)}",
        "best": "Median over seeds, up to the budget that every study reached.",
        "each": "Thin: every seed; thick: their median, in its band; grey: the medians of the others.",
        "runtime": f"{count(len(c.targets), 'target')} from {loss(float(c.targets[0]))} down to "
        f"{loss(float(c.targets[-1]))}, the least of any study. A line is the share of (target, seed) pairs "
        "reached: higher and earlier is better.",
        **{
            f"best-{cost}": f"Median over seeds against {figures.LABELS[cost]}, up to "
            f"{quantity(c.common_budget(cost), cost)}."
            for cost in others
        },
    }
    at = {name: place(name, figure, captions[name], wide=name == "each") for name, figure in drawn.items()}
    title = f"Optimisers on {c.description['task'].get('name', 'a task')}"
    body = [
        _header(c, title),
        section("What may be concluded", bullets(conclusions(c)), "conclusions"),
        section(f"At {quantity(c.budget, c.cost)}", _summary(c) + at["final"]),
        section(f"Best {c.measure} against {figures.LABELS[c.cost]}", at["best"] + at["each"]),
        section("Distribution of run time", at["runtime"]),
        section("Against other costs", "".join(at[f"best-{cost}"] for cost in others)) if others else "",
        _pairs(c) if c.pairs else "",
        _studies(c),
        section("How to read this", bullets(table.notes(c)) + f'<p class="small">moeopt {__version__}</p>', "notes"),
    ]
    return pages.page(title, "\n".join(body), drawn)


def _header(c: OptimiserComparison, title: str) -> str:
    model = {key: value for key, value in c.description["model"].items() if key != "name_or_path"}
    studies = f"{count(len(c.optimisers), 'optimiser')}, {count(len(c.seeds), 'seed')} common to all"
    told = [
        *facts({**c.description, "model": model}),
        ("studies", f"{len(c.runs)}: {studies}"),
        ("budget", quantity(c.budget, c.cost)),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{escape(text, 150)}</dd></div>" for name, text in told)
    return f"<header><h1>{escape(title, 90)}</h1><dl>{shown}</dl></header>"


def _summary(c: OptimiserComparison) -> str:
    heads, cells = zip(*table.columns(c))
    rows = [[escape(cell(optimiser)) for cell in cells] for optimiser in c.optimisers]
    for i, row in enumerate(rows):
        row[0] = f'<span class="key" style="background:{figures.colour(i)}"></span>{row[0]}'
    return pages.table(heads, rows)


def _pairs(c: OptimiserComparison) -> str:
    """Row minus column: mean difference, and the corrected p; a colour only where an order may be concluded."""
    pairs = {(pair.first, pair.second): (pair, 1.0) for pair in c.pairs}
    pairs |= {(pair.second, pair.first): (pair, -1.0) for pair in c.pairs}
    names = [optimiser.name for optimiser in c.optimisers]
    matrix = [
        [f"<b>{escape(row)}</b>", *("" if row == column else _cell(*pairs[row, column], row) for column in names)]
        for row in names
    ]
    note = (
        f"Mean paired difference of {c.measure}, row − column (below 0 the row is better), wins of the row, and p "
        "after Holm's correction. Shaded where an order may be concluded."
    )
    body = pages.table(["", *names], matrix, kind="matrix") + f'<p class="small">{note}</p>'
    body += details(f"All pairs, by {c.measure}", _rows(pair_rows(c.pairs), texts=(0, 1, 10)))
    if c.held_out_pairs:
        body += details("All pairs, by test loss", _rows(pair_rows(c.held_out_pairs), texts=(0, 1, 10)))
    return section("Pair by pair", body)


def _cell(pair: Pair, sign: float, row: str) -> str:
    wins = int((sign * pair.differences < 0).sum())
    kind = "" if pair.better is None else "won" if pair.better == row else "lost"
    text = f"{loss(sign * pair.mean, sign=True)}<small>{wins}/{len(pair.differences)} · p {pair.corrected:.2g}</small>"
    return f'<span class="cell {kind}">{text}</span>'


def _studies(c: OptimiserComparison) -> str:
    settings = [
        [escape(optimiser.name), f"<code>{escape(json.dumps(optimiser.settings, default=str), 4000)}</code>"]
        for optimiser in c.optimisers
    ]
    return section(
        "Studies",
        details(f"All {len(c.runs)} studies", _rows(study_rows(c), texts=(0, 1)))
        + details("Settings of the optimisers", pages.table(["optimiser", "settings"], settings, texts=(0, 1))),
    )


def _rows(rows: Sequence[Mapping[str, Any]], texts: Sequence[int]) -> str:
    """Records as a table: their keys for names of columns."""

    def shown(value: Any) -> str:
        if value is None:
            return DASH
        if isinstance(value, float):
            return loss(value) if abs(value) < 100 else short(value)
        return escape(str(value))

    return pages.table(
        [key.replace("_", " ") for key in rows[0]], [[*map(shown, row.values())] for row in rows], texts=texts
    )
