"""Trials of a study as samplers see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

if TYPE_CHECKING:
    from optuna.study import Study


@dataclass(frozen=True)
class Observation:
    """One trial as a sampler sees it.

    Args:
        number, slot: the trial's number, and its place in the sequence of proposals.
        x: its genotype, float32 (size,), the decoded stored value.
        loss: lower is better; None while it runs, or when it failed.
        failed: whether it ended without a loss (NaN, out of memory).
        fingerprint: of its plan.
        operator: what made it (`Proposal.operator`); ``"enqueued"`` when a person did.
        attrs: its user attributes.
        notes: what the sampler noted when it proposed the trial (`Proposal.notes`).
        guide: what the objective left with it.
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


class History:
    """Reads the finished and running trials of studies of a space that hold a genotype; finished ones once."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._observations: dict[tuple[str, int, datetime | None], Observation] = {}

    def __call__(self, study: Study, trials: list[FrozenTrial], *, without: int) -> list[Observation]:
        """All but the trial of number `without`, by slot; each slot once, the finished one first."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        by_slot: dict[int, Observation] = {}
        retries = [trial for trial in trials if trial.system_attrs.get(genome.RETRIES)]
        for trial in trials:
            if trial.number == without or trial.state == TrialState.WAITING:
                continue
            obs = self._observe(study.study_name, trial, retries, sign)
            if obs is None:
                continue
            other = by_slot.get(obs.slot)
            if other is None or other.loss is None:
                by_slot[obs.slot] = obs
        return [by_slot[slot] for slot in sorted(by_slot)]

    def _observe(
        self, study_name: str, trial: FrozenTrial, retries: list[FrozenTrial], sign: float
    ) -> Observation | None:
        key = (study_name, trial.number, trial.datetime_start)
        if key in self._observations:
            return self._observations[key]
        description.check_trial(trial, study_name)
        origin = genome.origin(trial)
        x = genome.read(trial)
        if x is None and set(self.space.names) <= set(trial.params):
            x = self.space.vector(trial)
        if x is None or x.size != self.space.size:
            return None
        loss = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        if trial.state == TrialState.PRUNED and isinstance(trial.user_attrs.get(genome.ESTIMATE), float):
            loss = trial.user_attrs[genome.ESTIMATE]
        obs = Observation(
            number=trial.number,
            slot=genome.slot(trial, retries),
            x=x,
            loss=None if loss is None or not np.isfinite(loss) else sign * loss,
            failed=trial.state.is_finished() and (loss is None or not np.isfinite(loss)),
            fingerprint=origin.get("plan") or self.space.decode(x).fingerprint,
            operator=origin.get("operator", ENQUEUED),
            attrs=trial.user_attrs,
            notes=origin.get("notes") or {},
            guide=guide.read(trial, self.space.shape.layers, self.space.shape.experts),
        )
        if trial.state.is_finished():
            self._observations[key] = obs
        return obs


def noted(obs: Observation, key: str) -> int | None:
    """A count that a sampler noted on a trial; None where there is none."""
    value = obs.notes.get(key)
    return value if description.COUNT.holds(value) else None
