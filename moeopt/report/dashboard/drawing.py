"""A digest as five figures, small enough to be sent at every poll of a dashboard."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.report import figures
from moeopt.report.dashboard.digest import Digest, Row, number
from moeopt.report.dashboard.importance import FEWEST, importance
from moeopt.report.figures import style
from moeopt.spaces.rows import range_names

if TYPE_CHECKING:
    from moeopt.plan import LayerPlan

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]

BEST_SHARE, BEST_FEWEST, BEST_MOST = 0.1, 5, 50
"""The best trials: a tenth of all, at least 5, at most 50."""


def best_curve(digest: Digest) -> Curve | None:
    """Layer-tokens spent, and the loss, at every complete trial that was the best so far; None where there is none."""
    best, points = math.inf, []
    for row, spent in zip(digest.rows, _spent(digest)):
        if not row.pruned and row.loss < best:
            best = row.loss
            points.append((spent, best))
    return (np.array([spent for spent, _ in points]), np.array([loss for _, loss in points])) if points else None


def _spent(digest: Digest) -> Floats:
    """Layer-tokens spent by the end of each trial, the full model's included, (rows,)."""
    on_full = 0.0 if digest.full is None else float(digest.full.layer_tokens)
    return on_full + np.cumsum([row.cost for row in digest.rows])


def draw(digest: Digest, others: Mapping[str, Curve]) -> dict[str, Any]:
    """The figures by id. One that fails says why in its place.

    Args:
        others: `best_curve` of other studies of the same task, by name.
    """
    drawers: dict[str, tuple[str, Callable[[], style.Figure]]] = {
        "moeopt-1-progress": ("Loss over layer-tokens", lambda: _progress(digest, others)),
        "moeopt-2-importance": ("Which layers matter", lambda: _importance(digest)),
        "moeopt-3-experts": ("Experts that the best trials keep", lambda: _experts(digest)),
        "moeopt-4-matrices": ("W_EM and W_RM of the best plan", lambda: _matrices(digest)),
        "moeopt-5-lineage": ("Where the best plan came from", lambda: _lineage(digest)),
    }
    drawn = {}
    for name, (title, drawer) in drawers.items():
        try:
            figure = drawer()
        except NothingYet as why:
            figure = style.nothing(title, str(why))
        except Exception as error:  # whatever numbers a stranger wrote: the others still show
            figure = style.nothing(title, f"This study's numbers cannot be drawn ({type(error).__name__}).")
        drawn[name] = style.compact(figure)
    return drawn


class NothingYet(Exception):
    """Why there is nothing to draw."""


def _label(digest: Digest) -> str:
    score = digest.part("evaluation", "score")
    labels = {"metric": "1 - metric", "choice": "loss of the choice", "kl": "KL to the full model"}
    return (labels | {"acceptance": "1 - acceptance"}).get(str(score), "loss")


def _progress(digest: Digest, others: Mapping[str, Curve]) -> style.Figure:
    if not digest.rows:
        raise NothingYet("No trial has ended yet.")
    gains, interval = _gains(digest.selection)
    return figures.search_progress(
        _spent(digest), [row.loss for row in digest.rows], [row.pruned for row in digest.rows],
        others=others, gains=gains, test_interval=interval, label=_label(digest),
        full_model=None if digest.full is None else digest.full.loss + digest.full.penalty,
    )  # fmt: skip


def _gains(selection: Mapping[str, Any] | None) -> tuple[dict[str, float] | None, tuple[float, float] | None]:
    """Gains by split, and the interval on test, of a selection's record; what is no number is left out."""
    gain = selection.get("gain") if selection is not None else None
    if not isinstance(gain, dict):
        return None, None
    values = {split: value for split in ("search", "dev", "test") if not math.isnan(value := number(gain.get(split)))}
    ends = gain.get("test_interval")
    low, high = (number(ends.get(key) if isinstance(ends, dict) else None) for key in ("low", "high"))
    return values or None, None if math.isnan(low) or math.isnan(high) or low > high else (low, high)


