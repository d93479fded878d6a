"""Local search that looks where the loss's derivative points, and learns from what came of it.

The objective leaves guides (`moeopt.trials.guide`, `Objective(guide=...)`): what every expert of every MoE layer, taken
out of the best pruning or back in, would change of the loss. Summed over a group's layers, they give each of its
experts a value v_e = a signed_e + b squared_e, what having it costs: of a kept one, minus what its loss costs. Near the
pruning G of the guide, a pruning S that shares all else has the loss

    loss(S) = loss(G) + sum over e of ([e in S] - [e in G]) v_e + noise,

a linear model whose noise stands for what experts change together, and grows with the number of experts that differ.
Every trial of a pruning tells of it. So (a, b), begun at (1, 1.5), is a ridge fit to the trials; v has the guide's
numbers as its prior mean, with a spread in proportion to them; a proposal draws v from its posterior (Thompson
sampling, by Matheron's rule) and takes the swaps that gain most by that draw per layer that is run again: up to
`radius` groups change at once, all from the first changed layer on. The radius doubles when a trial gains at least a
quarter of what was predicted, and is halved when it gains nothing.

Where `patience` such trials after another gained nothing since the last guide, their gains compete with those of
`local`'s moves in a bandit; without a guide, where nothing is kept as it is, and in spaces that hold no prunings, the
search is `local`.

Where a space searches how many experts groups keep, experts are dropped and taken back as well, one step after another
(`moeopt.samplers.steps`), under its total. Of several objectives a slot minimises its own function of them
(`moeopt.samplers.tradeoffs`): a walk along the front, by the guide of the pruning that is nearest to its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SpaceError
from moeopt.plan import Plan
from moeopt.samplers.bandit import choose, gain, most_tokens
from moeopt.samplers.base import Proposal
from moeopt.samplers.checks import check_counts
from moeopt.samplers.history import Observation, noted
from moeopt.samplers.local import LocalSampler
from moeopt.samplers.steps import Floats, Goal, Steps
from moeopt.spaces.base import Space

GUIDED = "guided"
"""The move."""
SHARE = 0.3
"""The share of layer-tokens that guides may take (`Objective(guide=)`), where nobody says another."""
SIGNED, SQUARED = 1.0, 1.5
"""What (a, b) is before any trial: gauss_newton 3 of `loss_aware`, the best where experts differ."""
SPREAD = 0.5
"""Prior standard deviation of a value, in its own and the values' median absolute size."""
WIDER = 0.25
"""What every further draw of a proposal adds to the prior's spread, in parts of it."""
INTERACTION = 0.5
"""Standard deviation of the noise, in the prior's of what differs."""

LOCAL = 0.2
"""The share of local moves where there are several objectives."""
STARTS = 4
"""Groups, from the first on, at which walks are tried to begin."""

Values = NDArray[np.floating[Any]]


