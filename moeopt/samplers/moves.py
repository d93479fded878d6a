"""What local search does to a group of layers.

Moves, in each group of the window:

* ``swap``: a kept expert gives way to a dropped one, W_RM following W_EM;
* ``route``: a kept expert is given a part of a dropped one's routing probability (W_RM);
* ``remap``: entries of W_RM get Gaussian noise;
* ``blend``: a row of W_EM moves towards a dropped expert, and takes over as much of that expert's routing;
* ``perturb``: entries of both matrices get Gaussian noise;
* ``active``: in an `ActiveSpace`, a k goes up or down by one, a beta gets Gaussian noise; the window is one of the
  groups that these have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeopt.plan import Matrix
from moeopt.spaces.base import Phase, Space


def swap(rng: np.random.Generator, pair: Matrix, scale: float, p_entry: float) -> None:
    """In a row of both matrices of a group, (2, r, n), its expert and one that is no row's change places."""
    row, kept, dropped = _row(rng, pair)
    pair[:, row, [kept, dropped]] = pair[:, row, [dropped, kept]]


def route(rng: np.random.Generator, pair: Matrix, scale: float, p_entry: float) -> None:
    """Adds up to one whole of a dropped expert's probability to that of a row's expert."""
    row, _, dropped = _row(rng, pair)
    pair[1, row, dropped] += rng.uniform(0.0, 1.0)


def remap(rng: np.random.Generator, pair: Matrix, scale: float, p_entry: float) -> None:
    pair[1] += _noise(rng, pair[1].shape, scale, p_entry)


def blend(rng: np.random.Generator, pair: Matrix, scale: float, p_entry: float) -> None:
    """Moves a row of W_EM up to half of the way to a dropped expert; W_RM adds as much."""
    row, _, dropped = _row(rng, pair)
    part = rng.uniform(0.0, 0.5)
    pair[0, row] *= 1 - part
    pair[:, row, dropped] += part


def perturb(rng: np.random.Generator, pair: Matrix, scale: float, p_entry: float) -> None:
    pair += _noise(rng, pair.shape, scale, p_entry)


MOVES: dict[str, tuple[Phase, Callable[[np.random.Generator, Matrix, float, float], None]]] = {
    "swap": ("prune", swap),
    "route": ("merge", route),
    "remap": ("merge", remap),
    "blend": ("merge", blend),
    "perturb": ("merge", perturb),
}
"""Every move of matrices: the phase whose matrices it makes, and what it does to one group."""
NOISY = ("remap", "perturb")
"""Moves that make no difference between experts."""
MAPPING = ("route", "remap")
"""Moves of W_RM alone."""
ACTIVE = "active"
"""The move that changes what an `ActiveSpace` has beyond the matrices."""


def usual_moves(space: Space) -> tuple[str, ...]:
    """The moves of a search that nobody names others for; those of W_EM where W_RM follows it."""
    return ("swap", "blend", "perturb", ACTIVE) if space.router == "rows" else ("swap", *MAPPING, ACTIVE)


def _row(rng: np.random.Generator, pair: Matrix) -> tuple[int, int, int]:
    """A row, its largest entry, and an expert that is no row's largest (the same one where there is none)."""
    experts = pair[0].argmax(axis=1)
    row = int(rng.integers(len(experts)))
    dropped = np.setdiff1d(np.arange(pair.shape[2]), experts)
    return row, int(experts[row]), int(rng.choice(dropped)) if dropped.size else int(experts[row])


def _noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float, p_entry: float) -> Matrix:
    return ((rng.random(shape) < p_entry) * scale * rng.standard_normal(shape)).astype(np.float32)
