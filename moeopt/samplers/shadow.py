"""Any Optuna or OptunaHub sampler over a genotype of any size, through a shadow study in memory.

The shadow holds, at index i, the trial of slot i: finished and running ones with their decoded numbers as parameters
and their values, signed so that all are minimised, and constraints; all others as failed. For every proposal a fresh
copy of the sampler, seeded by (seed, slot, attempt), samples one more trial of it. Small attributes that the sampler
sets on that trial and on its study (NSGA-II's generation, QMC's place in its sequence) are noted on the real trial, and
put back when another process builds the shadow anew; a sampler that keeps much more than that is refused.
"""

from __future__ import annotations

import copy
import inspect
import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from moeopt.errors import SamplerError
from moeopt.plan import Plan
from moeopt.samplers.base import GenomeSampler, Proposal, StartingSampler
from moeopt.samplers.history import Observation
from moeopt.samplers.seeding import reseed
from moeopt.spaces.base import Space
from moeopt.trials.genome import Vector
from moeopt.trials.objectives import PREFIX

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

OPERATOR = "sampled"
NOTES_AT_MOST = 16_000
"""Characters of JSON that a sampler may keep per trial."""


class ShadowSampler(StartingSampler):
    """Drives any Optuna sampler; the first trial is the start.

    Args:
        space: what to search.
        sampler: an Optuna sampler object. Its own random states are seeded anew for each proposal; a seed that it fixed
            when it was made (QMC's) stays.
        seed, redraw: as for `GenomeSampler`.
        start: the plan or vector (size,) to start at, evaluated first; by default `space.start()`.

    Raises:
        SamplerError: for Optuna's `CmaEsSampler`, and for a sampler that keeps more state in the study than is stored.
        SpaceError: when `start` is not of this space.
    """

    name, operators, several = "optuna", (OPERATOR,), True

    def __init__(
        self,
        space: Space,
        sampler: BaseSampler,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start)
        if not isinstance(sampler, BaseSampler):
            raise SamplerError(f"expected an Optuna sampler object, got {sampler!r}")
        if isinstance(sampler, GenomeSampler):
            raise SamplerError(f"{type(sampler).__name__} knows the space already: use it without ShadowSampler")
        if any(isinstance(inner, CmaEsSampler) for inner in (sampler, *vars(sampler).values())):
            raise SamplerError("Optuna's CmaEsSampler keeps a pickled optimiser in the study; use sampler='cmaes'")
        self.sampler = self._alone = copy.deepcopy(sampler)
        self._shadow: _Shadow | None = None

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"sampler": describe(self.sampler)}

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        count = self.history.objectives
        if (
            self._shadow is None
            or self._shadow.objectives != count
            or not self._shadow.leads_to(history, slot, attempt)
        ):
            self._shadow = _Shadow(self.space, count)
        self._shadow.tell(history, slot)
        running = any(obs.values is None and not obs.failed for obs in history)
        for again in range(self._shadow.asks, attempt + 1):
            sampler = copy.deepcopy(self.sampler if running else self._alone)
            reseed(sampler, int(self.rng(slot, again).integers(1 << 62)))
            x, notes = self._shadow.ask(sampler)
        return Proposal(x, OPERATOR, notes=notes)


