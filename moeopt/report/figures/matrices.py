"""What a plan is made of: W_EM and W_RM of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import Floats, numbers

DRAWN_NUMBERS = 8_000
"""Entries that are drawn; larger matrices are summed over their rows."""


def plan_matrices(
    names: Sequence[str],
    w_em: Sequence[ArrayLike],
    w_rm: Sequence[ArrayLike],
    *,
    title: str = "W_EM and W_RM of the best plan",
) -> style.Figure:
    """Heat maps of both matrices, layers under each other, a row of a matrix a row; 0 is white, negative entries red.

    Matrices that would take more than 8,000 entries are drawn as one row a layer, their sums over rows: how much of
    each expert goes into the small model.

    Args:
        names: of layers, or of runs of layers with the same matrices, such as ``"L00-07"``.
        w_em, w_rm: of each, (r, n); r may differ between them, n may not.

    Raises:
        FigureError: when there is none, numbers of names and matrices differ, or shapes do not fit.
    """
    if not names or not len(names) == len(w_em) == len(w_rm):
        raise FigureError(
            f"names, w_em and w_rm must be of one length above 0, got {len(names)}, {len(w_em)}, {len(w_rm)}"
        )
    merging = [numbers(f"w_em of {name}", w, what="(r, n)", ndim=2) for name, w in zip(names, w_em)]
    n = merging[0].shape[1]
    routing = [
        numbers(f"w_rm of {name}", w, what="(r, n)", ndim=2, shape=(len(m), n))
        for name, w, m in zip(names, w_rm, merging)
    ]
    if any(m.shape[1] != n for m in merging):
        raise FigureError(f"all matrices must be of {n} experts, got {sorted({m.shape[1] for m in merging})}")
    summed = 2 * sum(m.size for m in merging) > DRAWN_NUMBERS
    if summed:
        merging, routing = ([w.sum(axis=0, keepdims=True) for w in matrices] for matrices in (merging, routing))
    apart = not summed and len(names) <= 64
    most = max(1.0, *(float(np.nanmax(np.abs(w))) for w in (*merging, *routing)))
    heights = np.array([len(m) for m in merging])
    centres = np.cumsum(heights + apart) - apart - (heights + 1) / 2
    figure = style.empty(title, "columns summed over rows" if summed else "a row for every expert that remains")
    style.heat_maps(
        figure, {"W_EM (merging)": _stacked(merging, apart), "W_RM (router)": _stacked(routing, apart)},
        hover="expert %{x}, entry %{z}", y={"zeroline": False, **style.named(names, 16, centres.tolist())},
        low=-most, high=most, colours=[list(stop) for stop in style.DIVERGING],
        title="sum" if summed else "entry", bar={"thickness": 12},
    )  # fmt: skip
    return figure


def _stacked(matrices: Sequence[Floats], apart: bool) -> Floats:
    """All rows, (rows, n), with a row of NaN between two matrices where they stand apart."""
    gap = np.full((int(apart), matrices[0].shape[1]), np.nan)
    return np.concatenate([part for matrix in matrices for part in (matrix, gap)][:-1])
