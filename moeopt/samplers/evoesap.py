"""EvoESAP: how many experts each layer keeps under a fixed total, by evolution (arXiv 2603.06003).

The paper holds the ranking of the experts within a layer fixed (REAP, EAN, frequency, ...): its space is
``PruneSpace(keep=(k, n), total=..., order=moeopt.methods.ranking("reap", calibration))``, and its fitness, ESAP, the
tokens that speculative decoding is expected to accept, is ``Objective(score="acceptance")``. With these this is its
procedure:

- the first `population` plans: counts alike, then what is dropped laid out by `PATTERNS`, then at random;
- the best `elites` of all plans so far are the parents of `population` - `elites` children;
- a child is an elite, drawn uniformly, after 1 to `switches` level switches (the lesser of two uniform draws): a layer
  gives up 1 to `most` experts, and another takes as many. A switch that would leave the range is drawn again,
  `attempts` times in all.

Defaults are those that the released code documents, with 50 generations. It differs in that elites are
different plans, that no plan is evaluated twice (`redraw`), that the layouts are rounded otherwise, and in what the
paper has no need of: groups of layers that share a choice (a switch between groups of unlike size is evened out), and
numbers of a space beyond the counts, such as which experts are kept, each of which gets, with probability `p_entry`,
Gaussian noise of its own step's scale in a child. On a space whose counts do not vary only that is left of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SamplerError
from moeopt.plan import Plan
from moeopt.samplers.base import Proposal, StartingSampler
from moeopt.samplers.checks import check_counts, check_probabilities
from moeopt.samplers.history import Observation
from moeopt.spaces.base import Space
from moeopt.spaces.keep_range import Counts, KeepRange
from moeopt.trials.genome import Vector

Depths = NDArray[np.float64]
PATTERNS: dict[str, Callable[[Depths], Depths]] = {
    "up": lambda i: i + 1,
    "down": lambda i: i[::-1] + 1,
    "mid": lambda i: 1 + i[-1] / 2 - np.abs(i - i[-1] / 2),
    "mid-neg": lambda i: 1 + np.abs(i - i[-1] / 2),
    "front-heavy": lambda i: 0.7**i,
    "back-heavy": lambda i: 1.3**i,
    "block-early": lambda i: np.where(i < max(1, len(i) // 4), 2.0, 1.0),
    "block-late": lambda i: np.where(i >= len(i) - max(1, len(i) // 4), 2.0, 1.0),
    "alt": lambda i: np.where(i % 2 == 0, 2.0, 1.0),
    "deep-flat": lambda i: 1 - 0.5 * np.abs(2 * i / max(i[-1], 1) - 1),
}
"""How much of what is dropped each layer drops, by its depth 0, 1, ...; the released code's initial plans."""


class EvoESAPSampler(StartingSampler):
    """Evolution of the numbers of experts that layers keep, by switches between layers; see the top of this file.

    Args:
        space: what to search; one with `keep` as a range and a `total`, and for EvoESAP as published an `order`.
        seed, redraw: as for `GenomeSampler`.
        start: the first plan or vector (size,); by default `space.start()`, all layers alike.
        population: plans of a generation, and before the first child.
        elites: how many of the best are parents.
        switches: most level switches of a child.
        most: most experts that one moves.
        attempts: draws of switches in all.
        p_entry: probability of a number beyond the counts to get noise.

    Raises:
        SamplerError: naming the argument that does not fit.
        SpaceError: when `start` is not of this space.
    """

    name, operators = "evoesap", ("initial", "switch")
    options = ("population", "elites", "switches", "most", "attempts", "p_entry")

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
        population: int = 32,
        elites: int = 4,
        switches: int = 3,
        most: int = 4,
        attempts: int = 32,
        p_entry: float = 0.25,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start)
        counts = {"population": population, "elites": elites, "switches": switches, "most": most, "attempts": attempts}
        check_counts(counts)
        check_probabilities({"p_entry": p_entry})
        if elites >= population:
            raise SamplerError(f"elites must be fewer than the population of {population}, got {elites}")
        self.population, self.elites, self.switches, self.most = population, elites, switches, most
        self.attempts, self.p_entry = attempts, p_entry

    def shortfall(self, trials: int) -> str | None:
        if trials > self.population:
            return None
        return f"no plan of {trials} trials has a parent, as the first population={self.population} have none"

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        rng = self.rng(slot, attempt)
        generation = slot - (slot - self.population) % (self.population - self.elites)
        parents = [] if slot < self.population else self.best(history, before=generation)
        if not parents:
            return Proposal(self.initial(rng, slot - 1 if attempt == 0 else -1), "initial")
        parent = parents[rng.integers(len(parents))]
        return Proposal(self.child(rng, parent.x), "switch", (parent.number,))

    def best(self, history: list[Observation], before: int) -> list[Observation]:
        """The elites of the trials of earlier slots than `before`, different plans, best first."""
        finished = [obs for obs in history if obs.loss is not None and obs.slot < before]
        by_plan: dict[str, Observation] = {}
        for obs in sorted(finished, key=lambda obs: obs.loss or 0.0):
            by_plan.setdefault(obs.fingerprint, obs)
        return list(by_plan.values())[: self.elites]

    def initial(self, rng: np.random.Generator, number: int) -> Vector:
        """A plan without parents: laid out by the pattern of that number, or, where there is none, at random."""
        x, kept, patterns = self.space.sample(rng), self.space.keep_range, list(PATTERNS.values())
        if kept is None or kept.total is None or not 0 <= number < len(patterns):
            return x
        return self.space.with_counts(x, laid_out(patterns[number], kept))

    def child(self, rng: np.random.Generator, x: Vector) -> Vector:
        """A copy of `x` after its switches, and with noise on what is no count."""
        space, kept = self.space, self.space.keep_range
        varies = np.ones(space.size, dtype=bool)
        child = x.copy()
        if kept is not None:
            first = space.extras.start
            varies[first : first + len(space.groups)] = False
            child = space.with_counts(child, self.switched(rng, space.counts(x), kept))
        varies &= rng.random(space.size) < self.p_entry
        return space.snap(child + varies * space.step * rng.standard_normal(space.size))

    def switched(self, rng: np.random.Generator, counts: Counts, kept: KeepRange) -> Counts:
        """Counts after some switches, (groups,)."""
        child = counts.copy()
        left = int(rng.integers(1, self.switches + 1, 2).min())
        for _ in range(self.attempts):
            givers, takers = np.flatnonzero(child > kept.low), np.flatnonzero(child < kept.high)
            if not (left and len(givers) and len(takers)):
                break
            giver, taker = rng.choice(givers), rng.choice(takers)
            moved = int(rng.integers(1, self.most + 1)) * kept.unit
            if giver != taker and child[giver] - moved >= kept.low and child[taker] + moved <= kept.high:
                child[giver] -= moved
                child[taker] += moved
                left -= 1
        return child if len(set(kept.layers)) == 1 else kept.fill(child)


def laid_out(pattern: Callable[[Depths], Depths], kept: KeepRange) -> Counts:
    """Counts under a total, what is dropped being laid out by a pattern."""
    layers = np.array(kept.layers)
    weights = pattern(np.arange(len(layers), dtype=np.float64))
    dropped = kept.high * layers.sum() - (kept.total or 0)
    return kept.fill(kept.high - dropped * weights / (weights * layers).sum())
