"""The comparison as one HTML page that needs nothing else: no script, no font, no file."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from moeopt import __version__
from moeopt.results.optimiser_comparison import plots, style, summary
from moeopt.results.optimiser_comparison.formatting import DASH, count, interval, loss, quantity, short
from moeopt.results.optimiser_comparison.svg import COLOURS, escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moeopt.results.optimiser_comparison.comparison import Comparison, Pair


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is fetched, nothing is run."""


def page(c: Comparison) -> str:
    """The whole page."""
    title = f"Optimisers on {_task(c)}"
    sections = [
        _header(c, title),
        _section("What may be concluded", _conclusions(c), "conclusions"),
        _section(f"At {quantity(c.budget, c.cost)}", _table(c)),
        _figure(plots.final_losses(c), f"One dot a study, a bar the median, a line its band. {summary.about_bands(c)}"),
        _section(f"Best search loss against {plots.LABELS[c.cost]}", ""),
        _figure(plots.best_so_far(c, c.cost), "Median over seeds, up to the budget that every study reached."),
        _figure(
            plots.by_optimiser(c),
            "Thin: every seed; thick: their median, in its band; grey: the medians of the others.",
        ),
        _section("Distribution of run time", ""),
        _figure(plots.run_time(c), _about_run_time(c)),
        *_other_costs(c),
        _pairs(c),
        _studies(c),
        _section("How to read this", _notes(c), "notes"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{style.sheet(len(c.optimisers))}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _task(c: Comparison) -> str:
    return str(c.description["task"].get("name", "a task"))


def _header(c: Comparison, title: str) -> str:
    task, space, model, evaluation = (c.description[part] for part in ("task", "space", "model", "evaluation"))
    shape = space.get("shape") if isinstance(space.get("shape"), dict) else {}
    limit = f", first {task['limit']} examples" if task.get("limit") else ""
    layers = f"{shape.get('layers', '?')} MoE layers of {shape.get('experts', '?')} experts"
    studies = f"{count(len(c.optimisers), 'optimiser')}, {count(len(c.seeds), 'seed')} common to all"
    facts = [
        ("model", f"{model.get('architecture', '?')}, {layers}"),
        ("task", f"{_task(c)}, {task.get('split', '?')} split{limit}"),
        ("space", f"{space.get('kind', '?')}, keep {space.get('keep', '?')}"),
        ("loss", str(evaluation.get("score", "likelihood"))),
        ("studies", f"{len(c.runs)}: {studies}"),
        ("budget", quantity(c.budget, c.cost)),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(text, 90)}</dd></div>" for name, text in facts)
    return f"<header><h1>{escape(title, 90)}</h1><dl>{listed}</dl></header>"


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}</section>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption, 2000)}</figcaption></figure>"


def _conclusions(c: Comparison) -> str:
    return "<ul>" + "".join(f"<li>{escape(text, 4000)}</li>" for text in c.conclusions) + "</ul>"


def _table(c: Comparison) -> str:
    rows = []
    for i, one in enumerate(c.optimisers):
        name, *numbers = map(escape, summary.row(c, one))
        rows.append([f'<span class="key" style="background:var(--c{i % COLOURS})"></span>{name}', *numbers])
    return _html_table(summary.head(c), rows)


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already, names of columns are not."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _about_run_time(c: Comparison) -> str:
    return (
        f"{count(len(c.targets), 'target')} from {loss(float(c.targets[0]))} down to {loss(float(c.targets[-1]))}, the "
        "least loss of any study. A line is the share of (target, seed) pairs reached: higher and earlier is better."
    )


def _other_costs(c: Comparison) -> list[str]:
    others = [cost for cost in c.costs if cost != c.cost]
    found = [_section("Against other costs", "")] if others else []
    for cost in others:
        found.append(
            _figure(
                plots.best_so_far(c, cost, height=320),
                f"Median over seeds against {plots.LABELS[cost]}, up to {quantity(c.common_budget(cost), cost)}.",
            )
        )
    return found


