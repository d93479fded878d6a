"""Ridge regression from sums over batches: rows a_t of A, (columns,), and what they should give, r_t, (outputs,)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

ACCURATE = 1e-3
"""Relative residual of the normal equations above which they are solved in float64."""


class Products(ABC):
    """What a ridge regression needs of A and R, in float32.

    Attributes:
        columns, outputs: of A and R.
        squares: the sum of squares to be explained, R'R's trace.
        outside: squares that are left in any case, of tokens whose rows of A are 0 and were not added.
    """

    def __init__(self, columns: int, outputs: int) -> None:
        self.columns, self.outputs = columns, outputs
        self.squares = self.outside = 0.0

    def add(self, a: Tensor, r: Tensor) -> None:
        """Add tokens: a (tokens, columns), r (tokens, outputs), float32."""
        self.squares += float(r.double().square().sum())
        self._add(a, r)

    @abstractmethod
    def _add(self, a: Tensor, r: Tensor) -> None: ...

    @property
    @abstractmethod
    def scale(self) -> float:
        """The mean of A'A's diagonal."""

    @abstractmethod
    def solution(self, ridge: float) -> Tensor:
        """D, (columns, outputs), that makes ||R - A D||^2 + ridge ||D||^2 least; ridge > 0."""

    def left(self, d: Tensor) -> float:
        """||R - A D||^2."""
        return self.outside + self._left(d)

    @abstractmethod
    def _left(self, d: Tensor) -> float: ...

    @abstractmethod
    def given(self, d: Tensor, columns: slice) -> Tensor:
        """(A D)'(A D) of some columns of A and as many rows of D, (outputs, outputs)."""

    @abstractmethod
    def joined(self, other: Products) -> Products:
        """Those of the tokens of both, of one kind, good for solutions alone; the other is used up."""


class Gram(Products):
    """A'A and A'R: for more tokens than columns."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__(columns, outputs)
        self.aa, self.ar = torch.zeros(columns, columns), torch.zeros(columns, outputs)

    def _add(self, a: Tensor, r: Tensor) -> None:
        self.aa, self.ar = self.aa.to(a.device), self.ar.to(a.device)
        self.aa.addmm_(a.T, a)
        self.ar.addmm_(a.T, r)

    @property
    def scale(self) -> float:
        return float(self.aa.diagonal().double().mean())

    def solution(self, ridge: float) -> Tensor:
        return solved(self.aa, self.ar, ridge)

    def _left(self, d: Tensor) -> float:
        # D'A'A D - 2 D'A'R, summed in float64: the three terms nearly cancel where the fit is good
        cross = (d.double() * (self.aa @ d - 2 * self.ar).double()).sum()
        return self.squares + float(cross)

    def given(self, d: Tensor, columns: slice) -> Tensor:
        return d.T @ self.aa[columns, columns] @ d

    def joined(self, other: Products) -> Products:
        assert isinstance(other, Gram)
        self.aa += other.aa.to(self.aa.device)
        self.ar += other.ar.to(self.aa.device)
        return self


class Rows(Products):
    """A and R themselves: for fewer tokens than columns."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__(columns, outputs)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def _add(self, a: Tensor, r: Tensor) -> None:
        self._batches.append((a, r))

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """A and R."""
        if len(self._batches) > 1:
            self._batches = [(torch.cat([a for a, _ in self._batches]), torch.cat([r for _, r in self._batches]))]
        return self._batches[0] if self._batches else (torch.zeros(0, self.columns), torch.zeros(0, self.outputs))

    @property
    def scale(self) -> float:
        return float(self.rows[0].double().square().sum()) / self.columns

    def solution(self, ridge: float) -> Tensor:
        a, r = self.rows
        return a.T @ solved(a @ a.T, r, ridge)  # (A'A + lam)^-1 A' = A' (A A' + lam)^-1

    def _left(self, d: Tensor) -> float:
        a, r = self.rows
        return float((r - a @ d.to(a.device)).double().square().sum())

    def given(self, d: Tensor, columns: slice) -> Tensor:
        outputs = self.rows[0][:, columns] @ d
        return outputs.T @ outputs

    def joined(self, other: Products) -> Products:
        assert isinstance(other, Rows)
        self._batches += other._batches
        return self


def solved(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """X of (matrix + ridge I) X = right, the matrix being positive semidefinite: float32, float64 where it must be."""
    for dtype in (torch.float32, torch.float64):
        m = matrix.to(dtype, copy=True)
        m.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(m)  # tells of a failure without raising
        if failed:
            continue
        x = torch.cholesky_solve(right.to(dtype), factor)
        if dtype is torch.float64 or float((m @ x - right).norm()) <= ACCURATE * float(right.norm()):
            return x.float()
    raise ArithmeticError(f"a matrix of size {len(matrix)} is not positive definite with {ridge:g} on its diagonal")
