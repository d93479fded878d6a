"""CMA-ES, full and separable, on the `cmaes` package (Hansen, arXiv 1604.00772; Ros & Hansen, PPSN 2008).

The optimiser works on z = (x - start) / step, so that one sigma suits every number of a space. Nothing of it is stored:
a proposal notes its generation g, and the optimiser is rebuilt by telling it, generation after generation, the first
`population_size` finished trials of each, by slot. Trials of a generation beyond those are ignored; failed ones count
as the worst of their generation. The start is evaluated first. The best of it and of all trials enqueued before it is
the first mean; none of them is told, as they were not drawn from the distribution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SamplerError
from moeopt.plan import Plan
from moeopt.samplers.base import Proposal, StartingSampler
from moeopt.samplers.checks import check_counts, check_positive
from moeopt.samplers.history import Observation, noted
from moeopt.spaces.base import Space

OPERATOR = "cmaes"
FULL_AT_MOST = 1_000
"""Numbers up to which the whole covariance is adapted unless told."""
FULL_REFUSED = 10_000
"""Numbers beyond which it is not, even if told."""


class CMAESSampler(StartingSampler):
    """Covariance matrix adaptation. The full matrix suits up to about 500 numbers, the separable one any size.

    A full matrix of m numbers is 8 m^2 bytes, and its eigenvectors take m^3 steps a generation: minutes at 6,144.

    Args:
        space: what to search.
        seed, redraw: as for `GenomeSampler`.
        sigma: first standard deviation of each number, as a multiple of `space.step`.
        start: the plan or vector (size,) to start at; by default `space.start()`.
        separable: adapt the diagonal of the covariance only. None: for more than `FULL_AT_MOST` numbers, which is said.
        population_size: trials per generation; by default 4 + floor(3 ln size).

    Raises:
        SamplerError: naming the argument that does not fit; for a full matrix of more than `FULL_REFUSED` numbers.
        SpaceError: when `start` is not of this space.
    """

    name, operators = "cmaes", (OPERATOR,)
    options = ("sigma", "separable", "population_size")

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        sigma: float = 1.0,
        start: Plan | ArrayLike | None = None,
        separable: bool | None = None,
        population_size: int | None = None,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start)
        check_positive({"sigma": sigma})
        if population_size is None:
            population_size = 4 + math.floor(3 * math.log(space.size))
        check_counts({"population_size": population_size}, least=3)
        if separable is None:
            separable = space.size > FULL_AT_MOST
            if separable:
                warnings.warn(
                    "cmaes adapts the diagonal of the covariance alone (separable=True), as the space has "
                    f"{space.size:,} numbers, more than {FULL_AT_MOST:,}; separable=False takes "
                    f"{8 * space.size**2 / 1e9:.1f} GB",
                    stacklevel=2,
                )
        if not separable and space.size > FULL_REFUSED:
            raise SamplerError(
                f"a full covariance of {space.size:,} numbers would take {8 * space.size**2 / 1e9:.1f} GB and hours a "
                f"generation, the most is {FULL_REFUSED:,}: use 'sepcmaes', 'blockcmaes', or a PruneSpace, which has "
                "a number an expert"
            )
        self.sigma, self.separable, self.population_size = float(sigma), bool(separable), population_size
        self._cache: tuple[Any, list[Any], Any] | None = None

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        around, generations = self.center(history), self.generations(history)
        optimizer = self._rebuilt(around, generations)
        optimizer.reseed_rng(int(self.rng(slot, attempt).integers(1 << 32)))
        x = self.x0 + optimizer.ask() * self.space.step
        parents = () if around is None or generations else (around.number,)
        notes = {"generation": len(generations), "around": None if around is None else around.slot}
        return Proposal(x, OPERATOR, parents, notes=notes)

    def center(self, history: list[Observation]) -> Observation | None:
        """The trial at the first mean: the one that the earliest own proposal notes, else the best so far; None: x0."""
        ours = [obs for obs in history if obs.operator == OPERATOR]
        if ours:
            return next((obs for obs in history if obs.slot == ours[0].notes.get("around")), None)
        return min((obs for obs in history if obs.loss is not None), key=lambda obs: obs.loss or 0.0, default=None)

    def generations(self, history: list[Observation]) -> list[list[Observation]]:
        """The finished trials to tell, `population_size` of each complete generation."""
        return complete((obs for obs in history if obs.operator == OPERATOR), self.population_size)

    def _rebuilt(self, around: Observation | None, generations: list[list[Observation]]) -> Any:
        """The optimiser that was told these generations; kept and extended while the history only grows."""
        center = None if around is None else around.slot
        keys = [[(obs.slot, obs.loss) for obs in generation] for generation in generations]
        if self._cache is None or self._cache[0] != center or self._cache[1] != keys[: len(self._cache[1])]:
            self._cache = (center, [], self._new(self.x0 if around is None else around.x))
        _, told, optimizer = self._cache
        for generation, key in zip(generations[len(told) :], keys[len(told) :]):
            tell(optimizer, generation, [self._z(obs.x) for obs in generation])
            told.append(key)
        return optimizer

    def _new(self, mean: NDArray[np.float32]) -> Any:
        from cmaes import CMA, SepCMA

        bounds = np.stack([self._z(self.space.low), self._z(self.space.high)], axis=1)
        # n_max_resampling=0: numbers beyond a bound are clipped; drawing many numbers all within bounds never ends.
        options: dict[str, Any] = {"bounds": bounds, "n_max_resampling": 0, "population_size": self.population_size}
        kind = SepCMA if self.separable and self.space.size > 1 else CMA
        return kind(mean=self._z(mean), sigma=self.sigma, seed=0, **options)

    def _z(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        return (x.astype(np.float64) - self.x0) / self.space.step


def complete(members: Iterable[Observation], size: int) -> list[list[Observation]]:
    """The finished trials to tell, by their noted generation: `size` of each that has so many, up to the first not."""
    finished: dict[int, list[Observation]] = {}
    for obs in members:
        if obs.loss is not None or obs.failed:
            generation = noted(obs, "generation")
            finished.setdefault(-1 if generation is None else generation, []).append(obs)
    generations: list[list[Observation]] = []
    while len(finished.get(len(generations), [])) >= size:
        generations.append(finished[len(generations)][:size])
    return generations


def tell(optimizer: Any, generation: Sequence[Observation], points: Sequence[NDArray[np.float64]]) -> None:
    """Tell an optimiser of the `cmaes` package a generation at these points; failed trials count as its worst."""
    worst = max((obs.loss for obs in generation if obs.loss is not None), default=0.0)
    optimizer.tell([(z, worst if obs.loss is None else obs.loss) for obs, z in zip(generation, points)])
