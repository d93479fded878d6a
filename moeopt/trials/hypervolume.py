"""The hypervolume of fronts, between bounds that several studies share, and how it grew.

Values are signed so that less is better (`moeopt.trials.front.points`). Each is scaled to 0 at the ideal, the
best value of each objective on the joint front, and to 1 at the reference point: the worst of that front, a tenth of
its range further out, so that its ends count (Ishibuchi, Imada, Setoguchi & Nojima 2018, Evol. Comput. 26:411-440). A
hypervolume is then a share of the box between: 0 to 1, more is better.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from moeopt.statistics import Floats, hypervolume
from moeopt.trials.front import nondominated

BEYOND = 0.1
"""How much further out than the front's worst values the reference lies, in ranges of the front."""
LARGEST = 1e150
"""Values beyond count as this, so that differences and products are finite."""


@dataclass(frozen=True)
class Bounds:
    """The box that hypervolumes are shares of, in signed values of each objective."""

    ideal: tuple[float, ...]
    reference: tuple[float, ...]

    @classmethod
    def of(cls, at: Floats) -> Bounds:
        """Those of the front of some points, (n, m), n > 0; an objective that is the same all along it gets a width.

        >>> Bounds.of(np.array([[0.0, 3.0], [1.0, 2.0], [5.0, 5.0]]))
        Bounds(ideal=(0.0, 2.0), reference=(1.1, 3.1))
        """
        at = np.clip(at, -LARGEST, LARGEST)
        front = at[nondominated(at)]
        ideal = front.min(axis=0)
        width = front.max(axis=0) - ideal
        width = np.where(width > 0, width, np.where(ideal == 0, 1.0, np.abs(ideal)))
        return cls(tuple(ideal.tolist()), tuple((ideal + (1 + BEYOND) * width).tolist()))

    def scaled(self, at: Floats) -> Floats:
        """Points, (..., m), with the ideal at 0 and the reference at 1."""
        ideal, reference = np.array(self.ideal), np.array(self.reference)
        scaled: Floats = (np.clip(at, -LARGEST, LARGEST) - ideal) / (reference - ideal)
        return scaled

    def hypervolume(self, at: Floats) -> float:
        """The share of the box that points, (n, m), dominate."""
        return hypervolume(self.scaled(at), np.ones(len(self.ideal)))


def curve(at: Floats, bounds: Bounds) -> Floats:
    """The hypervolume of the first 1, 2, ... points, (n,), never decreasing; NaN before the first point.

    Args:
        at: (n, m); rows with NaN, such as those of trials that failed, add nothing.
        bounds: of the hypervolume.

    Two objectives take n log n; more take a hypervolume of the front for every point that joins it.
    """
    there = np.isfinite(at).all(axis=1)
    scaled = bounds.scaled(at[there])
    gains = np.zeros(len(at))
    gains[there] = _pairwise(scaled) if at.shape[1] == 2 else _exclusive(scaled)
    grown = np.minimum(np.cumsum(gains), 1.0)  # sums of gains round
    grown[: int(there.argmax()) if there.any() else len(at)] = np.nan
    return grown


def _pairwise(at: Floats) -> list[float]:
    """What each of some points, (n, 2), adds to the area: a staircase, of which each step goes at most once."""
    xs, ys = [-np.inf, 1.0], [1.0, -np.inf]  # the sides of the box end it
    gains = []
    for x, y in at.tolist():
        step = bisect_right(xs, x) - 1
        if ys[step] <= y or x >= 1.0:
            gains.append(0.0)
            continue
        gain, left, height, end = 0.0, x, ys[step], step + 1
        while ys[end] >= y:
            gain += (xs[end] - left) * (height - y)
            left, height, end = xs[end], ys[end], end + 1
        gains.append(gain + (xs[end] - left) * (height - y))
        start = step if xs[step] == x else step + 1
        xs[start:end], ys[start:end] = [x], [y]
    return gains


def _exclusive(at: Floats) -> list[float]:
    """What each of some points, (n, m), adds: its box, less what the front takes of it (While et al. 2012)."""
    ones = np.ones(at.shape[1])
    front = np.empty((0, at.shape[1]))
    gains = []
    for point in at:
        if (point >= 1.0).any() or (front <= point).all(axis=1).any():
            gains.append(0.0)
            continue
        limited = np.maximum(front, point)
        gains.append(max(0.0, float((1.0 - point).prod()) - hypervolume(limited[nondominated(limited)], ones)))
        front = np.vstack([front[~(point <= front).all(axis=1)], point])
    return gains
