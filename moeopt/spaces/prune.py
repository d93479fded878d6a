"""Which r experts each layer group keeps."""

from __future__ import annotations

from math import comb
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import SpaceError
from moeopt.plan import Matrix, ModelShape
from moeopt.spaces.base import (
    Groups,
    Phase,
    Space,
    experts_of,
    first_rows,
    kept_rows,
    one_hot_pair,
    random_rows,
)
from moeopt.trials.genome import Vector

Encoding = Literal["rows", "scores", "subset"]


class PruneSpace(Space):
    """Prunings: every layer group keeps r of its n experts, router rows following.

    Where routers choose among m groups of experts first (`ModelShape.router_groups`), r / m are kept of the n / m of
    each, and what follows is said of each of these.

    Args:
        encoding: what the numbers are. ``"scores"``: one in [0, 1] per expert and group, the r largest are kept
            (suits CMA-ES, DE and TPE). ``"rows"``: r expert indices per group, EEP's one-hot rows; a repeated index
            becomes the next free one. ``"subset"``: one index in [0, C(n, r)) per group, in lexicographic order.
        shape, keep, groups, k: as for `Space`.
    """

    phases: tuple[Phase, ...] = ("prune",)

    def __init__(
        self,
        shape: ModelShape,
        *,
        keep: int,
        groups: Groups | None = None,
        k: int | None = None,
        encoding: Encoding = "scores",
    ) -> None:
        super().__init__(shape, keep=keep, groups=groups, k=k, router="prob")
        self._check_equal_groups()
        if encoding not in get_args(Encoding):
            raise SpaceError(f"encoding must be one of {', '.join(get_args(Encoding))}, got {encoding!r}")
        self.encoding: Encoding = encoding
        n, r, labels, first = shape.experts, self.keep, self.group_names(), np.zeros(1, dtype=np.float32)
        self._blocks = shape.router_groups
        self._n, self._r = n // self._blocks, r // self._blocks
        if encoding == "scores":
            names, high, step = [f"score.{g}.E{e}" for g in labels for e in range(n)], 1.0, 0.25
        elif encoding == "rows":
            names, high, step = [f"keep.{g}.{i}" for g in labels for i in range(r)], self._n - 1.0, self._n / 4
            first = np.tile(np.repeat(np.arange(0, n, self._n, dtype=np.float32), self._r), len(labels))
        else:
            subsets = comb(self._n, self._r)
            if subsets > 1 << 24:
                raise SpaceError(
                    f"C({self._n}, {self._r}) = {subsets} subsets are too many for encoding='subset'; use 'scores'"
                )
            blocks = [""] if self._blocks == 1 else [f".{b}" for b in range(self._blocks)]
            names, high, step = [f"subset.{g}{b}" for g in labels for b in blocks], subsets - 1.0, subsets / 4
        self.integer = encoding != "scores"
        self.names = tuple(names)
        self.low = np.zeros(len(names), dtype=np.float32) + first
        self.high = np.full(len(names), high, dtype=np.float32) + first
        self.step = np.full(len(names), step, dtype=np.float32)

    def rows(self, x: Vector) -> NDArray[np.int64]:
        """Kept experts of every group, sorted, int64 (groups, r)."""
        n, r, table = self._n, self._r, x.reshape(len(self.groups) * self._blocks, -1)
        if self.encoding == "scores":
            kept = np.argsort(-table, axis=1, kind="stable")[:, :r]
        elif self.encoding == "rows":
            kept = np.array([_distinct((row.astype(int) % n).tolist(), n) for row in table])
        else:
            kept = np.array([_subset(int(row[0]), n, r) for row in table])
        return experts_of(np.sort(kept, axis=1), self.shape.experts, self._blocks)

    def from_rows(self, rows: NDArray[np.int64]) -> Vector:
        """The numbers that keep these experts; `rows` is integer (groups, r), distinct within a group.

        Raises:
            SpaceError: when they are not as many of each group that routers choose first.
        """
        rows = np.sort(rows, axis=1)
        if (rows // self._n != np.repeat(np.arange(self._blocks), self._r)).any():
            raise SpaceError(f"the plan does not keep {self._r} experts of each of the {self._blocks} router groups")
        if self.encoding == "scores":
            scores = np.full((len(self.groups), self.shape.experts), 0.25)
            np.put_along_axis(scores, rows, 0.75, axis=1)
            return self.snap(scores)
        if self.encoding == "rows":
            return self.snap(rows)
        return self.snap([_rank(kept, self._n, self._r) for kept in (rows % self._n).reshape(-1, self._r).tolist()])

    def matrices(self, x: Vector) -> Matrix:
        return one_hot_pair(self.rows(x), self.shape.experts)

    def from_matrices(self, matrices: Matrix) -> Vector:
        return self.from_rows(kept_rows(matrices))

    def start(self) -> Vector:
        """The first experts of each group; with scores, no preference among experts at all."""
        if self.encoding == "scores":
            return np.full(self.size, 0.5, dtype=np.float32)
        return self.from_rows(first_rows(len(self.groups), self.keep, self.shape))

    def sample(self, rng: np.random.Generator) -> Vector:
        return self.from_rows(random_rows(rng, len(self.groups), self.keep, self.shape.experts, self._blocks))

    def describe(self) -> dict[str, Any]:
        return self._description("prune", encoding=self.encoding)


def _distinct(row: list[int], n: int) -> list[int]:
    kept: list[int] = []
    for expert in row:
        kept.append(next(e % n for e in range(expert, expert + n) if e % n not in kept))
    return kept


def _subset(index: int, n: int, r: int) -> list[int]:
    """The `index`-th r-subset of range(n) in lexicographic order."""
    chosen: list[int] = []
    for e in range(n):
        if len(chosen) < r:
            with_e = comb(n - e - 1, r - len(chosen) - 1)
            if index < with_e:
                chosen.append(e)
            else:
                index -= with_e
    return chosen


def _rank(subset: list[int], n: int, r: int) -> int:
    """The place of a sorted r-subset of range(n) in lexicographic order."""
    members, index, taken = set(subset), 0, 0
    for e in range(subset[-1] + 1):
        if e in members:
            taken += 1
        else:
            index += comb(n - e - 1, r - taken - 1)
    return index