def _pairs(c: Comparison) -> str:
    if not c.pairs:
        return ""
    body = _matrix(c, c.pairs) + _details("All pairs, by search loss", _pair_table(c.pairs))
    if c.held_out_pairs:
        body += _details("All pairs, by test loss", _pair_table(c.held_out_pairs))
    return _section("Pair by pair", body, "pairs")


def _matrix(c: Comparison, pairs: Sequence[Pair]) -> str:
    """Row minus column: mean difference, and the corrected p; a colour only where an order may be concluded."""
    found = {(pair.first, pair.second): pair for pair in pairs}
    rows = []
    for one in c.optimisers:
        cells = [f"<b>{escape(one.name)}</b>"]
        for other in c.optimisers:
            pair, sign = found.get((one.name, other.name)), 1.0
            if pair is None and one is not other:
                pair, sign = found[(other.name, one.name)], -1.0
            cells.append("" if pair is None else _cell(pair, sign, one.name))
        rows.append(cells)
    note = (
        "Mean paired difference of search loss, row − column (below 0 the row is better), wins of the row, and p after "
        "Holm's correction. Shaded where an order may be concluded."
    )
    return (
        _html_table(["", *(one.name for one in c.optimisers)], rows, "matrix")
        + f'<p class="small">{escape(note, 400)}</p>'
    )


def _cell(pair: Pair, sign: float, row: str) -> str:
    wins = int((sign * pair.differences < 0).sum())
    kind = "" if pair.better is None else "won" if pair.better == row else "lost"
    text = f"{loss(sign * pair.mean, sign=True)}<small>{wins}/{len(pair.differences)} · p {pair.corrected:.2g}</small>"
    return f'<span class="cell {kind}">{text}</span>'


def _pair_table(pairs: Sequence[Pair]) -> str:
    rows = []
    for pair in pairs:
        wins = int((pair.differences < 0).sum())
        verdict = DASH if pair.better is None else f"{escape(pair.better)} is better"
        rows.append([
            escape(pair.first), escape(pair.second), str(len(pair.differences)), f"{wins}", loss(pair.mean, sign=True),
            interval(pair.low, pair.high, sign=True), f"{pair.p:.4f}", f"{pair.corrected:.4f}", verdict,
        ])  # fmt: skip
    head = [
        "first",
        "second",
        "seeds",
        "first wins",
        "mean difference",
        "95% interval",
        "p",
        "corrected p",
        "conclusion",
    ]
    return _html_table(head, rows, "pairlist")


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _studies(c: Comparison) -> str:
    rows: list[list[str]] = []
    for one in c.optimisers:
        for run, value in zip(one.runs, one.losses):
            held_out = math.nan if run.held_out is None else run.held_out.loss
            rows.append([
                escape(run.study), escape(one.name), escape(run.seed, 30), *map(str, run.counts.values()),
                *(short(run.spent(cost)) for cost in c.costs), loss(value), loss(float(run.curve[-1])), loss(held_out),
            ])  # fmt: skip
    spent = ["time (s)" if cost == "time" else cost for cost in c.costs]
    losses = ["loss at budget", "loss at end", "test loss"]
    head = ["study", "optimiser", "seed", *c.runs[0].counts, *spent, *losses]
    settings = [[escape(one.name), f"<code>{escape(_settings(one.settings), 4000)}</code>"] for one in c.optimisers]
    return _section(
        "Studies",
        _details(f"All {len(rows)} studies", _html_table(head, rows, "studies"))
        + _details("Settings of the optimisers", _html_table(["optimiser", "settings"], settings, "settings")),
    )


def _settings(settings: Any) -> str:
    return json.dumps(settings, default=str)


def _notes(c: Comparison) -> str:
    listed = "".join(f"<li>{escape(note, 1000)}</li>" for note in summary.notes(c))
    return f"<ul>{listed}</ul><p class=small>moeopt {__version__}</p>"
