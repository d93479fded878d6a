"""Which r experts each layer group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SpaceError
from moeopt.plan import Matrix, ModelShape
from moeopt.showing import shown
from moeopt.spaces.base import Phase, Space
from moeopt.spaces.rows import Groups, experts_of, first_rows, kept_rows, one_hot_pair, random_rows
from moeopt.trials import genome
from moeopt.trials.genome import Vector

Encoding = Literal["rows", "scores", "subset"]


class PruneSpace(Space):
    """Prunings: every layer group keeps r of its n experts, router rows following.

    With `keep` as a range, the numbers of experts are searched as well, one a group; with `order` nothing else is: a
    group keeps the first of its ranking (budgets under a fixed ranking, EvoESAP, arXiv 2603.06003).

    Where routers choose among m groups of experts first (`ModelShape.router_groups`), r / m are kept of the n / m of
    each, and what follows is said of each of these.

    Args:
        encoding: what the numbers are. ``"scores"``: one in [0, 1] per expert and group, the r largest are kept
            (suits CMA-ES, DE and TPE). ``"rows"``: r expert indices per group, EEP's one-hot rows; a repeated index
            becomes the next free one. ``"subset"``: one index in [0, C(n, r)) per group, in lexicographic order; not
            with `keep` as a range.
        order: a ranking of the experts of each layer, the best first, (layers, n), as `moeopt.methods.ranking` gives
            it; layers of one group must share theirs. Only with `keep` as a range.
        shape, keep, total, groups, k: as for `Space`.
    """

    phases: tuple[Phase, ...] = ("prune",)

    def __init__(
        self,
        shape: ModelShape,
        *,
        keep: int | tuple[int, int],
        total: int | None = None,
        groups: Groups | None = None,
        k: int | None = None,
        encoding: Encoding = "scores",
        order: ArrayLike | None = None,
    ) -> None:
        super().__init__(shape, keep=keep, total=total, groups=groups, k=k, router="prob")
        self._check_equal_groups()
        if encoding not in get_args(Encoding):
            raise SpaceError(f"encoding must be one of {', '.join(get_args(Encoding))}, got {encoding!r}")
        self.encoding: Encoding = encoding
        if self.keep_range is not None and encoding == "subset":
            raise SpaceError("encoding='subset' numbers sets of one size: with keep as a range use 'scores' or 'rows'")
        self.order = None if order is None else self._checked_order(order)
        if self.order is not None:
            self.phases = ("active",)
        n, r, labels, first = shape.experts, self.keep, self.group_names(), np.zeros(1, dtype=np.float32)
        self._blocks = shape.router_groups
        self._n, self._r = n // self._blocks, r // self._blocks
        if self.order is not None:
            names, high, step = [], 0.0, 0.0
        elif encoding == "scores":
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
        self.integer = encoding != "scores" or self.order is not None
        first = first[: len(names)]
        self._set_numbers(names, first, first + np.float32(high), step)

    def _checked_order(self, order: ArrayLike) -> NDArray[np.int64]:
        """The rankings of the groups, (groups, high): of each group that routers choose first, one after the other."""
        if self.keep_range is None:
            raise SpaceError(f"order needs keep as a range, such as keep=(2, 6), got keep={self.keep}")
        ranked, n = np.asarray(order), self.shape.experts
        wanted = (self.shape.layers, n)
        if ranked.shape != wanted or (np.sort(ranked, axis=1) != np.arange(n)).any():
            raise SpaceError(
                f"order must rank all {n} experts of each of {wanted[0]} layers, best first, as an array {wanted}, got "
                f"{shown(order, 80)}"
            )
        for first, last in self.groups:
            if (ranked[first : last + 1] != ranked[first]).any():
                raise SpaceError(f"layers {first}-{last} share one choice in this space, but not one order of experts")
        size, share = n // self.shape.router_groups, self.keep // self.shape.router_groups
        rows = [
            [e for b in range(self.shape.router_groups) for e in [e for e in ranking if e // size == b][:share]]
            for ranking in ranked[[first for first, _ in self.groups]].astype(np.int64).tolist()
        ]
        return np.array(rows)

    def rows(self, x: Vector) -> NDArray[np.int64]:
        """Kept experts of every group, sorted, int64 (groups, r); where `keep` is a range the best, the best first."""
        if self.order is not None:
            return self.order
        n, r = self._n, self._r
        table = x[: self.extras.start].reshape(len(self.groups) * self._blocks, -1)
        if self.encoding == "scores":
            kept = np.argsort(-table, axis=1, kind="stable")[:, :r]
        elif self.encoding == "rows":
            kept = np.array([_distinct((row.astype(int) % n).tolist(), n) for row in table])
        else:
            kept = np.array([_subset(int(row[0]), n, r) for row in table])
        kept = np.sort(kept, axis=1) if self.keep_range is None else kept
        return experts_of(kept, self.shape.experts, self._blocks)

    def from_rows(self, rows: NDArray[np.int64]) -> Vector:
        """The numbers that keep these experts; `rows` is integer (groups, r), distinct within a group.

        Raises:
            SpaceError: when they are not as many of each group that routers choose first.
        """
        rows = np.sort(rows, axis=1) if self.keep_range is None else rows
        if (rows // self._n != np.repeat(np.arange(self._blocks), self._r)).any():
            raise SpaceError(f"the plan does not keep {self._r} experts of each of the {self._blocks} router groups")
        if self.encoding == "scores":
            scores = np.full((len(self.groups), self.shape.experts), 0.25)
            ranked = (
                0.75 if self.keep_range is None else np.tile(0.75 - 0.5 * np.arange(self._r) / self._r, self._blocks)
            )
            np.put_along_axis(scores, rows, np.broadcast_to(ranked, rows.shape), axis=1)
            return self._joined(scores)
        if self.encoding == "rows":
            return self._joined(rows)
        return self._joined([_rank(kept, self._n, self._r) for kept in (rows % self._n).reshape(-1, self._r).tolist()])

    def _joined(self, numbers: ArrayLike) -> Vector:
        """A genotype of these numbers, as many experts being kept as may be."""
        return self.snap(np.append(np.asarray(numbers), () if self.keep_range is None else self.keep_range.start))

    def matrices(self, x: Vector) -> Matrix:
        return one_hot_pair(self.rows(x), self.shape.experts)

    def from_matrices(self, matrices: Matrix) -> Vector:
        return self.start() if self.order is not None else self.from_rows(kept_rows(matrices))

    def start(self) -> Vector:
        """The first experts of each group; with scores, no preference among experts at all."""
        if self.encoding == "scores" or self.order is not None:
            return self._joined(np.full(self.extras.start, 0.5))
        return self.from_rows(first_rows(len(self.groups), self.keep, self.shape))

    def sample(self, rng: np.random.Generator) -> Vector:
        if self.keep_range is None:
            return self.from_rows(random_rows(rng, len(self.groups), self.keep, self.shape.experts, self._blocks))
        x = self.start()
        if self.order is None:
            blocks = self._blocks
            x = self.from_rows(random_rows(rng, len(self.groups), self.keep, self.shape.experts, blocks, ordered=False))
        return self.with_counts(x, self.keep_range.sample(rng))

    def describe(self) -> dict[str, Any]:
        order = {} if self.order is None else genome.pack("order", self.order.reshape(-1).astype(np.float32))
        return self._description("prune", encoding=self.encoding, **order)


def whole_order(rows: NDArray[Any], groups: Sequence[tuple[int, int]], n: int) -> NDArray[np.int64]:
    """An order of the experts of all layers, (layers, n), that begins as `PruneSpace.order`, (groups, high)."""
    ranked = [[*dict.fromkeys([*row, *range(n)])] for row in rows.astype(np.int64).tolist()]
    return np.repeat(np.array(ranked), [last - first + 1 for first, last in groups], axis=0)


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
