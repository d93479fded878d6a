"""How many experts groups of layers keep, where that is searched: each a number of its own, under a total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SpaceError
from moeopt.plan import ModelShape, why_unequal
from moeopt.showing import shown

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class KeepRange:
    """Numbers of experts that groups of layers may keep.

    Args:
        low, high: fewest and most that a layer keeps.
        total: most that all layers keep together; None: as many as they may.
        layers: of each group.
        unit: counts are multiples of it: of the groups that routers choose first, as many are kept of each.
    """

    low: int
    high: int
    total: int | None
    layers: tuple[int, ...]
    unit: int = 1

    def __contains__(self, count: int) -> bool:
        return self.low <= count <= self.high and count % self.unit == 0

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" + (f", multiples of {self.unit}" if self.unit > 1 else "")

    def cap(self, wished: ArrayLike) -> Counts:
        """Counts as wished, int64 (groups,), as far as they are possible.

        What is beyond the total comes off all groups alike, and what that leaves of it goes to those that lost most,
        the first of equals.
        """
        wishes = self._rounded(wished)
        if self.total is None or self._sum(wishes) <= self.total:
            return wishes
        return self._shifted(wishes, -1)

    def fill(self, wished: ArrayLike) -> Counts:
        """Counts as wished, but that no group could keep more: the total is used up, or all keep the most they may."""
        wishes = self._rounded(wished)
        return self._shifted(wishes, -1 if self.total is not None and self._sum(wishes) > self.total else 1)

    def shift(self, rng: np.random.Generator, counts: ArrayLike, fixed: Sequence[int]) -> Counts:
        """Counts of which groups drawn at random, those that are fixed aside, lose what is beyond the total."""
        shifted = self._rounded(counts)
        while self.total is not None and self._sum(shifted) > self.total:
            able = [g for g in np.flatnonzero(shifted > self.low).tolist() if g not in fixed]
            if not able:
                return self.cap(shifted)
            shifted[rng.choice(able)] -= self.unit
        return shifted

    def room(self, counts: ArrayLike) -> NDArray[np.bool_]:
        """Which groups could keep more, (groups,)."""
        held = np.asarray(counts, dtype=np.int64)
        able: NDArray[np.bool_] = held < self.high
        if self.total is not None:
            able &= self._sum(held) + self.unit * np.array(self.layers) <= self.total
        return able

    def sample(self, rng: np.random.Generator) -> Counts:
        """Counts drawn uniformly, and filled where there is a total."""
        drawn = rng.integers(self.low // self.unit, self.high // self.unit + 1, len(self.layers)) * self.unit
        return drawn if self.total is None else self.fill(drawn)

    @property
    def start(self) -> Counts:
        """As many as may be, of all groups alike."""
        return self.fill(np.full(len(self.layers), self.high))

    def _rounded(self, wished: ArrayLike) -> Counts:
        units = np.rint(np.asarray(wished, dtype=np.float64) / self.unit)
        return np.clip(units, self.low // self.unit, self.high // self.unit).astype(np.int64) * self.unit

    def _sum(self, counts: Counts) -> int:
        return int(counts @ np.array(self.layers))

    def _shifted(self, wishes: Counts, way: int) -> Counts:
        """All wishes so many units up or down that the total just holds; the rest to groups that have lost most."""
        steps = (self.high - self.low) // self.unit
        counts = self._rounded(wishes + (0 if way < 0 else steps * self.unit))
        for by in range(1, steps + 1):
            if self.total is None or self._sum(counts) <= self.total:
                break
            counts = self._rounded(wishes + ((0 if way < 0 else steps) - by) * self.unit)
        while (able := self.room(counts)).any():
            lost = np.where(able, wishes - counts, np.iinfo(np.int64).min)
            counts[int(lost.argmax())] += self.unit
        return counts


def keep_range(keep: Any, total: Any, groups: Sequence[tuple[int, int]], shape: ModelShape) -> KeepRange | None:
    """What `keep` and `total` of a space say; None where all layers keep one number.

    Raises:
        SpaceError: naming the argument that does not fit.
    """
    if not isinstance(keep, (tuple, list)):
        if total is not None:
            raise SpaceError(f"total={shown(total)} needs keep as a range, such as keep=(2, 6), got {shown(keep)}")
        return None
    whole = [isinstance(end, (int, np.integer)) and not isinstance(end, bool) for end in keep]
    if len(keep) != 2 or not all(whole) or not 1 <= keep[0] < keep[1] <= shape.experts:
        raise SpaceError(
            f"keep must be a number, or a range (low, high) with 1 <= low < high <= {shape.experts}, got {shown(keep)}"
        )
    low, high = int(keep[0]), int(keep[1])
    for end in (low, high):
        if (why := why_unequal(end, shape.router_groups)) is not None:
            raise SpaceError(why)
    least, most = low * shape.layers, high * shape.layers
    if total is not None:
        if isinstance(total, bool) or not isinstance(total, (int, np.integer)) or not least <= total <= most:
            raise SpaceError(
                f"total must be from {least} to {most} experts, {low} to {high} in each of {shape.layers} layers, got "
                f"{shown(total)}"
            )
        total = int(total)
    return KeepRange(low, high, total, tuple(last - first + 1 for first, last in groups), shape.router_groups)
