"""Trials of a study as samplers see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from moeopt.spaces.base import Space
from moeopt.trials import description, genome, guide
from moeopt.trials.description import ENQUEUED
from moeopt.trials.genome import Vector
from moeopt.trials.guide import Guide
from moeopt.trials.objectives import LOSS

if TYPE_CHECKING:
    from optuna.study import Study


@dataclass(frozen=True)
class Observation:
    """One trial as a sampler sees it.

    Args:
        number, slot: the trial's number, and its place in the sequence of proposals.
        x: its genotype, float32 (size,), the decoded stored value.
        loss: what a sampler of one objective minimises; None while it runs, or when it failed. It is the first of the
            values, but where a study of one objective has trials that break their constraints: these are then worse
            than all that keep theirs, the more so the more they break them (Deb 2000).
        failed: whether it ended without a loss (NaN, out of memory).
        fingerprint: of its plan.
        operator: what made it (`Proposal.operator`); ``"enqueued"`` when a person did.
        attrs: its user attributes.
        notes: what the sampler noted when it proposed the trial (`Proposal.notes`).
        guide: what the objective left with it.
        values: of all objectives, estimates where the trial was pruned, signed so that less is better; None as `loss`.
        constraints: by name, at most 0 where they hold (`FrozenTrial.constraints`).
    """

    number: int
    slot: int
    x: Vector
    loss: float | None
    failed: bool
    fingerprint: str
    operator: str
    attrs: Mapping[str, Any] = field(repr=False)
    notes: Mapping[str, Any] = field(default_factory=dict)
    guide: Guide | None = field(default=None, repr=False)
    values: tuple[float, ...] | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)

    @property
    def broken(self) -> dict[str, float]:
        """By how much it breaks which of its constraints."""
        return {name: value for name, value in self.constraints.items() if value > 0}


class History:
    """Reads the finished and running trials of studies of a space that hold a genotype; finished ones once.

    Attributes:
        objectives: how many the study has that was read last.
        loss_at: which of them is the loss; the first where the study does not say.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.objectives, self.loss_at = 1, 0
        self._observations: dict[tuple[str, int, datetime | None], Observation] = {}

    def __call__(self, study: Study, trials: list[FrozenTrial], *, without: int) -> list[Observation]:
        """All but the trial of number `without`, by slot; each slot once, the finished one first."""
        signs = [-1.0 if each == StudyDirection.MAXIMIZE else 1.0 for each in study.directions]
        self.objectives = len(signs)
        if self.objectives > 1:
            names = description.objective_names(study.user_attrs.get(description.DESCRIPTION) or {})
            self.loss_at = names.index(LOSS) if LOSS in names else 0
        by_slot: dict[int, Observation] = {}
        retries = [trial for trial in trials if trial.system_attrs.get(genome.RETRIES)]
        for trial in trials:
            if trial.number == without or trial.state == TrialState.WAITING:
                continue
            obs = self._observe(study.study_name, trial, retries, signs)
            if obs is None:
                continue
            other = by_slot.get(obs.slot)
            if other is None or other.loss is None:
                by_slot[obs.slot] = obs
        history = [by_slot[slot] for slot in sorted(by_slot)]
        return history if self.objectives > 1 else _constrained(history)

    def _observe(
        self, study_name: str, trial: FrozenTrial, retries: list[FrozenTrial], signs: list[float]
    ) -> Observation | None:
        key = (study_name, trial.number, trial.datetime_start)
        if key in self._observations:
            return self._observations[key]
        description.check_trial(trial, study_name, len(signs))
        origin = genome.origin(trial)
        x = genome.read(trial)
        if x is None and set(self.space.names) <= set(trial.params):
            x = self.space.vector(trial)
        if x is None or x.size != self.space.size:
            return None
        values = _values(trial, signs)
        obs = Observation(
            number=trial.number,
            slot=genome.slot(trial, retries),
            x=x,
            loss=None if values is None else values[0],
            failed=trial.state.is_finished() and values is None,
            fingerprint=origin.get("plan") or self.space.decode(x).fingerprint,
            operator=origin.get("operator", ENQUEUED),
            attrs=trial.user_attrs,
            notes=origin.get("notes") or {},
            guide=guide.read(trial, self.space.shape.layers, self.space.shape.experts),
            values=values,
            constraints=trial.constraints,
        )
        if trial.state.is_finished():
            self._observations[key] = obs
        return obs


def _values(trial: FrozenTrial, signs: list[float]) -> tuple[float, ...] | None:
    """What a trial gave, or is estimated to give, signed; None unless all of it is finite."""
    values: Any = trial.values if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    if trial.state == TrialState.PRUNED:
        estimate = trial.user_attrs.get(genome.ESTIMATE)
        estimates = estimate if isinstance(estimate, list) else [estimate]
        if len(estimates) == len(signs) and all(isinstance(value, float) for value in estimates):
            values = estimates
    if values is None or not np.isfinite(values).all():
        return None
    return tuple(sign * value for sign, value in zip(signs, values))


def _constrained(history: list[Observation]) -> list[Observation]:
    """The history of one objective, with the losses of those that break a constraint behind all others.

    Theirs is the worst that keeps its own, plus the spread of these times one more than what is broken, each constraint
    in parts of the most that it is broken by.
    """
    ended = [obs for obs in history if obs.loss is not None]
    most: dict[str, float] = {}
    for obs in ended:
        for name, value in obs.broken.items():
            most[name] = max(value, most.get(name, 0.0))
    if not most:
        return history
    feasible = [obs.loss for obs in ended if obs.loss is not None and not obs.broken]
    worst, best = max(feasible, default=0.0), min(feasible, default=0.0)
    spread = (worst - best) or 1.0

    def behind(obs: Observation) -> Observation:
        if obs.loss is None or not obs.broken:
            return obs
        parts = sum(min(value / most[name], 1.0) for name, value in obs.broken.items())
        return replace(obs, loss=worst + spread * (1 + parts))

    return [behind(obs) for obs in history]


def noted(obs: Observation, key: str) -> int | None:
    """A count that a sampler noted on a trial; None where there is none."""
    value = obs.notes.get(key)
    return value if description.COUNT.holds(value) else None
