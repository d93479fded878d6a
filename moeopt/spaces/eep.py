"""EEP's space: both matrices of every group, from one-hot to dense."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeopt.plan import ModelShape, Negative
from moeopt.spaces.base import EntrySpace, MapAt, Phase
from moeopt.spaces.rows import Groups, first_rows, one_hot_pair, random_rows
from moeopt.trials.genome import Vector

LOW, HIGH = -1.0, 2.0
"""Bounds of an entry: one unit beyond the 0 and 1 that a pruning has."""


class EEPSpace(EntrySpace):
    """W_EM and W_RM of every group, all entries in [-1, 2] (EEP, arXiv 2407.00945, section 3.2).

    One genotype serves both phases of EEP's search: prunings are the points whose rows are one-hot.

    Args:
        shape, keep, total, groups, k, router, negative: as for `Space`.
    """

    phases: tuple[Phase, ...] = ("prune", "merge")

    def __init__(
        self,
        shape: ModelShape,
        *,
        keep: int | tuple[int, int],
        total: int | None = None,
        groups: Groups | None = None,
        k: int | None = None,
        router: MapAt | None = None,
        negative: Negative = "clamp",
    ) -> None:
        super().__init__(shape, keep=keep, total=total, groups=groups, k=k, router=router, negative=negative)
        self._check_equal_groups()
        self._set_numbers(self.entry_names(), LOW, HIGH, 0.065)

    def start(self) -> Vector:
        """The pruning that keeps the first experts, of every router group as many."""
        rows = first_rows(len(self.groups), self.keep, self.shape)
        return self.from_matrices(one_hot_pair(rows, self.shape.experts))

    def sample(self, rng: np.random.Generator) -> Vector:
        """A random pruning: r distinct experts per group."""
        experts, blocks = self.shape.experts, self.shape.router_groups
        ordered = self.keep_range is None
        rows = random_rows(rng, len(self.groups), self.keep, experts, blocks, ordered=ordered)
        x = self.from_matrices(one_hot_pair(rows, experts))
        return x if self.keep_range is None else self.with_counts(x, self.keep_range.sample(rng))

    def describe(self) -> dict[str, Any]:
        return self._description("eep")
