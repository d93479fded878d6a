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
from moeopt.spaces.base import range_names

if TYPE_CHECKING:
    from moeopt.plan import LayerPlan

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]

BEST_SHARE, BEST_FEWEST, BEST_MOST = 0.1, 5, 50
"""The best trials: a tenth of all, at least 5, at most 50."""


def best_curve(digest: Digest) -> Curve | None:
    """Layer-tokens spent, and the loss, at every complete trial that was the best so far; None where there is none."""
    spent, best, found = _before(digest), math.inf, []
    for row in digest.rows:
        spent += row.cost
        if not row.pruned and row.loss < best:
            best = row.loss
            found.append((spent, best))
    return None if not found else (np.array([s for s, _ in found]), np.array([b for _, b in found]))


def _before(digest: Digest) -> float:
    """Layer-tokens spent before the first trial: on the full model."""
    return 0.0 if digest.full is None else float(digest.full.layer_tokens)


def draw(digest: Digest, others: Mapping[str, Curve], named: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The figures by id. One that fails says why in its place.

    Args:
        others: `best_curve` of other studies of the same task, by name.
        named: importances of named parameters, where the space has few enough, as an evaluator of Optuna gives them.
    """
    drawers: dict[str, tuple[str, Callable[[], style.Figure]]] = {
        "moeopt-1-progress": ("Loss over layer-tokens", lambda: _progress(digest, others)),
        "moeopt-2-importance": ("Which layers matter", lambda: _importance(digest, named)),
        "moeopt-3-experts": ("Experts that the best trials keep", lambda: _experts(digest)),
        "moeopt-4-matrices": ("W_EM and W_RM of the best plan", lambda: _matrices(digest)),
        "moeopt-5-lineage": ("Where the best plan came from", lambda: _lineage(digest)),
    }
    found = {}
    for name, (title, drawer) in drawers.items():
        try:
            figure = drawer()
        except Exception as error:  # whatever numbers a stranger wrote: the others still show
            figure = style.nothing(title, f"This study's numbers cannot be drawn ({type(error).__name__}).")
        found[name] = style.compact(figure)
    return found


def _label(digest: Digest) -> str:
    score = digest.part("evaluation", "score")
    labels = {"metric": "1 - metric", "choice": "loss of the choice", "kl": "KL to the full model"}
    return (labels | {"acceptance": "1 - acceptance"}).get(str(score), "loss")


def _progress(digest: Digest, others: Mapping[str, Curve]) -> style.Figure:
    gains, interval = _gains(digest.selection)
    return figures.search_progress(
        _before(digest) + np.cumsum([row.cost for row in digest.rows]),
        [row.loss for row in digest.rows],
        [row.pruned for row in digest.rows],
        others=others, gains=gains, test_interval=interval, label=_label(digest),
        full_model=None if digest.full is None else digest.full.loss + digest.full.penalty,
    ) if digest.rows else style.nothing("Loss over layer-tokens", "No trial has ended yet.")  # fmt: skip


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


def _importance(digest: Digest, named: Mapping[str, float] | None) -> style.Figure:
    title, rows = "Which layers matter", _readable(digest)
    if len(rows) < FEWEST or not digest.blocks:
        return style.nothing(title, f"Needs {FEWEST} trials whose plans differ; there are {len(rows)}.")
    features = np.stack([row.features for row in rows if row.features is not None])
    found = importance(features, np.array([row.loss for row in rows]), [block for _, block in digest.blocks])
    if found is None:
        return style.nothing(title, f"Needs {FEWEST} trials whose plans differ, and losses that do.")
    names = [name for name, _ in digest.blocks]
    grouped = None
    if named:
        grouped = {name: sum(v for key, v in named.items() if _stands_for(key, name)) for name in names}
    return figures.layer_importance(
        names, found.shares, found.errors, explained=found.explained, trials=found.trials, optuna=grouped
    )


def _stands_for(parameter: str, block: str) -> bool:
    """Whether a named parameter, such as `keep.L00-03.1` or `k.L00`, is of a block such as `L00-03` or `k L00`."""
    parts = parameter.split(".")
    return " ".join(parts[:2]) == block if parts[0] in ("k", "skip") else len(parts) > 1 and parts[1] == block


def _experts(digest: Digest) -> style.Figure:
    title, rows = "Experts that the best trials keep", _readable(digest)
    if not rows or digest.space is None or digest.best is None or digest.best.mass is None:
        return style.nothing(title, "No trial with a plan has ended yet.")
    if not digest.best.mass.any():
        return style.nothing(title, "This study keeps every expert of its plan: it searches how many are active.")
    distinct = {row.mass.tobytes(): row for row in reversed(rows) if row.mass is not None and not row.pruned}
    ranked = sorted(distinct.values(), key=lambda row: (row.loss, row.number))
    chosen = ranked[: min(BEST_MOST, max(BEST_FEWEST, round(BEST_SHARE * len(ranked))))]
    share = np.mean([np.minimum(row.mass, 1.0) for row in chosen if row.mass is not None], axis=0)
    names = digest.space.group_names()
    return figures.kept_experts(names, share, _leads(digest, len(names)), trials=len(chosen))


def _leads(digest: Digest, groups: int) -> NDArray[np.bool_]:
    """(groups, n), true where the best plan keeps the expert, or has it lead a merged one."""
    assert digest.space is not None
    found = np.zeros((groups, digest.space.shape.experts), dtype=bool)
    if digest.plan is not None:
        for g, (first, _) in enumerate(digest.space.groups):
            found[g, np.abs(digest.plan.layers[first].expert_matrix).argmax(axis=1)] = True
    return found


def _matrices(digest: Digest) -> style.Figure:
    if digest.plan is None:
        return style.nothing("W_EM and W_RM of the best plan", "No trial with a plan has ended yet.")
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
        return style.nothing("Where the best plan came from", "No trial has a loss yet.")
    by_number = {row.number: row for row in digest.rows if not math.isnan(row.loss)}

    def parent(row: Row) -> Row | None:
        known = [by_number[n] for n in row.parents if n in by_number]
        return min(known, key=lambda one: one.loss, default=None)

    inherited = any(row.parents for row in digest.rows)
    gains: dict[str, list[float]] = {}
    best: Row | None = None
    records: list[Row] = []
    for row in by_number.values():
        above = parent(row) if inherited else best
        gains.setdefault(row.operator, [])
        if above is not None:
            gains[row.operator].append(above.loss - row.loss)
        if not row.pruned and (best is None or row.loss < best.loss):
            best = row
            records.append(row)
    line: list[Row] = []
    step: Row | None = digest.best
    while inherited and step is not None:
        line.append(step)
        step = parent(step)
    line = line[::-1] if inherited else records
    return figures.lineage(
        [row.number for row in line], [row.loss for row in line], [row.operator for row in line],
        {name: np.array(values) for name, values in gains.items() if values}, inherited=inherited, label=_label(digest),
    )  # fmt: skip
