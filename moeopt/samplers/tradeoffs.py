"""Several objectives as one, another one for every slot: how local search walks along a front.

A slot has weights w, the points of a low-discrepancy sequence of the simplex, so that consecutive slots look at
different parts of the front and all parts get as many. What it minimises is the augmented Chebyshev function (Steuer
& Choo 1983) of the values z, scaled to 0 at the best and 1 at the worst of the front so far:

    s(z) = max_i w_i z_i + rho sum_i w_i z_i,    rho = 0.05

Every point of the front is the least of s for some weights, also where the front is not convex.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeopt.samplers.history import Observation
from moeopt.trials.hypervolume import Bounds

RHO = 0.05
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scalarisation:
    """What a slot minimises.

    Args:
        weights: (objectives,), their sum 1.
        bounds: of the front so far.
    """

    weights: Floats
    bounds: Bounds

    def __call__(self, values: Floats) -> Floats:
        """s of values, (..., objectives), signed so that less is better: (...)."""
        weighted = self.weights * self.bounds.scaled(values)
        chosen: Floats = weighted.max(axis=-1) + RHO * weighted.sum(axis=-1)
        return chosen


def scalarisation(history: list[Observation], slot: int, seed: int) -> Scalarisation | None:
    """That of a slot; None while no trial that keeps its constraints is finished."""
    values = [obs.values for obs in history if obs.values is not None and not obs.broken]
    if not values:
        return None
    return Scalarisation(weights(slot, len(values[0]), seed), Bounds.of(np.array(values)))


def scalarised(history: list[Observation], chosen: Scalarisation) -> list[Observation]:
    """The history with s for losses; those that break a constraint come behind all that keep theirs."""
    ended = [obs for obs in history if obs.values is not None]
    losses = dict(zip((obs.slot for obs in ended), chosen(np.array([obs.values for obs in ended])).tolist()))
    worst = max(losses[obs.slot] for obs in ended if not obs.broken)
    best = min(losses.values())

    def told(obs: Observation) -> Observation:
        if obs.values is None:
            return obs
        behind = 1 + worst - best if obs.broken else 0.0
        return replace(obs, loss=losses[obs.slot] + behind)

    return [told(obs) for obs in history]


def weights(slot: int, count: int, seed: int) -> Floats:
    """The weights of a slot, float64 (count,), uniform over the simplex: spacings of a sorted Kronecker sequence.

    The sequence is that of the generalised golden ratio, shifted by the seed.
    """
    if count == 1:
        return np.ones(1)
    ratio = 2.0
    for _ in range(60):  # x^count = x + 1
        ratio = (1 + ratio) ** (1 / count)
    shift = np.random.default_rng([seed, count]).random(count - 1)
    at = np.sort((shift + (slot + 1) * ratio ** -np.arange(1.0, count)) % 1.0)
    spaced = np.maximum(np.diff(np.concatenate([[0.0], at, [1.0]])), 1e-3)
    chosen: Floats = spaced / spaced.sum()
    return chosen
