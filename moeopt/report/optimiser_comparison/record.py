"""All numbers of a comparison as JSON, and its rows as CSV and the page have them, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeopt import __version__, statistics
from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.results.optimiser_comparison import Comparison, Optimiser, Pair

FORMAT, VERSION = "moeopt-optimiser-comparison", 1


def record(c: Comparison) -> dict[str, Any]:
    """All numbers as JSON; what is infinite or unknown is null."""
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
        "conclusions": conclusions(c),
        "optimisers": [_optimiser(c, optimiser) for optimiser in c.optimisers],
        "pairs": {"search": pair_rows(c.pairs), "test": pair_rows(c.held_out_pairs)},
        "settings": {optimiser.name: dict(optimiser.settings) for optimiser in c.optimisers},
        "studies": study_rows(c),
        "left_out": list(c.left_out),
        "foreign": list(c.foreign),
    }


def _optimiser(c: Comparison, optimiser: Optimiser) -> dict[str, Any]:
    several = len(optimiser.runs) > 1
    return _finite(
        optimiser=optimiser.name,
        seeds=len(optimiser.runs),
        median_loss=optimiser.median,
        low=optimiser.low if several else None,
        high=optimiser.high if several else None,
        band_covers=optimiser.covered if several else None,
        mean_loss=float(optimiser.losses.mean()),
        median_mean_height=float(np.median(optimiser.mean_height)),
        mean_rank=optimiser.rank,
        reached_target=optimiser.reached,
        restricted_mean_to_target=statistics.restricted_mean(optimiser.times, c.budget),
        median_to_target=float(np.median(optimiser.times)),
        targets_reached=optimiser.solved,
        median_test_loss=float(np.median(optimiser.held_out)),
    )


def study_rows(c: Comparison) -> list[dict[str, Any]]:
    """A row for every study."""
    return [
        _finite(
            study=run.study,
            optimiser=optimiser.name,
            seed=run.seed,
            **run.counts,
            **{cost.replace("-", "_"): run.spent(cost) for cost in c.costs},
            loss_at_budget=float(optimiser.losses[i]),
            loss_at_end=float(run.curve[-1]),
            mean_height=float(optimiser.mean_height[i]),
            to_target=float(optimiser.times[i]),
            test_loss=float(optimiser.held_out[i]),
        )
        for optimiser in c.optimisers
        for i, run in enumerate(optimiser.runs)
    ]


def pair_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """A row for every pair."""
    return [
        _finite(
            first=pair.first,
            second=pair.second,
            seeds=len(pair.differences),
            first_wins=int((pair.differences < 0).sum()),
            ties=int((pair.differences == 0).sum()),
            mean_difference=pair.mean,
            low=pair.low,
            high=pair.high,
            p=pair.p,
            corrected_p=pair.corrected,
            better=pair.better,
        )
        for pair in pairs
    ]


def _finite(**row: Any) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
