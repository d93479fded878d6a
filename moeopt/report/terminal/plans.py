"""A plan as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
from rich.table import Table

from moeopt.plan import LayerPlan, Matrix, Plan
from moeopt.report.tables import table


def layer_rows(plan: Plan) -> Iterator[dict[str, Any]]:
    """Facts of every run of equal consecutive layers, JSON: layers, experts, merged rows, routing, k, negatives."""
    for layer, run in groupby(enumerate(plan.layers), key=lambda item: item[1]):
        indices = [i for i, _ in run]
        w_em, w_rm = layer.expert_matrix, layer.router_matrix
        yield {
            "layers": f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]),
            "experts": short(layer),
            "kept": layer.kept_experts,
            "of": layer.experts,
            "k": layer.k,
            "skip": layer.skip,
            "merged_rows": int(_mixed(w_em).sum()),
            "routing": _routing(layer),
            "negative_w_em": int((w_em < 0).sum()),
            "negative_w_rm": int((w_rm < 0).sum()),
            "beyond_matrices": layer.beyond_matrices,
        }


def short(layer: LayerPlan) -> str:
    """A layer in a few characters: the expert that leads each row, with ~ where others are mixed in."""
    if layer.kept == tuple(range(layer.experts)):
        return "all"
    leads = np.abs(layer.expert_matrix).argmax(axis=1)
    return " ".join(f"{lead}{'~' if mixed else ''}" for lead, mixed in zip(leads, _mixed(layer.expert_matrix)))


def _mixed(matrix: Matrix) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(~(((matrix == 0) | (matrix == 1)).all(axis=1) & (matrix.sum(axis=1) == 1)))


def _routing(layer: LayerPlan) -> str:
    if layer.novices is not None:
        return f"whole, {len(layer.novices)} novices"
    if layer.router == "alias":
        return "picks, aliased"
    where = {"rows": "router rows", "prob": "probabilities", "logit": "logits"}[layer.router]
    if layer.router_rows is not None:
        followed = layer.kept is not None and layer.router_rows == layer.kept
        return f"{where}, {'as kept' if followed else 'one-hot'}"
    return f"{where}, dense" + (" (negatives as EEP)" if layer.router == "prob" and layer.negative == "eep" else "")


TEXT = ("experts", "router map", "negative entries", "beyond the matrices")


def plan_table(plan: Plan, title: str | None = None) -> Table:
    """One row for every run of equal layers."""
    rows = list(layer_rows(plan))

    def active(row: dict[str, Any]) -> str:
        return f"{row['k']}, skip {row['skip']:.2f}" if row["skip"] else str(row["k"])

    def negative(row: dict[str, Any]) -> str:
        entries = row["negative_w_em"], row["negative_w_rm"]
        return "{} W_EM, {} W_RM".format(*entries) if any(entries) else "none"

    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("layers", lambda row: row["layers"]),
        ("experts", lambda row: row["experts"]),
        ("r", lambda row: str(row["kept"])),
        ("merged rows", lambda row: f"{row['merged_rows']} of {row['kept']}"),
        ("router map", lambda row: row["routing"]),
        ("k", active),
        ("negative entries", negative),
    ]
    if any(row["beyond_matrices"] for row in rows):
        columns.append(("beyond the matrices", lambda row: row["beyond_matrices"] or "none"))
    caption = f"n = {plan.layers[0].experts} experts; a ~ marks an expert that others are mixed into"
    return table(title, columns, rows, caption=caption, text=TEXT)
