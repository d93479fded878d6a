"""W_EM and W_RM entries around a plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeopt.errors import SpaceError
from moeopt.plan import ModelShape, Plan, why_unequal
from moeopt.spaces.base import EntrySpace, MapAt, Phase
from moeopt.spaces.rows import Groups
from moeopt.trials import genome
from moeopt.trials.genome import Vector

REACH = 3.0
"""Entries may move so many scales from the plan they start at."""


class MergeSpace(EntrySpace):
    """Mergings near a plan: every entry of both matrices of every group, at most ``3 * scale`` from the plan's own.

    Args:
        around: the plan to start from; its groups must be constant within `groups`.
        scale: the natural step of an entry, a standard deviation. EEP mutates by 0.065.
        keep: (low, high), to search how many experts each group keeps, too; None: as many as the plan does, which may
            differ from layer to layer.
        shape, total, groups, router: as for `Space`; k and the treatment of negative probabilities are the plan's.
    """

    phases: tuple[Phase, ...] = ("merge",)

    def __init__(
        self,
        shape: ModelShape,
        *,
        around: Plan,
        keep: tuple[int, int] | None = None,
        total: int | None = None,
        groups: Groups | None = None,
        scale: float = 0.065,
        router: MapAt | None = None,
    ) -> None:
        first = around.layers[0]
        mapped = [layer.negative for layer in around.layers if layer.router_rows is None]
        negative = mapped[0] if mapped else "clamp"
        most = max(layer.kept_experts for layer in around.layers)
        super().__init__(
            shape, keep=most if keep is None else keep, total=total, groups=groups, k=first.k, router=router,
            negative=negative,
        )  # fmt: skip
        self._check_equal_groups()
        if not 0 < scale < float("inf"):
            raise SpaceError(f"scale must be a positive number, got {scale!r}")
        self.around, self.scale = around, float(scale)
        if self.keep_range is None and len(around.layers) == shape.layers:
            self.fixed_counts = np.array([around.layers[first].kept_experts for first, _ in self.groups])
            for count in self.fixed_counts.tolist():
                if (why := why_unequal(count, shape.router_groups)) is not None:
                    raise SpaceError(why)
        self._set_numbers(self.entry_names(), -np.inf, np.inf, scale)
        self._center = self.encode(around)
        entries = slice(0, self.extras.start)
        self.low[entries] = self._center[entries] - np.float32(REACH * scale)
        self.high[entries] = self._center[entries] + np.float32(REACH * scale)

    def start(self) -> Vector:
        return self._center.copy()

    def sample(self, rng: np.random.Generator) -> Vector:
        return self.snap(self._center + self.step * rng.standard_normal(self.size))

    def describe(self) -> dict[str, Any]:
        around = genome.pack("around", self._center)
        counts = {} if len(set(self.fixed_counts.tolist())) == 1 else {"counts": self.fixed_counts.tolist()}
        return self._description("merge", scale=self.scale, **counts, **around)