class GuidedSampler(LocalSampler):
    """See the top of this file.

    Args:
        space, seed, redraw, start, population, fade, moves: as for `LocalSampler`; moves are what else is tried.
        radius: groups that the first guided trial may change at once; None: half of them.
        patience: guided trials without a gain after which local moves are tried, too.

    Raises:
        SamplerError: naming the argument that does not fit.
        SpaceError: when `start` is not of this space.
    """

    name, operators = GUIDED, (GUIDED, *LocalSampler.operators)
    options: tuple[str, ...] = ("radius", "patience", "population", "fade", "moves")

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
        radius: int | None = None,
        patience: int = 6,
        population: int = 1,
        fade: float = 0.1,
        moves: Sequence[str] | None = None,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start, population=population, fade=fade, moves=moves)
        check_counts({"patience": patience, **({} if radius is None else {"radius": radius})})
        self.radius, self.patience = radius, patience
        self._rows: dict[str, NDArray[np.bool_] | None] = {}

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        rng = self.rng(slot, attempt)
        parent = self.parent(rng, history)
        model = self.model(history, parent)
        if parent is not None and model is not None and self.trusts(rng, history):
            # Draws that agree on a plan which the study holds already are made from a wider belief.
            widen = 1 + WIDER * attempt
            radius = self.reach(history, model.since)
            if self.space.keep_range is None and self.goal is None:
                proposal = self.swapped(rng, parent, model, radius, widen)
            else:
                proposal = self.walked(rng, parent, model, self._goal(parent, history), radius, widen)
            if proposal is not None:
                return proposal
        return super().search(history, slot, attempt)

    def is_ours(self, obs: Observation) -> bool:
        return self.is_guided(obs) or super().is_ours(obs)

    def is_guided(self, obs: Observation) -> bool:
        """Whether a trial came of a guide."""
        return obs.operator == GUIDED and noted(obs, "parent") is not None and noted(obs, "first") is not None

    def plays(self, history: list[Observation]) -> list[tuple[Any, float, float]]:
        return super().plays([obs for obs in history if not self.is_guided(obs)])

    def trusts(self, rng: np.random.Generator, history: list[Observation]) -> bool:
        """Whether the next trial is a guided one."""
        if self.goal is not None:  # what another slot gained is told by another goal
            return rng.random() >= LOCAL
        by_slot, whole = {obs.slot: obs for obs in history}, most_tokens(history)
        tried = [t for t in history if self.is_ours(t) and (t.loss is not None or t.failed)]
        plays = [(self.is_guided(t), gain(t, by_slot.get(t.notes["parent"])), self.cost(t, whole)) for t in tried]
        guide = max((obs.slot for obs in history if obs.guide is not None), default=-1)
        fails = 0
        for obs, (guided, won, _) in zip(tried, plays):
            fails = 0 if obs.slot <= guide or won > 0 else fails + guided
        return fails < self.patience or choose(rng, [True, False], plays, prior=self.prior, memory=self.memory)

    def rows(self, obs: Observation) -> NDArray[np.bool_] | None:
        """Which experts a trial's groups keep, bool (groups, n); None where it does not keep experts as they are."""
        if obs.fingerprint not in self._rows:
            try:
                self._rows[obs.fingerprint] = self.space.kept(obs.x)
            except SpaceError:
                self._rows[obs.fingerprint] = None
        return self._rows[obs.fingerprint]

    def model(self, history: list[Observation], parent: Observation | None = None) -> _Model | None:
        """What a guide, and the trials so far, tell of the values of experts; None without a guide.

        It is the last one, or, of several objectives, that of the pruning which the parent is least different from.
        """
        if "prune" not in self.space.phases:
            return None
        rows: dict[str, NDArray[np.bool_]] = {}
        losses: dict[str, float] = {}
        for obs in history:
            loss = obs.loss if self.goal is None or obs.values is None else obs.values[self.history.loss_at]
            if loss is not None and obs.fingerprint not in rows and (kept := self.rows(obs)) is not None:
                rows[obs.fingerprint], losses[obs.fingerprint] = kept, loss
        guided = [obs for obs in reversed(history) if obs.guide is not None]
        near = None if self.goal is None or parent is None else rows.get(parent.fingerprint)
        if near is not None:
            guided = [obs for obs in guided if obs.guide is not None and obs.guide.plan in rows]
            guided.sort(key=lambda obs: int((rows[obs.guide.plan] != near).sum()) if obs.guide else 0)
        for obs in guided:
            if obs.guide is not None and obs.guide.plan in rows:
                signed, squared = (
                    np.stack([part[first : last + 1].sum(0) for first, last in self.space.groups]).astype(np.float64)
                    for part in (obs.guide.signed, obs.guide.squared)
                )
                base, sign = rows[obs.guide.plan], np.where(rows[obs.guide.plan], -1.0, 1.0)
                others = [plan for plan in rows if plan != obs.guide.plan]
                differing = np.array([rows[plan].astype(float) - base for plan in others])
                changes = np.array([losses[plan] - losses[obs.guide.plan] for plan in others])
                return _Model(
                    obs.slot, sign * signed, sign * squared, differing.reshape(len(others), base.size), changes
                )
        return None

    def reach(self, history: Sequence[Observation], since: int) -> int:
        """How many groups may change at once."""
        by_slot = {obs.slot: obs for obs in history}
        most = len(self.space.groups)
        radius = max(1, most // 2) if self.radius is None else min(self.radius, most)
        if self.goal is not None:  # steps; along a front they are many
            return radius if self.radius is not None else max(most, most * self.space.shape.experts // 8)
        for obs in history:
            if self.is_guided(obs) and obs.slot > since and (obs.loss is not None or obs.failed):
                won, predicted = gain(obs, by_slot.get(obs.notes["parent"])), obs.notes.get("predicted")
                if won > 0 and isinstance(predicted, float) and won >= predicted / 4:
                    radius = min(2 * radius, most)
                elif won == 0:
                    radius = max(1, radius // 2)
        return radius

    def walked(
        self, rng: np.random.Generator, parent: Observation, model: _Model, goal: Goal, radius: int, widen: float = 1.0
    ) -> Proposal | None:
        """The parent after a walk that gains most by a draw, per layer that is run again; None where none gains.

        Of several objectives those beside the loss are taken for proportional to the experts that are kept.
        """
        kept = self.rows(parent)
        if kept is None:
            return None
        drawn, mean = model.draw(rng, widen).reshape(kept.shape), model.mean().reshape(kept.shape)
        layers = self.space.shape.layers
        steps, count = Steps(self.space, np.asarray(drawn, dtype=np.float64)), len(kept)
        starts = sorted({count * part // STARTS for part in range(STARTS)})
        walks = [(self.space.groups[first][0], steps.walk(kept, goal, first, radius)) for first in starts]
        rates = [walk.gained / (layers - first) for first, walk in walks]
        _, best = walks[int(np.argmax(rates))]
        if not best.groups.size:
            return None
        differ = np.where(best.kept == kept, 0.0, np.where(best.kept, 1.0, -1.0))
        notes = {
            "first": int(best.groups[0]), "width": len(best.groups), "parent": parent.slot,
            "predicted": -float((differ * mean).sum()),
        }  # fmt: skip
        x = self.space.with_kept(parent.x, best.kept, best.groups)
        return Proposal(x, GUIDED, (parent.number,), "prune", notes)

    def _goal(self, parent: Observation, history: Sequence[Observation]) -> Goal:
        """What a walk from a parent minimises."""
        chosen, values = self.goal, parent.values
        if chosen is None or values is None:
            return lambda loss, experts: loss
        at, slopes = self.history.loss_at, self._slopes(history)

        def goal(loss: Floats, experts: NDArray[np.int64]) -> Floats:
            reached = np.tile(np.array(values), (len(loss), 1))
            reached[:, at] += loss
            for i, slope in slopes.items():
                reached[:, i] += slope * experts
            return chosen(reached)

        return goal

    def _slopes(self, history: Sequence[Observation]) -> dict[int, float]:
        """What one more expert adds to each objective but the loss, by its place: least squares over the trials."""
        ended = [obs for obs in history if obs.values is not None]
        layers = np.array([last - first + 1 for first, last in self.space.groups])
        experts = np.array([float(self.space.counts(obs.x) @ layers) for obs in ended])
        spread = experts - experts.mean()
        at = np.array([obs.values for obs in ended], dtype=np.float64)
        square = float(spread @ spread) or 1.0
        return {i: float(spread @ at[:, i]) / square for i in range(at.shape[1]) if i != self.history.loss_at}

    def swapped(
        self, rng: np.random.Generator, parent: Observation, model: _Model, radius: int, widen: float = 1.0
    ) -> Proposal | None:
        """The parent after the swaps that gain most by a draw; None where it does not keep experts as they are."""
        kept = self.rows(parent)
        if kept is None or kept.all():
            return None
        drawn, mean = model.draw(rng, widen).reshape(kept.shape), model.mean().reshape(kept.shape)
        groups = np.arange(len(kept))
        # in each of the groups that routers choose first, and then in the best of these
        parts = (len(kept), self.space.shape.router_groups, -1)
        out = np.where(kept, drawn, -np.inf).reshape(parts).argmax(axis=2)
        into = np.where(kept, np.inf, drawn).reshape(parts).argmin(axis=2)
        offsets = np.arange(0, kept.shape[1], kept.shape[1] // parts[1])
        out, into = out + offsets, into + offsets
        best_part = (drawn[groups[:, None], out] - drawn[groups[:, None], into]).argmax(axis=1)
        out, into = out[groups, best_part], into[groups, best_part]
        gains = drawn[groups, out] - drawn[groups, into]
        layers = self.space.shape.layers
        best, chosen = -np.inf, groups[:0]
        for start, (first, _) in enumerate(self.space.groups):
            window = groups[start:]
            top = window[np.argsort(-gains[window], kind="stable")][:radius]
            top = top[gains[top] > 0] if gains[top[0]] > 0 else top[:1]
            # Per layer that is run again; where every swap is thought to lose, the least loss in the fewest layers.
            rate = gains[top].sum() * (1 / (layers - first) if gains[top].sum() > 0 else layers - first)
            if rate > best:
                best, chosen = rate, np.sort(top)
        experts = kept.copy()
        experts[chosen, out[chosen]], experts[chosen, into[chosen]] = False, True
        predicted = float((mean[chosen, out[chosen]] - mean[chosen, into[chosen]]).sum())
        notes = {"first": int(chosen[0]), "width": len(chosen), "parent": parent.slot, "predicted": predicted}
        return Proposal(self.space.with_kept(parent.x, experts, chosen), GUIDED, (parent.number,), "prune", notes)


@dataclass(frozen=True, eq=False)
class _Model:
    """The linear model of losses near a guide's pruning; values are float64 (groups * n,).

    Args:
        since: slot of the trial that holds the guide.
        signed, squared: (groups, n), of having each expert.
        differing: experts that trials have and the guide's pruning does not, less the reverse, (trials, groups * n).
        changes: their losses less that pruning's, (trials,).
    """

    since: int
    signed: Values
    squared: Values
    differing: Values
    changes: Values

    @cached_property
    def prior(self) -> tuple[Values, Values, Values]:
        """Mean and standard deviation of values before the trials, and the noise's of every trial."""
        factors = np.array([SIGNED, SQUARED])
        features = np.stack([self.signed.reshape(-1), self.squared.reshape(-1)])
        spread = _spread(factors @ features)
        noise = self.noise(spread)
        # (a, b) by ridge regression, with the trials weighted by their noise, and never of the wrong sign.
        seen = self.differing @ features.T / noise[:, None]
        precision = np.diag(1 / factors**2)
        fitted = np.linalg.solve(precision + seen.T @ seen, precision @ factors + seen.T @ (self.changes / noise))
        mean = np.maximum(fitted, 0.0) @ features
        spread = _spread(mean)
        return mean, spread, self.noise(spread)

    def noise(self, spread: Values) -> Values:
        """The noise's standard deviation, (trials,): in proportion to what differs, as interactions are of pairs."""
        differ: Values = np.abs(self.differing) @ spread
        return INTERACTION * differ + 1e-9

    def mean(self) -> Values:
        """The posterior mean."""
        mean, spread, noise = self.prior
        moved: Values = mean + self._gain(spread, noise) @ (self.changes - self.differing @ mean)
        return moved

    def draw(self, rng: np.random.Generator, widen: float = 1.0) -> Values:
        """Values from the posterior: a draw from the prior, moved by what the trials say against it (Matheron).

        The prior's spread is taken `widen` times.
        """
        mean, spread, noise = self.prior
        spread = widen * spread
        values = mean + spread * rng.standard_normal(mean.size)
        simulated = self.changes + noise * rng.standard_normal(noise.size)
        drawn: Values = values + self._gain(spread, noise) @ (simulated - self.differing @ values)
        return drawn

    def _gain(self, spread: Values, noise: Values) -> Values:
        """What a trial's surprise moves the values by, (groups * n, trials), by the fewer of the two in its solve."""
        trials, size = self.differing.shape
        if trials <= size:
            moved = self.differing * spread**2
            gains: Values = np.linalg.solve(moved @ self.differing.T + np.diag(noise**2), moved).T
            return gains
        whitened = self.differing * spread / noise[:, None]  # Woodbury's identity: linear in the trials
        gains = np.linalg.solve(np.eye(size) + whitened.T @ whitened, (whitened / noise[:, None]).T)
        return spread[:, None] * gains


def _spread(mean: Values) -> Values:
    size = np.abs(mean)
    spread: Values = SPREAD * (size + np.median(size)) + 1e-12
    return spread
