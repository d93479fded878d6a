"""A comparison as records, JSON and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moeopt import __version__, statistics
from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.report.tables import finite
from moeopt.results.optimiser_comparison import Optimiser, OptimiserComparison, Pair

FORMAT, VERSION = "moeopt-optimiser-comparison", 1


def record(c: OptimiserComparison) -> dict[str, Any]:
    """All numbers as JSON; what is infinite or unknown is null."""
    model = {key: value for key, value in c.description["model"].items() if key != "name_or_path"}
    whole = {
        "format": FORMAT, "version": VERSION, "moeopt": __version__, "description": {**c.description, "model": model},
        "measure": c.measure,
        "objectives": list(c.objectives), "bounds": None if c.bounds is None else asdict(c.bounds),
        "cost": c.cost, "budget": c.budget, "start": c.start, "target": c.target, "targets": c.targets.tolist(),
        "seeds": list(c.seeds), "friedman_p": c.friedman, "conclusions": conclusions(c),
        "optimisers": [_optimiser(c, optimiser) for optimiser in c.optimisers],
        "pairs": {"search": pair_rows(c.pairs), "test": pair_rows(c.held_out_pairs)},
        "settings": {optimiser.name: dict(optimiser.settings) for optimiser in c.optimisers},
        "studies": study_rows(c), "left_out": list(c.left_out), "foreign": list(c.foreign),
    }  # fmt: skip
    return finite(whole)  # type: ignore[no-any-return]


def _optimiser(c: OptimiserComparison, o: Optimiser) -> dict[str, Any]:
    low, high, covered = (o.low, o.high, o.covered) if len(o.runs) > 1 else (None, None, None)
    return {
        "optimiser": o.name, "seeds": len(o.runs), "median_loss": o.median, "low": low, "high": high,
        "band_covers": covered, "mean_loss": float(o.losses.mean()),
        "median_mean_height": float(np.median(o.mean_height)), "mean_rank": o.rank, "reached_target": o.reached,
        "restricted_mean_to_target": statistics.restricted_mean(o.times, c.budget),
        "median_to_target": float(np.median(o.times)), "targets_reached": o.solved,
        "median_test_loss": float(np.median(o.held_out)),
    }  # fmt: skip


def study_rows(c: OptimiserComparison) -> list[dict[str, Any]]:
    """A row for every study."""
    return [
        {
            "study": run.study, "optimiser": o.name, "seed": run.seed, **run.counts,
            **{cost.replace("-", "_"): run.spent(cost) for cost in c.costs},
            "loss_at_budget": float(o.losses[i]), "loss_at_end": float(run.curve[-1]),
            "mean_height": float(o.mean_height[i]), "to_target": float(o.times[i]), "test_loss": float(o.held_out[i]),
        }
        for o in c.optimisers
        for i, run in enumerate(o.runs)
    ]  # fmt: skip


def pair_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """A row for every pair."""
    return [
        {
            "first": pair.first, "second": pair.second, "seeds": len(pair.differences),
            "first_wins": int((pair.differences < 0).sum()), "ties": int((pair.differences == 0).sum()),
            "mean_difference": pair.mean, "low": pair.low, "high": pair.high, "p": pair.p,
            "corrected_p": pair.corrected, "better": pair.better,
        }
        for pair in pairs
    ]  # fmt: skip
