"""Local search in windows of consecutive layer groups, chosen by expected gain per layer-token.

A trial whose plan first differs from its parent's at layer l runs only the layers from l on (prefix reuse), so a change
near the end is cheap. A proposal changes one window of consecutive groups of one parent, drawn uniformly from the
`population` best trials; one is hill climbing. The best of many noisy losses is a lucky one that hardly any child
beats, so a parent's loss counts for more with every child it has (`fade`). Of several objectives every slot minimises
a function of its own (`moeopt.samplers.tradeoffs`), in place of the loss.

What to change is the choice of a bandit (see `moeopt.samplers.bandit`): an arm is (move, groups in the window, band of
depth in which it begins), its reward max(0, parent's loss - trial's loss), its cost the layers run. Moves are those of
`moeopt.samplers.moves`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeopt.errors import SamplerError
from moeopt.plan import Matrix, Plan
from moeopt.samplers.bandit import choose, gain, layers_run, most_tokens
from moeopt.samplers.base import Proposal, StartingSampler
from moeopt.samplers.checks import check_at_least_0, check_counts, check_positive
from moeopt.samplers.history import Observation, noted
from moeopt.samplers.moves import ACTIVE, MAPPING, MOVES, NOISY, usual_moves
from moeopt.samplers.tradeoffs import Scalarisation, scalarisation, scalarised
from moeopt.spaces.base import Space
from moeopt.trials.genome import Vector

RUNGS = 4
"""At how many rungs trials race by default: at equal cost, that searches some four times the examples."""


@dataclass(frozen=True)
class Arm:
    """What the bandit chooses among: a move, the groups a window has, and the band of depth where it begins."""

    move: str
    width: int
    band: int


class LocalSampler(StartingSampler):
    """Hill climbing, or a small population, in windows of consecutive layer groups.

    Args:
        space: what to search.
        seed, redraw: as for `GenomeSampler`.
        start: the plan or vector (size,) of the search's own first trial; by default `space.start()`, where no
            trial was enqueued before.
        population: parents are drawn from so many best trials, enqueued ones among them.
        fade: what every child adds to its parent's loss when parents are chosen, in lower quartiles of the absolute
            difference between child and parent.
        widths: how many consecutive groups a window may have; those beyond the space's groups are left out.
        bands: parts of the depth, of equal numbers of groups, whose gains the bandit tells apart.
        moves: which moves to use, as far as the space has them; by default those of `usual_moves`.
        sigma: largest standard deviation of noise, as a multiple of `space.step`; each proposal draws its own,
            log-uniformly, from a sixteenth of it up.
        p_entry: probability of an entry of the window to get noise (move ``active``: of a number; one does at least).
        prior: weight of the mean over all arms in an arm's posterior, in trials.
        memory: trials after which one counts 1 / e in the posterior.

    Raises:
        SamplerError: naming the argument that does not fit.
        SpaceError: when `start` is not of this space.
    """

    name, operators, several = "local", (*MOVES, ACTIVE), True
    options: tuple[str, ...] = ("population", "fade", "bands", "sigma", "p_entry", "prior", "memory", "widths", "moves")

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
        population: int = 1,
        fade: float = 0.1,
        widths: Sequence[int] = (1, 2, 3),
        bands: int = 4,
        moves: Sequence[str] | None = None,
        sigma: float = 2.0,
        p_entry: float = 0.5,
        prior: float = 3.0,
        memory: float = 50.0,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start)
        check_counts({"population": population, "bands": bands, **{f"widths[{i}]": w for i, w in enumerate(widths)}})
        check_positive({"sigma": sigma, "prior": prior, "memory": memory})
        check_at_least_0({"fade": fade})
        if not 0 < p_entry <= 1:
            raise SamplerError(f"p_entry is a probability above 0 and at most 1, got {p_entry!r}")
        if not widths:
            raise SamplerError("widths must name at least one width")
        able = [move for move, (phase, _) in MOVES.items() if phase in space.phases]
        able = [move for move in able if move not in MAPPING or space.router != "rows"]
        able += [ACTIVE] if space.extra_groups else []
        moves = usual_moves(space) if moves is None else moves
        self.moves = tuple(move for move in moves if move in able)
        if not self.moves or set(moves) - {*MOVES, ACTIVE}:
            raise SamplerError(f"moves must be some of {', '.join(able)} for this space, got {list(moves)}")
        self.goal: Scalarisation | None = None
        """What the slot that is asked for minimises, where there are several objectives."""
        self.population, self.bands, self.p_entry = population, bands, p_entry
        self.fade, self.sigma, self.prior, self.memory = float(fade), float(sigma), float(prior), float(memory)
        most = max(len(self.groups(move)) for move in self.moves)
        self.widths = tuple(sorted({w for w in widths if w <= most})) or (most,)

    def opens(self, history: list[Observation], slot: int) -> bool:
        # What was enqueued is a start as well: the space's own is then of no use.
        return super().opens(history, slot) and (self.given or not history)

    def settings(self) -> dict[str, Any]:
        return super().settings() | ({} if self.given else {"start": None})

    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        self.goal = scalarisation(history, slot, self.seed) if self.history.objectives > 1 else None
        return super().propose(history if self.goal is None else scalarised(history, self.goal), slot, attempt)

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        rng = self.rng(slot, attempt)
        parent = self.parent(rng, history)
        arm = self.arm(rng, history)
        first = int(rng.choice(self.begins(arm)))
        groups = range(first, first + arm.width)
        x, change = self.x0 if parent is None else parent.x, self.activated if arm.move == ACTIVE else self.moved
        notes = {"first": first, "width": arm.width, "parent": None if parent is None else parent.slot}
        phase = "active" if arm.move == ACTIVE else MOVES[arm.move][0]
        parents = () if parent is None else (parent.number,)
        return Proposal(change(rng, x, arm.move, groups), arm.move, parents, phase, notes)

    def parent(self, rng: np.random.Generator, history: list[Observation]) -> Observation | None:
        """One of the best `population` trials with different plans, a trial's loss counting for more with every child
        that it has; None, for the start, while nothing is finished."""
        finished = {obs.slot: obs for obs in history if obs.loss is not None}
        families = [(obs, finished.get(obs.notes["parent"])) for obs in finished.values() if self.is_ours(obs)]
        changes = [(obs.loss or 0.0) - (parent.loss or 0.0) for obs, parent in families if parent is not None]
        children = Counter(obs.notes["parent"] for obs, _ in families)
        step = self.fade * float(np.quantile(np.abs(changes), 0.25)) if changes else 0.0
        ranked = sorted(finished.values(), key=lambda obs: (obs.loss or 0.0) + step * children[obs.slot])
        by_plan: dict[str, Observation] = {}
        for obs in ranked:
            by_plan.setdefault(obs.fingerprint, obs)
        best = list(by_plan.values())[: self.population]
        return best[rng.integers(len(best))] if best else None

    def is_ours(self, obs: Observation) -> bool:
        """Whether a trial is a move of this sampler."""
        if obs.operator not in self.moves or "parent" not in obs.notes:
            return False
        first, width = noted(obs, "first"), noted(obs, "width")
        has_parent = obs.notes["parent"] is None or noted(obs, "parent") is not None
        return has_parent and None not in (first, width) and (first or 0) < len(self.groups(obs.operator))

    def groups(self, move: str) -> Sequence[tuple[int, int]]:
        """The layer ranges that the windows of a move are made of."""
        return self.space.extra_groups if move == ACTIVE else self.space.groups

    def band(self, first: int, move: str = "swap") -> int:
        """The band of depth of a window that begins at group `first`."""
        return first * self.bands // len(self.groups(move))

    def arms(self) -> list[Arm]:
        arms: list[Arm] = []
        for move in self.moves:
            count = len(self.groups(move))
            widths = [width for width in self.widths if width <= count] or [count]
            windows = {(width, self.band(first, move)) for width in widths for first in range(count - width + 1)}
            arms += [Arm(move, *window) for window in sorted(windows)]
        return arms

    def begins(self, arm: Arm) -> list[int]:
        """The groups at which a window of the arm may begin."""
        firsts = range(len(self.groups(arm.move)) - arm.width + 1)
        return [first for first in firsts if self.band(first, arm.move) == arm.band]

    def arm(self, rng: np.random.Generator, history: list[Observation]) -> Arm:
        """The bandit's choice."""
        return choose(rng, self.arms(), self.plays(history), prior=self.prior, memory=self.memory)

    def plays(self, history: list[Observation]) -> list[tuple[Arm, float, float]]:
        """Arm, gain and cost (in layers run) of every finished proposal of this sampler, by slot."""
        by_slot, whole = {obs.slot: obs for obs in history}, most_tokens(history)
        plays = []
        for obs in history:
            if not self.is_ours(obs) or (obs.loss is None and not obs.failed):
                continue
            parent, first = by_slot.get(obs.notes["parent"]), obs.notes["first"]
            arm = Arm(obs.operator, obs.notes["width"], self.band(first, obs.operator))
            plays.append((arm, gain(obs, parent), self.cost(obs, whole)))
        return plays

    def cost(self, obs: Observation, whole: float) -> float:
        """What a proposal of this sampler cost, in layers over all examples; `whole` as for `layers_run`."""
        return layers_run(obs, self.space, self.groups(obs.operator)[obs.notes["first"]][0], whole)

    def moved(self, rng: np.random.Generator, x: Vector, move: str, groups: range) -> Vector:
        """A copy of `x` after the move; numbers of other groups than these stay as they are."""
        matrices = self.space.matrices(x).copy()
        scale = self.sigma * float(self.space.step[0]) * 16 ** -rng.random()
        for group in groups:
            pair = matrices[group] if move in NOISY else self._one_router_group(rng, matrices[group])
            MOVES[move][1](rng, pair, scale, self.p_entry)
        window, matrices_part = slice(groups.start, groups.stop), slice(0, self.space.extras.start)
        # A space may write a group's matrices in other numbers than before; those outside of the window stay.
        child, changed = x.copy(), self.space.with_matrices(x, matrices)
        parts = [vector[matrices_part].reshape(len(self.space.groups), -1) for vector in (child, changed)]
        parts[0][window] = parts[1][window]
        return self.space.snap(child)

    def _one_router_group(self, rng: np.random.Generator, pair: Matrix) -> Matrix:
        """A view of what a pair, (2, r, n), makes of the experts of one of the groups that routers choose first."""
        parts = self.space.shape.router_groups
        if parts == 1:
            return pair
        part, (_, r, n) = int(rng.integers(parts)), pair.shape
        r, n = r // parts, n // parts
        return pair[:, part * r : (part + 1) * r, part * n : (part + 1) * n]

    def activated(self, rng: np.random.Generator, x: Vector, move: str, groups: range) -> Vector:
        """A copy of `x` with other extras in these of their groups; integers go a step up or down, where they can."""
        space, child = self.space, x.copy()
        ranges = len(space.extra_groups)
        numbers = np.arange(space.extras.start, space.size).reshape(-1, ranges)[:, groups.start : groups.stop]
        chosen = numbers[rng.random(numbers.shape) < self.p_entry]
        if not chosen.size:
            chosen = rng.choice(numbers.reshape(-1), 1)
        scale = self.sigma * 16 ** -rng.random()
        noise = scale * space.step[chosen] * rng.standard_normal(chosen.size)
        up = np.where(x[chosen] <= space.low[chosen], True, (x[chosen] < space.high[chosen]) & (noise > 0))
        child[chosen] += np.where(space.whole[chosen], np.where(up, 1, -1), noise)
        child = space.snap(child)
        if space.keep_range is None:
            return child
        first = space.extras.start
        unit = np.where(chosen < first + ranges, space.keep_range.unit, 1)
        child[chosen] = np.clip(x[chosen] + unit * (child[chosen] - x[chosen]), space.low[chosen], space.high[chosen])
        changed = [int(number - first) for number in chosen if number < first + ranges]
        return space.with_counts(child, space.keep_range.shift(rng, child[first : first + ranges], changed))
