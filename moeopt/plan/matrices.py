"""Matrices of a plan: float32, (r, n), read-only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import PlanError

Matrix = NDArray[np.float32]


def one_hot(indices: Iterable[int], n: int) -> Matrix:
    """(r, n) float32 matrix whose row i is the unit vector of `indices[i]`."""
    columns = list(indices)
    matrix = np.zeros((len(columns), n), dtype=np.float32)
    matrix[np.arange(len(columns)), columns] = 1
    return matrix


def frozen(matrix: Matrix) -> Matrix:
    """The matrix itself, read-only from now on."""
    matrix.flags.writeable = False
    return matrix


def checked_matrix(name: str, value: ArrayLike, n: int, *, rows: int | None = None) -> Matrix:
    """A read-only copy, (r, n) float32, r being `rows` where it is given; PlanError unless it is finite and r <= n."""
    matrix = np.array(value, dtype=np.float32)
    expected = f"({rows if rows is not None else 'r'}, {n})"
    if matrix.ndim != 2 or matrix.shape[1] != n or (rows is not None and matrix.shape[0] != rows):
        raise PlanError(f"{name} must have shape {expected}, got {matrix.shape}")
    if not 1 <= matrix.shape[0] <= n:
        raise PlanError(f"{name} must have between 1 and {n} rows (r <= n), got {matrix.shape[0]}")
    return frozen(finite(name, matrix))


def checked_novices(value: ArrayLike, dropped: int) -> Matrix:
    """A read-only copy, (dropped, hidden) float32; PlanError unless it has that form and is finite."""
    matrix = np.array(value, dtype=np.float32)
    if matrix.ndim != 2 or matrix.shape[0] != dropped or not matrix.shape[1]:
        raise PlanError(
            f"novices must have shape ({dropped}, hidden), a row for each expert that is not kept, got {matrix.shape}"
        )
    return frozen(finite("novices", matrix))


def finite(name: str, matrix: Matrix) -> Matrix:
    """The matrix itself; PlanError unless all its numbers are finite."""
    if not np.isfinite(matrix).all():
        raise PlanError(f"{name} must be finite, got {matrix[~np.isfinite(matrix)][0]}")
    return matrix


def one_hot_rows(matrix: Matrix) -> tuple[int, ...] | None:
    """The column of the single 1 of every row; None where a row is no unit vector."""
    if ((matrix == 0) | (matrix == 1)).all() and (matrix.sum(axis=1) == 1).all():
        return tuple(int(i) for i in matrix.argmax(axis=1))
    return None