class _Shadow:
    """The in-memory study: at index i what became of slot i, then the open trial that is being asked for.

    Args:
        space: of the genotypes.
        objectives: how many it has.

    Attributes:
        asks: how many points the open trial was asked for.
    """

    def __init__(self, space: Space, objectives: int = 1) -> None:
        self.space, self.objectives = space, objectives
        self.distributions = _Shared(space.distributions())
        self.storage = InMemoryStorage()
        self.asks = 0
        self._observations: list[Observation | None] = []
        self._open: int | None = None
        self._asked: tuple[Vector, dict[str, Any]] | None = None
        self._study_attrs: dict[str, Any] = {}
        self._name = f"shadow-{uuid.uuid4()}"
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._id = self.storage.create_new_study([StudyDirection.MINIMIZE] * objectives, self._name)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def leads_to(self, history: list[Observation], slot: int, attempt: int) -> bool:
        """Whether going on from here gives what building anew would."""
        wanted = _by_index(history, slot)
        for old, new in zip(self._observations, wanted):
            if old is new:
                continue
            settled = old is None or old.values is not None or old.failed
            if (old is None) != (new is None) or (settled and _facts(old) != _facts(new)):
                return False
            if old is not None and new is not None and not np.array_equal(old.x, new.x):
                return False
        if self._open is None or self._asked is None:
            return len(wanted) >= len(self._observations) and self._open is None
        if len(wanted) == len(self._observations):
            return self.asks <= attempt
        taken = wanted[len(self._observations)] if len(wanted) > len(self._observations) else None
        return taken is not None and np.array_equal(taken.x, self._asked[0]) and taken.notes == self._asked[1]

    def tell(self, history: list[Observation], slot: int) -> None:
        """Bring the shadow up to the history, and open no trial yet."""
        for i, obs in enumerate(_by_index(history, slot)):
            if i < len(self._observations):
                old = self._observations[i]
                if obs is not None and old is not None and _facts(old) != _facts(obs):
                    self._finish(self.storage.get_trial_id_from_study_id_trial_number(self._id, i), obs)
                    self._observations[i] = obs
            else:
                if obs is not None and self._open is not None:
                    for name, value in self._values(obs).items():
                        self.storage.set_trial_param(self._open, name, value, self.distributions[name])
                    self._finish(self._open, obs)
                else:
                    self._add(obs)
                self._observations.append(obs)
                self._open, self._asked, self.asks = None, None, 0

    def ask(self, sampler: BaseSampler) -> tuple[Vector, dict[str, Any]]:
        """A point for the open trial, (size,), and what the sampler wants back with it."""
        storage = self.storage
        if self._open is None:
            self._open = storage.create_new_trial(self._id)
            self._study_attrs = storage.get_study_system_attrs(self._id)
        study, trial_id = optuna.load_study(study_name=self._name, storage=storage, sampler=sampler), self._open
        sampler.before_trial(study, storage.get_trial(trial_id))
        search_space = sampler.infer_relative_search_space(study, storage.get_trial(trial_id))
        params = dict(sampler.sample_relative(study, storage.get_trial(trial_id), search_space))
        for name, distribution in self.distributions.items():
            if distribution.single():
                params[name] = distribution.low  # type: ignore[attr-defined]
            elif name not in params:
                params[name] = sampler.sample_independent(study, storage.get_trial(trial_id), name, distribution)
        x = self.space.snap([params[name] for name in self.space.names])
        self.asks += 1
        self._asked = x, self._notes(storage.get_trial(trial_id).system_attrs, type(sampler).__name__)
        return self._asked

    def _notes(self, attrs: Mapping[str, Any], name: str) -> dict[str, Any]:
        # Relative parameters are noted by samplers for other workers only; here those see the parameters themselves.
        trial_attrs = {key: value for key, value in attrs.items() if ":relative_params" not in key}
        now = self.storage.get_study_system_attrs(self._id)
        changed = {key: value for key, value in now.items() if self._study_attrs.get(key) != value}
        notes = {key: value for key, value in {"trial": trial_attrs, "study": changed}.items() if value}
        try:
            text = json.dumps(notes)
        except (TypeError, ValueError) as error:
            raise SamplerError(f"{name} keeps state in the study that is not JSON: {error}") from None
        if len(text) > NOTES_AT_MOST:
            raise SamplerError(
                f"{name} keeps {len(text)} characters of its own state per trial, at most {NOTES_AT_MOST} are stored: "
                "it cannot be resumed"
            )
        return json.loads(text)  # type: ignore[no-any-return]

    def _add(self, obs: Observation | None) -> None:
        if obs is None:
            self.storage.create_new_trial(self._id, create_trial(state=TrialState.FAIL))
            return
        now, state = datetime.now(), _state(obs)
        trial = FrozenTrial(
            number=-1, trial_id=-1, state=state, value=None, values=obs.values,
            datetime_start=now, datetime_complete=now if state.is_finished() else None,
            params=_Shared(self._values(obs)), distributions=self.distributions,
            system_attrs={**_constraints(obs), **(obs.notes.get("trial", {}) if obs.operator == OPERATOR else {})},
            user_attrs={}, intermediate_values={},
        )  # fmt: skip
        self.storage.create_new_trial(self._id, trial)
        if obs.operator == OPERATOR:
            for key, value in obs.notes.get("study", {}).items():
                self.storage.set_study_system_attr(self._id, key, value)

    def _values(self, obs: Observation) -> dict[str, float]:
        return dict(zip(self.space.names, self.space.values(obs.x)))

    def _finish(self, trial_id: int, obs: Observation) -> None:
        if _state(obs).is_finished():
            for key, value in _constraints(obs).items():
                self.storage.set_trial_system_attr(trial_id, key, value)
            self.storage.set_trial_state_values(trial_id, _state(obs), obs.values)


class _Shared(dict[str, Any]):
    """Parameters or distributions that nobody changes: one dictionary, however often a storage copies its trials."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _by_index(history: list[Observation], slot: int) -> list[Observation | None]:
    by_slot = {obs.slot: obs for obs in history}
    return [by_slot.get(i) for i in range(max([slot, *(i + 1 for i in by_slot)]))]


def _facts(obs: Observation | None) -> Any:
    return obs and (obs.fingerprint, obs.operator, obs.values, obs.failed)


def _constraints(obs: Observation) -> dict[str, float]:
    return {PREFIX + name: value for name, value in obs.constraints.items()}


def _state(obs: Observation) -> TrialState:
    if obs.failed:
        return TrialState.FAIL
    return TrialState.RUNNING if obs.values is None else TrialState.COMPLETE


def describe(sampler: BaseSampler | BasePruner) -> dict[str, Any]:
    """The class of a sampler or pruner, and of its constructor's arguments those that it shows and JSON can hold."""
    kind = type(sampler)
    description: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    for name in inspect.signature(kind.__init__).parameters:
        value = vars(sampler).get(name, vars(sampler).get(f"_{name}", inspect.Parameter.empty))
        if isinstance(value, (BaseSampler, BasePruner)):
            description[name] = describe(value)
        elif _is_simple(value):
            description[name] = value
    return description


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_simple(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_simple(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
