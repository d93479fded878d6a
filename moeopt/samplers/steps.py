"""Experts swapped, dropped and taken back, step by step, by what a linear model says that having them costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeopt.spaces.base import Space

Floats = NDArray[np.float64]
Goal = Callable[[Floats, NDArray[np.int64]], Floats]
"""What is minimised: of changes of the loss and of the experts kept by all layers, (steps,) each."""


Move = tuple[int, NDArray[np.intp], NDArray[np.intp]]
"""A group, experts that leave it, and experts that come."""
NOBODY = np.zeros(0, dtype=np.intp)
TINY = 1e-12
"""What a step must gain at least."""


@dataclass(frozen=True, eq=False)
class Walk:
    """Where a walk ended.

    Args:
        kept: experts of every group, bool (groups, n).
        groups: those that changed.
        gained: by how much it lowered the goal.
    """

    kept: NDArray[np.bool_]
    groups: NDArray[np.intp]
    gained: float


class Steps:
    """Greedy walks from prunings of a space.

    Args:
        space: of the prunings.
        values: what having each expert costs of the loss, (groups, n).
    """

    def __init__(self, space: Space, values: Floats) -> None:
        self.space, self.values = space, values
        blocks = space.shape.router_groups
        self.parts = (len(space.groups), blocks, space.shape.experts // blocks)
        self.layers = np.array([last - first + 1 for first, last in space.groups])

    def walk(self, start: NDArray[np.bool_], goal: Goal, first: int, most: int) -> Walk:
        """Up to `most` steps in groups from `first` on, each the one that lowers the goal most, until none does.

        A step swaps two experts of a group, drops one, or takes one back (of every group that routers choose first,
        one); where the total leaves no room for that, one is dropped in another group.
        """
        kept, changed, loss, experts = start.copy(), set[int](), 0.0, 0
        now = began = float(goal(np.zeros(1), np.zeros(1, dtype=np.int64))[0])
        for _ in range(most):
            changes, counts, moved = self._steps(kept, first)
            reached = np.where(np.isfinite(changes), goal(loss + changes, experts + counts), np.inf)
            best = int(reached.argmin())
            if not reached[best] < now - TINY:
                break
            for group, out, into in moved(best):
                kept[group, out], kept[group, into] = False, True
                changed.add(group)
            loss, experts, now = loss + float(changes[best]), experts + int(counts[best]), float(reached[best])
        return Walk(kept, np.array(sorted(changed), dtype=np.intp), began - now)

    def _steps(
        self, kept: NDArray[np.bool_], first: int
    ) -> tuple[Floats, NDArray[np.int64], Callable[[int], list[Move]]]:
        """What steps change of the loss, infinite where there is no such step, and of the experts kept, (steps,) each;
        and what a step moves: a group, who leaves it, and who comes."""
        groups, blocks, size = self.parts
        shaped, values = kept.reshape(self.parts), self.values.reshape(self.parts)
        held, spare = np.where(shaped, values, -np.inf), np.where(shaped, np.inf, values)
        out, into = held.argmax(axis=2), spare.argmin(axis=2)
        swaps = spare.min(axis=2) - held.max(axis=2)  # (groups, blocks)
        block = swaps.argmin(axis=1)
        offsets = np.arange(blocks) * size
        out, into = out + offsets, into + offsets
        swap, drop, take = swaps.min(axis=1), np.full(groups, np.inf), np.full(groups, np.inf)
        transfer = np.full((groups, groups), np.inf)
        unit = 0
        if (keep := self.space.keep_range) is not None:
            counts, unit = kept.sum(axis=1), keep.unit
            drop = np.where(counts > keep.low, -held.max(axis=2).sum(axis=1), np.inf)
            wanted = np.where(counts < keep.high, spare.min(axis=2).sum(axis=1), np.inf)
            room = keep.room(counts)
            take = np.where(room, wanted, np.inf)
            over = counts @ self.layers + unit * (self.layers[None, :] - self.layers[:, None]) - (keep.total or np.inf)
            transfer = np.where(room | (over > 0) | np.eye(groups, dtype=bool), np.inf, drop[:, None] + wanted)
        early = np.arange(groups) < first
        swap[early] = drop[early] = take[early] = transfer[early] = transfer[:, early] = np.inf
        experts = unit * np.concatenate(
            [0 * self.layers, -self.layers, self.layers, (self.layers[None, :] - self.layers[:, None]).reshape(-1)]
        )

        def moved(step: int) -> list[Move]:
            kind, group = divmod(step, groups)
            if kind == 0:
                return [(group, out[group, [block[group]]], into[group, [block[group]]])]
            if kind == 1:
                return [(group, out[group], NOBODY)]
            if kind == 2:
                return [(group, NOBODY, into[group])]
            return [(kind - 3, out[kind - 3], NOBODY), (group, NOBODY, into[group])]

        return np.concatenate([swap, drop, take, transfer.reshape(-1)]), experts, moved