def _readable(digest: Digest) -> list[Row]:
    return [row for row in digest.rows if row.features is not None and not math.isnan(row.loss)]


def _importance(digest: Digest) -> style.Figure:
    rows = _readable(digest)
    if len(rows) < FEWEST or not digest.blocks:
        raise NothingYet(f"Needs {FEWEST} trials whose plans differ; there are {len(rows)}.")
    features = np.stack([row.features for row in rows if row.features is not None])
    measured = importance(features, np.array([row.loss for row in rows]), [block for _, block in digest.blocks])
    if measured is None:
        raise NothingYet(f"Needs {FEWEST} trials whose plans differ, and losses that do.")
    names = [name for name, _ in digest.blocks]
    return figures.layer_importance(
        names, measured.shares, measured.errors, explained=measured.explained, trials=measured.trials
    )


def _experts(digest: Digest) -> style.Figure:
    rows = _readable(digest)
    if not rows or digest.space is None or digest.best is None or digest.best.mass is None:
        raise NothingYet("No trial with a plan has ended yet.")
    if not digest.best.mass.any():
        raise NothingYet("This study keeps every expert of its plan: it searches how many are active.")
    distinct = {row.mass.tobytes(): row for row in reversed(rows) if row.mass is not None and not row.pruned}
    ranked = sorted(distinct.values(), key=lambda row: (row.loss, row.number))
    chosen = ranked[: min(BEST_MOST, max(BEST_FEWEST, round(BEST_SHARE * len(ranked))))]
    share = np.mean([np.minimum(row.mass, 1.0) for row in chosen if row.mass is not None], axis=0)
    names = digest.space.group_names()
    return figures.kept_experts(names, share, _leads(digest, len(names)), trials=len(chosen))


def _leads(digest: Digest, groups: int) -> NDArray[np.bool_]:
    """(groups, n), true where the best plan keeps the expert, or has it lead a merged one."""
    assert digest.space is not None
    leads = np.zeros((groups, digest.space.shape.experts), dtype=bool)
    if digest.plan is not None:
        for g, (first, _) in enumerate(digest.space.groups):
            leads[g, np.abs(digest.plan.layers[first].expert_matrix).argmax(axis=1)] = True
    return leads


def _matrices(digest: Digest) -> style.Figure:
    if digest.plan is None:
        raise NothingYet("No trial with a plan has ended yet.")
    runs: list[tuple[int, int]] = []
    layers: list[LayerPlan] = []
    for layer, run in groupby(enumerate(digest.plan.layers), key=lambda item: item[1]):
        places = [i for i, _ in run]
        runs.append((places[0], places[-1]))
        layers.append(layer)
    return figures.plan_matrices(
        range_names(runs), [layer.expert_matrix for layer in layers], [layer.router_matrix for layer in layers]
    )


def _lineage(digest: Digest) -> style.Figure:
    if digest.best is None:
        raise NothingYet("No trial has a loss yet.")
    by_number = {row.number: row for row in digest.rows if not math.isnan(row.loss)}

    def parent(row: Row) -> Row | None:
        """The better one."""
        return min((by_number[n] for n in row.parents if n in by_number), key=lambda row: row.loss, default=None)

    inherited = any(row.parents for row in digest.rows)
    gains: dict[str, list[float]] = {}
    records: list[Row] = []
    for row in by_number.values():
        before = parent(row) if inherited else records[-1] if records else None
        if before is not None:
            gains.setdefault(row.operator, []).append(before.loss - row.loss)
        if not row.pruned and (not records or row.loss < records[-1].loss):
            records.append(row)
    if inherited:
        ancestors = [digest.best]
        while (above := parent(ancestors[0])) is not None:
            ancestors.insert(0, above)
    else:
        ancestors = records
    return figures.lineage(
        [row.number for row in ancestors], [row.loss for row in ancestors], [row.operator for row in ancestors], gains,
        inherited=inherited, label=_label(digest),
    )  # fmt: skip
