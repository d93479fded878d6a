"""Block-coordinate search: CMA-ES on the numbers of a few consecutive layer groups, then on those of others.

A block is a window of consecutive groups with at most `block_size` numbers (a part of one group where a group has
more), so that all trials of a block share the layers before it (prefix reuse). What a space has beyond the matrices
(see `ActiveSpace`) makes blocks of its own. Within a block CMA-ES runs for
`generations` around the best point so far; numbers outside the block stay as they are there. The next block is the
choice of a bandit (see `moeopt.samplers.bandit`), whose reward is what a trial of the block won over that point.

As in `moeopt.samplers.cmaes`, nothing of the optimiser is stored: proposals note block, generation and centre, and
it is rebuilt by telling it the first `population_size` finished trials of each generation, by slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.plan import Plan
from moeopt.samplers.bandit import choose, gain, layers_run, most_tokens
from moeopt.samplers.base import Proposal, StartingSampler
from moeopt.samplers.checks import check_counts, check_positive
from moeopt.samplers.cmaes import complete, tell
from moeopt.samplers.history import Observation, noted
from moeopt.spaces.base import Space
from moeopt.trials.genome import Vector

OPERATOR = "blockcmaes"


Block = tuple[int, int]
"""First number of a block, and the one after its last; of a block of extras, among the first kind of them."""


@dataclass(frozen=True)
class Visit:
    """A run of CMA-ES in one block.

    Args:
        number: visits before it.
        block: it.
        around: the trial at the first mean; None stands for the sampler's start.
        generations: the finished trials to tell, of each complete generation.
    """

    number: int
    block: Block
    around: Observation | None
    generations: list[list[Observation]]


class BlockCMAESSampler(StartingSampler):
    """CMA-ES in blocks of consecutive layer groups.

    Args:
        space: what to search.
        seed, redraw: as for `GenomeSampler`.
        sigma: first standard deviation of each number of a block, as a multiple of `space.step`.
        start: the plan or vector (size,) to start at; by default `space.start()`.
        block_size: most numbers of a block.
        generations: CMA-ES generations a block.
        population_size: trials per generation; by default 4 + floor(3 ln d) for a block of d numbers.
        prior, memory: the bandit's, in trials.

    Raises:
        SamplerError: naming the argument that does not fit.
        SpaceError: when `start` is not of this space.
    """

    name, operators = "blockcmaes", (OPERATOR,)
    options = ("sigma", "block_size", "generations", "population_size", "prior", "memory")

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        sigma: float = 1.0,
        start: Plan | ArrayLike | None = None,
        block_size: int = 100,
        generations: int = 3,
        population_size: int | None = None,
        prior: float = 10.0,
        memory: float = 200.0,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start)
        check_positive({"sigma": sigma, "prior": prior, "memory": memory})
        check_counts({"block_size": block_size, "generations": generations})
        if population_size is not None:
            check_counts({"population_size": population_size}, least=4)
        self.sigma, self.prior, self.memory = float(sigma), float(prior), float(memory)
        self.block_size, self.generations, self.population_size = block_size, generations, population_size
        self.blocks = blocks(space, block_size)

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        rng = self.rng(slot, attempt)
        visit = self.visit(rng, history)
        part, center = self.numbers(visit.block), self.x0 if visit.around is None else visit.around.x
        optimizer = self._optimizer(visit, center)
        optimizer.reseed_rng(int(rng.integers(1 << 32)))
        x = center.astype(np.float64)
        x[part] += optimizer.ask() * self.space.step[part]
        around, parents = (None, ()) if visit.around is None else (visit.around.slot, (visit.around.number,))
        notes = {"visit": visit.number, "block": visit.block, "around": around, "generation": len(visit.generations)}
        return Proposal(x, OPERATOR, parents, notes=notes)

    def visit(self, rng: np.random.Generator, history: list[Observation]) -> Visit:
        """The visit that goes on, or a new one: around the best trial so far, of the block that the bandit chooses."""
        by_slot = {obs.slot: obs for obs in history}
        ours = [obs for obs in history if self.is_ours(obs)]
        number = max((obs.notes["visit"] for obs in ours), default=-1)
        latest = [obs for obs in ours if obs.notes["visit"] == number]
        if latest:
            block, around = latest[0].notes["block"], latest[0].notes["around"]
            same = [obs for obs in latest if (obs.notes["block"], obs.notes["around"]) == (block, around)]
            generations = complete(same, self.trials(block))
            if len(generations) < self.generations:
                return Visit(number, tuple(block), by_slot.get(around), generations)
        finished = [obs for obs in history if obs.loss is not None]
        best = min(finished, key=lambda obs: obs.loss or 0.0, default=None)
        plays, whole = [], most_tokens(history)
        for obs in ours:
            if obs.loss is None and not obs.failed:
                continue
            block, center = tuple(obs.notes["block"]), by_slot.get(obs.notes["around"])
            plays.append((block, gain(obs, center), layers_run(obs, self.space, self.layer(block), whole)))
        return Visit(number + 1, choose(rng, self.blocks, plays, prior=self.prior, memory=self.memory), best, [])

    def is_ours(self, obs: Observation) -> bool:
        """Whether a trial is of a visit of this sampler."""
        if obs.operator != OPERATOR or None in (noted(obs, "visit"), noted(obs, "generation")):
            return False
        block, around = obs.notes.get("block"), obs.notes.get("around", ...)
        has_centre = around is None or noted(obs, "around") is not None
        return has_centre and isinstance(block, list | tuple) and tuple(block) in self.blocks

    def layer(self, block: Block) -> int:
        """The first layer of a block."""
        matrices = int(self.space.extras.start)
        if block[0] < matrices:
            return self.space.groups[block[0] * len(self.space.groups) // matrices][0]
        return self.space.extra_groups[block[0] - matrices][0]

    def trials(self, block: Block) -> int:
        """Trials of a generation in this block."""
        return self.population_size or 4 + math.floor(3 * math.log(len(self.numbers(block))))

    def numbers(self, block: Block) -> NDArray[np.intp]:
        """The numbers of a block: of extras, every kind of the same layers."""
        numbers, ranges = np.arange(*block), len(self.space.extra_groups)
        if block[0] < self.space.extras.start:
            return numbers
        return (numbers + np.arange(0, self.space.size - self.space.extras.start, ranges)[:, None]).reshape(-1)

    def _optimizer(self, visit: Visit, center: Vector) -> Any:
        """The optimiser of a visit, in z = (x - center) / step, told its complete generations."""
        from cmaes import CMA

        part = self.numbers(visit.block)
        mean, step = center[part].astype(np.float64), self.space.step[part]
        bounds = np.stack([(self.space.low[part] - mean) / step, (self.space.high[part] - mean) / step], axis=1)
        optimizer = CMA(
            mean=np.zeros(len(mean)), sigma=self.sigma, seed=0, bounds=bounds, n_max_resampling=0,
            population_size=self.trials(visit.block),
        )  # fmt: skip
        for generation in visit.generations:
            tell(optimizer, generation, [(obs.x[part] - mean) / step for obs in generation])
        return optimizer


def blocks(space: Space, size: int) -> tuple[Block, ...]:
    """All numbers of a space in consecutive blocks of about equal size, at most `size`; none ends within a group
    unless it is a part of that group alone."""
    matrices, ranges = space.extras.start, len(space.extra_groups)
    chosen: list[Block] = []
    if matrices:
        chosen += _blocks(len(space.groups), matrices // len(space.groups), size)
    if ranges:
        kinds = (space.size - matrices) // ranges
        chosen += [(matrices + a, matrices + b) for a, b in _blocks(ranges, 1, max(1, size // kinds))]
    return tuple(chosen)


def _blocks(groups: int, per_group: int, size: int) -> list[Block]:
    """Blocks of so many groups with so many numbers each."""
    if per_group <= size:
        parts = np.array_split(np.arange(groups), math.ceil(groups / (size // per_group)))
        return [(int(part[0]) * per_group, (int(part[-1]) + 1) * per_group) for part in parts]
    parts = np.array_split(np.arange(per_group), math.ceil(per_group / size))
    firsts = range(0, groups * per_group, per_group)
    return [(first + int(part[0]), first + int(part[-1]) + 1) for first in firsts for part in parts]
