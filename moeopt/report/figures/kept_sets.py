"""What every kept set costs: a layer's output error for all the sets of experts it could keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from moeopt.errors import FigureError
from moeopt.plan import Plan
from moeopt.report.figures import style
from moeopt.report.figures.style import Floats, numbers

Experts = tuple[int, ...]

DRAWN_SETS = 400
"""Kept sets drawn for a layer; of more, evenly spaced ranks."""
GOLDEN = 0.6180339887498949
"""Its multiples, less their integers, spread evenly however many there are."""


def kept_set_errors(
    losses: Sequence[Mapping[Experts, float]],
    chosen: Plan | Sequence[Collection[int] | None] | None = None,
    *,
    raw: bool = False,
    title: str = "Output error of every kept set",
) -> style.Figure:
    """For every layer, the output error of all the sets of experts it could keep (NAEE, arXiv 2402.14800).

    Of more than 400 sets in a layer, 400 evenly spaced ranks are drawn, the best and the worst among them.

    Args:
        losses: one dictionary a layer, {experts kept: error}.
        chosen: the set to mark in each layer: a plan (layers it merges get no mark), or one set a layer, or None.
        raw: draw the errors themselves, on a log axis where all are above 0, instead of errors over the layer's median.

    Raises:
        FigureError: when an error is not finite, a layer's median is not above 0 (unless `raw`), or a chosen set is not
            among its layer's sets.
    """
    rows = [_row(i, layer) for i, layer in enumerate(losses)]
    if isinstance(chosen, Plan):
        chosen = [layer.kept for layer in chosen.layers]
    chosen = [None] * len(rows) if chosen is None else list(chosen)
    if not rows or len(chosen) != len(rows):
        raise FigureError(f"chosen must have one set for each of the {len(rows)} layers of losses, got {len(chosen)}")
    points: dict[str, list[tuple[float, float, str]]] = {"": [], "best": [], "chosen": []}
    for i, ((sets, errors), choice) in enumerate(zip(rows, chosen)):
        median = 1.0 if raw else float(np.median(errors))
        if median <= 0:
            raise FigureError(f"layer {i}: its median error, {median:g}, must be above 0 to divide by; or use raw=True")
        order = np.argsort(errors, kind="stable")
        rank = np.argsort(order) + 1
        drawn = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), DRAWN_SETS)).round().astype(int))]
        marked = {"best": int(order[0])}
        if choice is not None:
            experts = _experts(choice, f"chosen, layer {i}")
            if experts not in sets:
                raise FigureError(f"layer {i}: the chosen {_named(experts)} is not among its {len(sets)} sets")
            marked["chosen"] = sets.index(experts)
        for what, s in [*marked.items(), *(("", s) for s in drawn)]:
            height = errors[s] / median
            aside = 0.0 if s in marked.values() else 0.56 * ((s * GOLDEN) % 1 - 0.5)
            ratio = "" if raw else f", {height:.3f} of the median"
            text = f"layer {i}, {_named(sets[s])}: error {errors[s]:.4g}{ratio}, rank {rank[s]} of {len(sets)}"
            points[what].append((i + aside, height, f"{what}: {text}" if what else text))

    most = max(len(sets) for sets, _ in rows)
    every = f"{DRAWN_SETS} of {most:,} sets" if most > DRAWN_SETS else f"all {most:,} sets"
    cloud = {"symbol": "circle", "size": 4 if len(rows) > 8 else 6, "color": style.CATEGORICAL[0], "opacity": 0.5}
    ring = {"symbol": "circle-open", "size": 12, "color": style.BETWEEN, "line": {"color": style.BETWEEN, "width": 1.5}}
    diamond = {"symbol": "diamond", "size": 7, "color": style.CATEGORICAL[1]}
    figure = style.empty(title)
    for what, name, marker in (("", every, cloud), ("best", "best set", ring), ("chosen", "chosen set", diamond)):
        if points[what]:
            x, y, hover = zip(*points[what])
            style.scatter(figure, 0, np.array(x), np.array(y), list(hover), mode="markers", marker=marker, name=name)
    if not raw:
        line = {"color": style.FAINT, "width": 1, "dash": "dash"}
        figure.add_shape(type="line", xref="x domain", x0=0, x1=1, yref="y", y0=1.0, y1=1.0, line=line, layer="below")
    layer = {"title": {"text": "layer"}, "range": [-0.6, len(rows) - 0.4], "showgrid": False}
    label = "layer output error" + ("" if raw else " / the layer's median (ratio)")
    scale = "log" if raw and all((errors > 0).all() for _, errors in rows) else None
    error = {"title": {"text": label}, "type": scale}
    style.panel(figure, 0, 1, None, x=layer | style.numbered(len(rows), 40), y=error)
    return figure


def _row(i: int, layer: Mapping[Experts, float]) -> tuple[list[Experts], Floats]:
    """A layer's sets and their errors (sets,)."""
    if not isinstance(layer, Mapping):
        raise FigureError(f"losses of layer {i} must be a dictionary {{experts kept: error}}, got {layer!r:.80}")
    errors = numbers(f"losses of layer {i}", list(layer.values()), what="(sets,)", ndim=1)
    sets = [_experts(experts, f"layer {i}") for experts in layer]
    if len(set(sets)) < len(sets):
        raise FigureError(f"layer {i} has the same set of experts twice, in another order")
    if np.isnan(errors).any():
        raise FigureError(f"losses of layer {i} must be finite, got NaN")
    return sets, errors


def _experts(experts: Collection[int], where: str) -> Experts:
    try:
        return tuple(sorted(int(expert) for expert in experts))
    except (TypeError, ValueError):
        raise FigureError(f"{where}: a set must be experts kept, as (0, 2), got {experts!r}") from None


def _named(experts: Experts) -> str:
    return "kept " + " ".join(map(str, experts))
