"""A comparison as files: optimisers.csv, studies.csv, comparison.json and the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt import __version__
from moeopt.errors import ExportError
from moeopt.files import csv_text, write_atomically
from moeopt.results.optimiser_comparison import statistics

if TYPE_CHECKING:
    from moeopt.results.optimiser_comparison.comparison import Comparison, Optimiser, Pair

FORMAT, VERSION = "moeopt-optimiser-comparison", 1
PAGE = "index.html"


def save(c: Comparison, folder: str | Path) -> None:
    """See `Comparison.save`."""
    folder, found = Path(folder), c.record
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "optimisers.csv", _csv(found["optimisers"]))
        write_atomically(folder / "studies.csv", _csv(found["studies"]))
        write_atomically(folder / "comparison.json", (json.dumps(found, indent=2) + "\n").encode())
        write_atomically(folder / PAGE, c.page.encode("utf-8", "replace"))
    except OSError as error:
        raise ExportError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None


def record(c: Comparison) -> dict[str, Any]:
    """See `Comparison.record`."""
    model = {key: value for key, value in c.description["model"].items() if key != "name_or_path"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "moeopt": __version__,
        "description": {**c.description, "model": model},
        "cost": c.cost,
        "budget": c.budget,
        "start": c.start,
        "target": c.target,
        "targets": c.targets.tolist(),
        "seeds": list(c.seeds),
        "friedman_p": c.friedman,
        "conclusions": c.conclusions,
        "optimisers": [_optimiser(c, one) for one in c.optimisers],
        "pairs": {"search": [_pair(pair) for pair in c.pairs], "test": [_pair(pair) for pair in c.held_out_pairs]},
        "settings": {one.name: dict(one.settings) for one in c.optimisers},
        "studies": [row for one in c.optimisers for row in _studies(c, one)],
        "left_out": list(c.left_out),
        "foreign": list(c.foreign),
    }


def _optimiser(c: Comparison, one: Optimiser) -> dict[str, Any]:
    n = len(one.runs)
    return {
        "optimiser": one.name,
        "seeds": n,
        "median_loss": _finite(one.median),
        "low": _finite(one.low) if n > 1 else None,
        "high": _finite(one.high) if n > 1 else None,
        "band_covers": one.covered if n > 1 else None,
        "mean_loss": _finite(float(one.losses.mean())),
        "median_mean_height": _finite(float(np.median(one.mean_height))),
        "mean_rank": _finite(one.rank),
        "reached_target": one.reached,
        "restricted_mean_to_target": statistics.restricted_mean(one.times, c.budget),
        "median_to_target": _finite(float(np.median(one.times))),
        "targets_reached": one.solved,
        "median_test_loss": _finite(float(np.median(one.held_out))),
    }


def _studies(c: Comparison, one: Optimiser) -> list[dict[str, Any]]:
    return [
        {
            "study": run.study,
            "optimiser": one.name,
            "seed": run.seed,
            **run.counts,
            **{cost.replace("-", "_"): run.spent(cost) for cost in c.costs},
            "loss_at_budget": _finite(float(one.losses[i])),
            "loss_at_end": _finite(float(run.curve[-1])),
            "mean_height": _finite(float(one.mean_height[i])),
            "to_target": _finite(float(one.times[i])),
            "test_loss": _finite(float(one.held_out[i])),
        }
        for i, run in enumerate(one.runs)
    ]


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "seeds": len(pair.differences),
        "first_wins": int((pair.differences < 0).sum()),
        "ties": int((pair.differences == 0).sum()),
        "mean_difference": _finite(pair.mean),
        "low": _finite(pair.low),
        "high": _finite(pair.high),
        "p": pair.p,
        "corrected_p": pair.corrected,
        "better": pair.better,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    return csv_text(rows, rows[0]).encode("utf-8", "replace")
