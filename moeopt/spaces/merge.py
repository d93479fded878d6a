"""W_EM and W_RM entries around a plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeopt.errors import SpaceError
from moeopt.plan import ModelShape, Plan
from moeopt.spaces.base import EntrySpace, Groups, MapAt, Phase
from moeopt.trials import genome
from moeopt.trials.genome import Vector

REACH = 3.0
"""Entries may move so many scales from the plan they start at."""


class MergeSpace(EntrySpace):
    """Mergings near a plan: every entry of both matrices of every group, at most ``3 * scale`` from the plan's own.

    Args:
        around: the plan to start from; its groups must be constant within `groups`.
        scale: the natural step of an entry, a standard deviation. EEP mutates by 0.065.
        shape, groups, router: as for `Space`; r, k and the treatment of negative probabilities are the plan's.
    """

    phases: tuple[Phase, ...] = ("merge",)

    def __init__(
        self,
        shape: ModelShape,
        *,
        around: Plan,
        groups: Groups | None = None,
        scale: float = 0.065,
        router: MapAt | None = None,
    ) -> None:
        first = around.layers[0]
        mapped = [layer.negative for layer in around.layers if layer.router_rows is None]
        negative = mapped[0] if mapped else "clamp"
        super().__init__(shape, keep=first.kept_experts, groups=groups, k=first.k, router=router, negative=negative)
        self._check_equal_groups()
        if not 0 < scale < float("inf"):
            raise SpaceError(f"scale must be a positive number, got {scale!r}")
        self.around, self.scale = around, float(scale)
        self.names = self.entry_names()
        self.low = np.full(self.size, -np.inf, dtype=np.float32)
        self.high = -self.low
        center = self.encode(around)
        self.low, self.high = center - np.float32(REACH * scale), center + np.float32(REACH * scale)
        self.step = np.full(self.size, scale, dtype=np.float32)
        self._center = center

    def start(self) -> Vector:
        return self._center.copy()

    def sample(self, rng: np.random.Generator) -> Vector:
        return self.snap(self._center + self.scale * rng.standard_normal(self.size))

    def describe(self) -> dict[str, Any]:
        around = genome.pack("around", self._center)
        return self._description("merge", scale=self.scale, **around)
