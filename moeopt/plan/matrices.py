"""Matrices of a plan, read-only: float32 (r, n), and orders of neurons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import PlanError

Matrix = NDArray[np.float32]
"""W_EM or W_RM: (r, n)."""
Orders = NDArray[np.int32]
"""(n, inner): an order of the neurons of each expert."""
A = TypeVar("A", bound=NDArray[Any])


def one_hot(indices: Iterable[int], n: int) -> Matrix:
    """(r, n) float32 matrix whose row i is the unit vector of `indices[i]`."""
    columns = list(indices)
    matrix = np.zeros((len(columns), n), dtype=np.float32)
    matrix[np.arange(len(columns)), columns] = 1
    return matrix


def frozen(matrix: A) -> A:
    """The array itself, read-only from now on."""
    matrix.flags.writeable = False
    return matrix


def _array(name: str, value: ArrayLike, dtype: Any = None) -> NDArray[Any]:
    """A copy; PlanError for what is no array of numbers."""
    try:
        return np.array(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name} must be an array of numbers: {error}") from None


def checked_matrix(name: str, value: ArrayLike, n: int, *, rows: int | None = None) -> Matrix:
    """A read-only copy, (r, n) float32, r being `rows` where it is given; PlanError unless it is finite and r <= n."""
    matrix = _array(name, value, np.float32)
    expected = f"({rows if rows is not None else 'r'}, {n})"
    if matrix.ndim != 2 or matrix.shape[1] != n or (rows is not None and matrix.shape[0] != rows):
        raise PlanError(f"{name} must have shape {expected}, got {matrix.shape}")
    if not 1 <= matrix.shape[0] <= n:
        raise PlanError(f"{name} must have between 1 and {n} rows (r <= n), got {matrix.shape[0]}")
    return frozen(finite(name, matrix))


def checked_novices(value: ArrayLike, dropped: int) -> Matrix:
    """A read-only copy, (dropped, hidden) float32; PlanError unless it has that form and is finite."""
    matrix = _array("novices", value, np.float32)
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


def checked_orders(name: str, value: ArrayLike, n: int) -> Orders:
    """A copy, (n, inner) int32, whose rows are orders of 0 to inner - 1; PlanError for anything else."""
    orders = _array(name, value)
    if orders.ndim != 2 or len(orders) != n or not orders.size or orders.dtype.kind not in "iu":
        raise PlanError(f"{name} must be integers of shape ({n}, inner), got {orders.dtype} {orders.shape}")
    if (np.sort(orders, axis=1) != np.arange(orders.shape[1])).any():
        raise PlanError(f"every row of {name} must hold each of 0 to {orders.shape[1] - 1} once")
    return orders.astype(np.int32)
