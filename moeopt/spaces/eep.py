"""EEP's space: both matrices of every group, from one-hot to dense."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeopt.plan import ModelShape, Negative
from moeopt.spaces.base import EntrySpace, Groups, MapAt, Phase, first_rows, one_hot_pair, random_rows
from moeopt.trials.genome import Vector

LOW, HIGH = -1.0, 2.0
"""Bounds of an entry: one unit beyond the 0 and 1 that a pruning has."""


class EEPSpace(EntrySpace):
    """W_EM and W_RM of every group, all entries in [-1, 2] (EEP, arXiv 2407.00945, section 3.2).

    One genotype serves both phases of EEP's search: prunings are the points whose rows are one-hot.

    Args:
        shape, keep, groups, k, router, negative: as for `Space`.
    """

    phases: tuple[Phase, ...] = ("prune", "merge")

    def __init__(
        self,
        shape: ModelShape,
        *,
        keep: int,
        groups: Groups | None = None,
        k: int | None = None,
        router: MapAt | None = None,
        negative: Negative = "clamp",
    ) -> None:
        super().__init__(shape, keep=keep, groups=groups, k=k, router=router, negative=negative)
        self._check_equal_groups()
        self.names = self.entry_names()
        self.low = np.full(self.size, LOW, dtype=np.float32)
        self.high = np.full(self.size, HIGH, dtype=np.float32)
        self.step = np.full(self.size, 0.065, dtype=np.float32)

    def start(self) -> Vector:
        """The pruning that keeps the first experts, of every router group as many."""
        rows = first_rows(len(self.groups), self.keep, self.shape)
        return self.from_matrices(one_hot_pair(rows, self.shape.experts))

    def sample(self, rng: np.random.Generator) -> Vector:
        """A random pruning: r distinct experts per group."""
        rows = random_rows(rng, len(self.groups), self.keep, self.shape.experts, self.shape.router_groups)
        return self.from_matrices(one_hot_pair(rows, self.shape.experts))

    def describe(self) -> dict[str, Any]:
        return self._description("eep")
