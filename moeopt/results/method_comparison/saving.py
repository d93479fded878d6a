"""A comparison as files: table.csv, table.json, plans, and figures where something can draw them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.files import csv_text, write_atomically
from moeopt.results.method_comparison.checks import ComparisonError
from moeopt.results.method_comparison.ledger import PLANS

if TYPE_CHECKING:
    from moeopt.evaluation import Interval
    from moeopt.results.method_comparison.comparison import Comparison, Row

FORMAT, VERSION = "moeopt-comparison-table", 1


def save(comparison: Comparison, folder: Path) -> None:
    """See `Comparison.save`."""
    try:
        (folder / PLANS).mkdir(parents=True, exist_ok=True)
        for row in comparison.rows:
            if row.plan is None or row.file is None:
                continue
            if not (row.refitted and (folder / PLANS / row.file).is_file()):  # the ledger's says what was fitted
                row.plan.save(folder / PLANS / row.file)
        write_atomically(folder / "table.csv", _csv(comparison).encode())
        write_atomically(folder / "table.json", (json.dumps(record(comparison), indent=2) + "\n").encode())
        _draw(comparison, folder)
    except OSError as error:
        raise ComparisonError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None


def record(comparison: Comparison) -> dict[str, Any]:
    """Everything as JSON: no path, no time, so that the same comparison gives the same bytes."""
    c = comparison
    pairs = dict.fromkeys((row.keep, row.k) for row in c.rows if row.kind == "method")
    best = [(keep, k, c.best_one_shot(keep, k)) for keep, k in pairs]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {key: value for key, value in c.model.items() if key != "name_or_path"} | {"shape": vars(c.shape)},
        "task": dict(c.task),
        "score": c.score,
        "splits": {split: vars(size) for split, size in c.splits.items()},
        "calibration": None if c.calibrated is None else vars(c.calibrated),
        "random": {"draws": c.draws, "test_draws": c.test_draws, "seed": c.seed},
        "interval": "test loss minus another's, 95% percentile interval of a paired bootstrap over examples",
        "best_one_shot": {
            "chosen_on": c.chosen_on,
            "methods": [{"keep": keep, "k": k, "name": row.name} for keep, k, row in best if row is not None],
        },
        "sentences": {str(keep): c.sentences(keep) for keep in c.keeps},
        "left_out": list(c.left_out),
        "rows": [_row(c, row) for row in c.rows],
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    best = comparison.best_one_shot(row.keep, row.k)
    return {
        "keep": row.keep,
        "k": row.k,
        "name": row.name,
        "kind": row.kind,
        "scores": {
            split: {"loss": row.loss[split], "accuracy": row.accuracy[split]}
            | (
                {"loss_sd": row.loss_sd[split], "accuracy_sd": row.accuracy_sd[split], "prunings": row.drawn[split]}
                if row.drawn
                else {}
            )
            for split in row.loss
        },
        "parameters": row.parameters,
        "gib": row.gib,
        "active": row.active,
        "layer_tokens": row.layer_tokens,
        "test_minus_full": _interval(row.against_full),
        "test_minus_best_one_shot": _interval(row.against_best),
        "best_one_shot": best is row,
        "plan": None if row.plan is None else row.plan.fingerprint,
        "file": None if row.file is None else f"{PLANS}/{row.file}",
    }


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _csv(comparison: Comparison) -> str:
    scores = [f"{split}_{what}" for split in comparison.splits for what in ("loss", "loss_sd", "accuracy")]
    intervals = [f"{what}_{end}" for what in INTERVALS for end in ("mean", "low", "high")]
    facts = ["parameters", "gib", "active", "layer_tokens"]
    head = ["keep", "k", "name", "kind", *scores, *facts, *intervals, "best_one_shot", "plan", "file"]
    lines = []
    for row in comparison.rows:
        line = _row(comparison, row)
        for split, found in line.pop("scores").items():
            line |= {f"{split}_{what}": found.get(what) for what in ("loss", "loss_sd", "accuracy")}
        for what in INTERVALS:
            line |= {f"{what}_{end}": value for end, value in (line.pop(what) or {}).items()}
        lines.append(line)
    return csv_text(lines, head)


INTERVALS = ("test_minus_full", "test_minus_best_one_shot")


def _draw(comparison: Comparison, folder: Path) -> None:
    """methods.html where plotly is installed, methods.png where matplotlib is, too."""
    if find_spec("plotly") is None:
        return
    from moeopt.report.figures import methods_bar, write_html, write_png

    split = list(comparison.splits)[-1]
    full = comparison.full
    several = len({row.k for row in comparison.rows if row.kind != "full"}) > 1
    rows = []
    for row in comparison.rows:
        if row.kind == "full" or split not in row.loss:
            continue
        ends = row.against_full
        rows.append(
            {
                "name": f"{row.name}, k {row.k}" if several else row.name,
                "split": split,
                "keep": row.keep,
                "loss": row.loss[split],
                "low": None if ends is None else min(full.loss[split] + ends.low, row.loss[split]),
                "high": None if ends is None else max(full.loss[split] + ends.high, row.loss[split]),
            }
        )
    if not rows:
        return
    title = f"{comparison.task['name']}: {split} loss"
    if full.evaluations.get("test") is not None:
        title += ", with the 95% interval of its difference from the full model's"
    figure = methods_bar(rows, reference=full.loss[split], title=title)
    write_html(figure, folder / "methods.html")
    if find_spec("matplotlib") is not None:
        write_png(figure, folder / "methods.png")
