"""EEP's evolutionary strategy: search prunings first, then merge, in one population (arXiv 2407.00945, section 3.3).

A proposal draws which group matrices change, each with probability `p_change`, at least one.

Prune phase, until the population holds `prune_until` solutions: a parent drawn uniformly from the solutions within
`band` of the best; in every changed W_EM each row is re-pointed, with probability `p_row`, to an expert that no
other row uses; W_RM follows W_EM.

Merge phase: with probability `p_crossover` the child is first crossed from two parents within `crossover_band` of the
best (the best `crossover_pool` at least): a changed matrix takes each row from the first parent with probability
`p_first`, an unchanged one comes whole from the first parent with probability `p_first`. Otherwise it starts from one
parent as above. Then every entry of a changed matrix gets, with probability `p_entry`, Gaussian noise of scale `sigma`,
and with probability `p_normalise` the rows of W_EM are divided by their sums.

What a space has beyond the matrices (experts active, see `ActiveSpace`) a child takes from its first parent, in either
phase, each number getting, with probability `p_entry`, Gaussian noise of its own step's scale.

The defaults are the configuration of the released code, but for two things: duplicates of known solutions are drawn
again (``redraw=0`` is as published), and entries are clipped to the space's bounds, [-1, 2]. The paper's Algorithm 1
also crosses over in the prune phase (`prune_crossover=True`) and spends 40 + 160 evaluations (`prune_until=40`). The
bands are in points of accuracy in the paper; for a loss they are standard deviations of the initial losses.

The released code differs in small things. It makes 31 initial solutions and merges once the population holds more than
100, which `initial=31, prune_until=101` is exactly. It draws a parent so that the first solution outside the band may
be one (2.5 to 5 % of draws), shuffles solutions of equal fitness, and draws duplicate initial solutions again. With it
as here, half of the children of the prune phase equal their parent, where `redraw` is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import SamplerError
from moeopt.plan import Matrix, ModelShape
from moeopt.samplers.base import GenomeSampler, Proposal
from moeopt.samplers.checks import check_at_least_0, check_counts, check_positive, check_probabilities
from moeopt.samplers.history import Observation
from moeopt.spaces.base import Phase, Space

Fitness = Literal["loss", "accuracy"]
OPERATORS = ("initial", *(f"{before}{phase}" for before in ("", "crossover+") for phase in get_args(Phase)))
"""What makes its trials."""
PUBLISHED = {"initial": 30, "prune_until": 100}
"""The population sizes of the released configuration, in a search of `PUBLISHED_TRIALS`."""
PUBLISHED_TRIALS = 400
BANDS: dict[str, tuple[float, float]] = {"loss": (0.3, 0.1), "accuracy": (3.0, 1.0)}


class EEPSampler(GenomeSampler):
    """EEP's two-phase evolutionary strategy as an Optuna sampler.

    On an `EEPSpace` it runs both phases, on a `PruneSpace` the first alone, on a `MergeSpace` the second alone.

    Args:
        space: what to search.
        seed, redraw: as for `GenomeSampler`. EEP as published is ``redraw=0``.
        initial: solutions before the first proposal: those enqueued (warm starts) and, for the rest, random ones.
        prune_until: population size at which the prune phase ends, the initial solutions counted.
        p_change: probability of a group matrix to change.
        p_row: probability of a row of a changed W_EM to be re-pointed (prune phase).
        p_crossover: probability of a crossover (merge phase; with `prune_crossover` also in the prune phase).
        p_first: probability of the first parent in a crossover.
        p_entry: probability of an entry of a changed matrix to get noise.
        sigma: standard deviation of that noise.
        p_normalise: probability of dividing the rows of W_EM by their sums.
        score: what the bands compare: ``"loss"``, or the trials' accuracy attribute.
        band, crossover_band: how far from the best a parent may be, a single one and one of two. For accuracy in
            percentage points (default 3.0 and 1.0), for a loss in standard deviations of the initial losses (default
            0.3 and 0.1).
            On a task whose random prunings differ much, a band of 0.1 found better solutions in as many trials
            (benchmarks/search_cost.py).
        crossover_pool: the best so many may always be crossed.
        prune_crossover: cross over in the prune phase too, as the paper's Algorithm 1.
    """

    name, operators = "eep", OPERATORS
    options = (
        "initial", "prune_until", "p_change", "p_row", "p_crossover", "p_first", "p_entry", "sigma",
        "p_normalise", "score", "band", "crossover_band", "crossover_pool", "prune_crossover",
    )  # fmt: skip

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        initial: int = PUBLISHED["initial"],
        prune_until: int = PUBLISHED["prune_until"],
        p_change: float = 0.25,
        p_row: float = 0.15,
        p_crossover: float = 0.3,
        p_first: float = 0.6,
        p_entry: float = 0.25,
        sigma: float = 0.065,
        p_normalise: float = 0.1,
        score: Fitness = "loss",
        band: float | None = None,
        crossover_band: float | None = None,
        crossover_pool: int = 6,
        prune_crossover: bool = False,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw)
        probabilities = {
            "p_change": p_change, "p_row": p_row, "p_crossover": p_crossover,
            "p_first": p_first, "p_entry": p_entry, "p_normalise": p_normalise,
        }  # fmt: skip
        check_probabilities(probabilities)
        if score not in get_args(Fitness):
            raise SamplerError(f"score must be 'loss' or 'accuracy', got {score!r}")
        check_counts({"initial": initial, "prune_until": prune_until, "crossover_pool": crossover_pool})
        check_positive({"sigma": sigma})
        bands = BANDS[score]
        self.initial, self.prune_until, self.crossover_pool = initial, prune_until, crossover_pool
        self.p_change, self.p_row, self.p_crossover, self.p_first = p_change, p_row, p_crossover, p_first
        self.p_entry, self.sigma, self.p_normalise = p_entry, sigma, p_normalise
        self.score: Fitness = score
        self.band = bands[0] if band is None else band
        self.crossover_band = bands[1] if crossover_band is None else crossover_band
        check_at_least_0({"band": self.band, "crossover_band": self.crossover_band})
        self.prune_crossover = prune_crossover

    def shortfall(self, trials: int) -> str | None:
        if trials <= self.initial:
            missing = f"all {trials} trials of EEP are random, as it first draws initial={self.initial} solutions"
        elif trials <= self.prune_until and len(self.space.phases) > 1:
            missing = f"EEP merges nothing in {trials} trials, as it prunes until it has prune_until={self.prune_until}"
        else:
            return None
        fitting = scaled(trials)
        if fitting == {"initial": self.initial, "prune_until": self.prune_until}:
            return missing
        options = ", ".join(f"{name}={value}" for name, value in fitting.items())
        return f"{missing}; in proportion to what is published for {PUBLISHED_TRIALS} trials it would be {options}"

    def phase(self, population: int) -> str:
        """The phase in which a population of so many finished solutions is."""
        if len(self.space.phases) == 1:
            return self.space.phases[0]
        return "prune" if population < self.prune_until else "merge"

    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        rng = self.rng(slot, attempt)
        population = [obs for obs in history if obs.loss is not None]
        if not population or len(history) < self.initial:
            return Proposal(self.space.sample(rng), "initial", phase=self.space.phases[0])
        phase, space = self.phase(len(population)), self.space
        changed = rng.random((len(self.space.groups), 2)) < self.p_change
        varies = np.array([True, space.router != "rows"])  # W_RM that follows is nothing to change
        while not (changed & varies).any():
            changed = rng.random(changed.shape) < (self.p_change or 1.0)
        changed &= varies
        if phase == "prune" and len(self.space.phases) > 1:
            population = [obs for obs in population if _is_pruning(self.space.matrices(obs.x))] or population
        crossing = (phase == "merge" or self.prune_crossover) and len(population) > 1
        if crossing and rng.random() < self.p_crossover:
            pool = self.parents(population, self.crossover_band, self.crossover_pool)
            first, second = (pool[i] for i in rng.choice(len(pool), 2, replace=False))
            child = self.crossover(rng, space.matrices(first.x), space.matrices(second.x), changed, phase)
            parents: tuple[int, ...] = (first.number, second.number)
            operator = f"crossover+{phase}"
        else:
            pool = self.parents(population, self.band)
            first = pool[rng.integers(len(pool))]
            child, parents, operator = space.matrices(first.x).copy(), (first.number,), phase
        mutate = self.repoint if phase == "prune" else self.perturb
        x = space.with_matrices(first.x, mutate(rng, child, changed))
        step = space.step[space.extras]
        x[space.extras] += (rng.random(step.size) < self.p_entry) * step * rng.standard_normal(step.size)
        return Proposal(x, operator, parents, phase)

    def parents(self, population: list[Observation], band: float, least: int = 1) -> list[Observation]:
        """Solutions within the band of the best, and the `least` best ones at any rate; best first."""
        scores = np.array([self._badness(obs) for obs in population])
        spread = 1.0
        if self.score == "loss":
            first = [obs.loss for obs in population if obs.loss is not None][: self.initial]
            spread = float(np.std(first))
        order = np.argsort(scores, kind="stable")
        within = int((scores <= scores.min() + band * spread).sum())
        return [population[i] for i in order[: max(within, least)]]

    def _badness(self, obs: Observation) -> float:
        assert obs.loss is not None
        if self.score == "loss":
            return obs.loss
        accuracy = obs.attrs.get("accuracy")
        if not isinstance(accuracy, (int, float)):
            raise SamplerError(
                f"score='accuracy' needs trials with an 'accuracy' attribute; trial {obs.number} has none"
            )
        return -100.0 * accuracy

    def repoint(self, rng: np.random.Generator, child: Matrix, changed: NDArray[np.bool_]) -> Matrix:
        """Prune mutation of (groups, 2, r, n): rows re-pointed to experts that no other row of the group uses.

        Where routers choose among groups of experts first, to one of the row's own.
        """
        n = child.shape[3]
        for group in np.flatnonzero(changed[:, 0]):
            rows = child[group, 0].argmax(axis=1)
            for i in range(len(rows)):
                if rng.random() < self.p_row:
                    free = np.setdiff1d(self.space.shape.same_group(rows[i]), np.delete(rows, i))
                    rows[i] = rng.choice(free) if free.size else rows[i]
            child[group] = np.eye(n, dtype=np.float32)[rows]
        return child

    def perturb(self, rng: np.random.Generator, child: Matrix, changed: NDArray[np.bool_]) -> Matrix:
        """Merge mutation of (groups, 2, r, n): noise on entries of changed matrices, W_EM perhaps normalised."""
        hit = changed[:, :, None, None] & (rng.random(child.shape) < self.p_entry)
        child = np.where(hit, child + self.sigma * rng.standard_normal(child.shape), child).astype(np.float32)
        if rng.random() < self.p_normalise:
            sums = child[:, 0].sum(axis=2, keepdims=True)
            child[:, 0] = np.where(np.abs(sums) > 1e-3, child[:, 0] / np.where(sums == 0, 1, sums), child[:, 0])
        return child

    def crossover(
        self, rng: np.random.Generator, first: Matrix, second: Matrix, changed: NDArray[np.bool_], phase: str
    ) -> Matrix:
        """A child of two (groups, 2, r, n): by rows in changed matrices, whole matrices elsewhere."""
        rows = rng.random(first.shape[:3]) < self.p_first
        whole = rng.random(first.shape[:2]) < self.p_first
        from_first = np.where(changed[:, :, None], rows, whole[:, :, None])
        if phase == "prune":
            from_first[:, 1] = from_first[:, 0]
        child = np.where(from_first[..., None], first, second)
        if phase == "prune":
            _make_distinct(rng, child, self.space.shape)
        return child


def scaled(trials: int, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`initial` and `prune_until` of a search of so many trials, those given as they are.

    From `PUBLISHED_TRIALS` on they are the published ones, below in proportion, with two initial solutions and one
    pruning of them at least.

    >>> scaled(30), scaled(1000), scaled(30, {"initial": 10})
    ({'initial': 2, 'prune_until': 8}, {'initial': 30, 'prune_until': 100}, {'initial': 10, 'prune_until': 11})
    """
    sizes = {name: (given or {}).get(name, value) for name, value in PUBLISHED.items()}
    if trials >= PUBLISHED_TRIALS:
        return sizes
    initial, prune_until = (round(trials * value / PUBLISHED_TRIALS) for value in PUBLISHED.values())
    if "initial" not in (given or {}):
        until = sizes["prune_until"]
        sizes["initial"] = max(2, min(initial, until if isinstance(until, int) else initial))
    if "prune_until" not in (given or {}):
        least = sizes["initial"] + 1 if isinstance(sizes["initial"], int) else 1
        sizes["prune_until"] = max(least, prune_until)
    return sizes


def _is_pruning(matrices: Matrix) -> bool:
    return bool(((matrices == 0) | (matrices == 1)).all())


def _make_distinct(rng: np.random.Generator, child: Matrix, shape: ModelShape) -> None:
    """Re-point rows that a crossover made equal, so that a pruning keeps r distinct experts."""
    n = child.shape[3]
    for group in child:
        rows = group[0].argmax(axis=1)
        for i in range(1, len(rows)):
            if rows[i] in rows[:i]:
                free = np.setdiff1d(shape.same_group(rows[i]), rows)
                rows[i] = rng.choice(free) if free.size else rows[i]
        group[:] = np.eye(n, dtype=np.float32)[rows]
