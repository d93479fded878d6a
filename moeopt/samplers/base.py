"""What moeopt's samplers share: they draw a whole genotype in `before_trial`, as a function of the study alone."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import SamplerError, SpaceError, StudyError, got
from moeopt.plan import Plan
from moeopt.spaces.base import NAMED_AT_MOST, Space
from moeopt.study.storage import attributes
from moeopt.trials import description, genome, guide, process
from moeopt.trials.description import ENQUEUED
from moeopt.trials.genome import Vector
from moeopt.trials.guide import Guide

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

START = "start"
"""Operator of a search's own first trial, its start."""

_asking = threading.RLock()
"""Threads of one process ask one after the other, so that each sees what the others already try."""


def _forked() -> None:
    """A forked process has no thread but one; another may have been asking."""
    global _asking
    _asking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


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


@dataclass(frozen=True)
class Proposal:
    """A genotype to evaluate, and where it comes from.

    Args:
        x: numbers of the space, float (size,); they are snapped before they are stored.
        operator: what made it: ``"initial"``, ``"prune"``, ``"crossover+merge"``, ...
        parents: numbers of the trials it was made from.
        phase: ``"prune"`` or ``"merge"`` where the sampler has phases.
        notes: JSON facts the sampler wants back in `Observation.notes`.
    """

    x: NDArray[np.floating[Any]]
    operator: str
    parents: tuple[int, ...] = ()
    phase: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


class UnknownSampler(BaseSampler):
    """Stands in a study whose own sampler cannot be rebuilt: the study can be read, and none of its trials starts.

    Args:
        why: what is said to whoever starts one.
    """

    def __init__(self, why: str) -> None:
        self.why = why

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        end_refused(attributes.whole_study(study), trial, self.why, again=True)
        raise StudyError(self.why)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        raise StudyError(self.why)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        raise StudyError(self.why)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        raise StudyError(self.why)


class GenomeSampler(BaseSampler):
    """Base of moeopt's samplers; works with a plain `optuna.create_study` and on any storage.

    A proposal is a function of (seed, slot, finished and running trials), and nothing else is kept: a study that is
    killed and resumed goes on as if it had not been. A trial that already has a genotype (enqueued, or retried after
    a crash) keeps it; `study.enqueue_trial` by parameter names works for spaces of at most 48 numbers, and the sampler
    fills in those not named.

    Subclasses implement `propose` and `settings`.

    Args:
        space: what to search.
        seed: of all random draws; None draws one from the operating system.
        redraw: how often a proposal whose plan the study already holds is drawn again; 0 keeps duplicates.
    """

    def __init__(self, space: Space, *, seed: int | None = None, redraw: int = 20) -> None:
        if not isinstance(space, Space):
            raise SamplerError(f"a sampler needs one of moeopt's spaces, got {type(space).__name__}")
        check_counts({"redraw": redraw}, least=0)
        self.space = space
        self._drawn = seed is None
        if seed is not None and (isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0):
            raise SamplerError(f"seed must be at least 0, got {got(seed)}; it is an integer or None")
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self.redraw = redraw
        self._observations: dict[tuple[str, int, datetime | None], Observation] = {}

    @abstractmethod
    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        """A new point, called by `before_trial`.

        Args:
            history: finished and running trials, by slot.
            slot: the place of the new trial in the sequence of proposals.
            attempt: 0, then 1, 2, ... while the proposal's plan is one that `history` already holds.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The sampler's name and hyperparameters, JSON; a study is resumed only with equal ones."""

    def named_settings(self, name: str, *options: str, **more: Any) -> dict[str, Any]:
        """Settings of this name: seed, redraw, these attributes of the sampler, and whatever else is given."""
        return {"name": name, **{option: getattr(self, option) for option in ("seed", "redraw", *options)}, **more}

    def rng(self, slot: int, attempt: int = 0) -> np.random.Generator:
        """The random generator of one proposal."""
        return np.random.default_rng([self.seed, slot, attempt])

    def adopt_seed(self, study: Study) -> None:
        """Without a seed of its own, go on with the one that the study's sampler drew."""
        stored = (attributes.recorded_sampler(study) or {}) if self._drawn else {}
        if description.COUNT.holds(stored.get("seed")):
            self.seed = stored["seed"]

    def shortfall(self, trials: int) -> str | None:
        """What a search of so many trials leaves out of the sampler; None for nothing."""
        return None

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Give a trial its genotype.

        Raises:
            StudyError: when the study was made with other settings of the sampler, or with another; the trial is run
                again once the study goes on with its own (`moeopt.study.reclaim`).
            SpaceError: when the trial was enqueued with numbers that are out of range; it has failed.
        """
        whole = attributes.whole_study(study)
        try:
            self.adopt_seed(whole)
            attributes.check_sampler(whole, self.settings())
        except StudyError as error:
            end_refused(whole, trial, str(error), again=True)
            raise
        with _asking:
            self._before_trial(whole, trial)

    def _before_trial(self, whole: Study, trial: FrozenTrial) -> None:
        if len(whole.directions) != 1:
            raise SamplerError(f"{type(self).__name__} optimises one objective, the study has {len(whole.directions)}")
        trials = whole.get_trials(deepcopy=False)
        description.check_trial(trial, whole.study_name)
        slot = genome.slot(trial, trials)
        recorded = {key: value for key, value in genome.origin(trial).items() if key != "claim"}
        if recorded.get("worker") != process.this_worker():  # the storage did not say so
            attributes.write(whole, trial, {genome.ORIGIN: {**recorded, "slot": slot, "worker": process.this_worker()}})
        recorded |= {"slot": slot, "worker": process.this_worker()}
        stored = genome.read(trial)
        try:
            self._check_given(trial, stored)
        except SpaceError as error:
            end_refused(whole, trial, str(error), again=False)
            raise
        # Another worker may have taken the plan since the history was read: then drawn again, at last as it is.
        for left in range(self.redraw, -1, -1):
            proposal = None if stored is not None else self._proposal(whole, trial, trials, slot)
            x = self.space.snap(proposal.x) if proposal is not None else stored
            assert x is not None
            origin = {"operator": ENQUEUED, "parents": [], "notes": {}, **recorded}
            if proposal is not None:
                origin |= {"operator": proposal.operator, "parents": [int(parent) for parent in proposal.parents]}
                origin["notes"] = dict(proposal.notes)
                if proposal.phase is not None:
                    origin["phase"] = proposal.phase
            origin["plan"] = self.space.decode(x).fingerprint
            packed = genome.pack(genome.GENOME, x) if proposal is not None else {}
            params = {name: number for name, number in self.parameters(x).items() if name not in trial.params}
            drawn = proposal is not None and proposal.operator != ENQUEUED
            unless = attributes.taken(whole, origin["plan"], trials) if drawn and left else None
            if attributes.write(whole, trial, {genome.ORIGIN: origin, **packed}, params=params, unless=unless):
                return
            trials = whole.get_trials(deepcopy=False)  # another worker was faster

    def _check_given(self, trial: FrozenTrial, stored: Vector | None) -> None:
        """Raise SpaceError, naming number and range, where a trial was enqueued with numbers that are out of range."""
        size = self.space.size
        if stored is not None and stored.size != size:
            raise SpaceError(f"trial {trial.number} brings {stored.size} numbers, the space has {size}")
        given = _fixed(trial) if stored is None else dict(zip(self.space.names, stored.tolist()))
        self.space.check_range({name: value for name, value in given.items() if description.FINITE.holds(value)})

    def _proposal(self, whole: Study, trial: FrozenTrial, trials: list[FrozenTrial], slot: int) -> Proposal:
        """What a trial without a genotype evaluates: the parameters it was enqueued with, the rest new."""
        history = self.history(whole, trials, without=trial.number)
        given = _fixed(trial)
        fixed = {name: value for name, value in given.items() if description.FINITE.holds(value)}
        if given and not set(fixed) & set(self.space.names):
            warnings.warn(
                f"trial {trial.number} was enqueued with {sorted(given)}, none of which is a finite number of the "
                "space; moeopt.enqueue(study, space, plan) enqueues a plan",
                stacklevel=2,
            )
        named = [i for i, name in enumerate(self.space.names) if name in fixed]
        if len(named) == self.space.size:
            return Proposal(np.array([fixed[name] for name in self.space.names]), ENQUEUED)
        proposal = self._new_plan(history, slot)
        if not named:
            return proposal
        partly = np.array(proposal.x, dtype=np.float64)
        partly[named] = [fixed[self.space.names[i]] for i in named]
        return Proposal(partly, ENQUEUED)

    def parameters(self, x: Vector) -> dict[str, tuple[float, BaseDistribution]]:
        """The named parameters of a genotype, as `Space.vector` suggests them: its numbers, or its drift if many."""
        from optuna.distributions import FloatDistribution

        if self.space.size <= NAMED_AT_MOST:
            values, kinds = self.space.values(x), self.space.distributions()
            return {name: (value, kind) for value, (name, kind) in zip(values, kinds.items())}
        limit = self.space.drift_limit
        return {"drift": (min(self.space.drift(x), limit), FloatDistribution(0.0, limit))}

    def _new_plan(self, history: list[Observation], slot: int) -> Proposal:
        taken = {obs.fingerprint for obs in history}
        for attempt in range(self.redraw + 1):
            proposal = self.propose(history, slot, attempt)
            if not isinstance(proposal, Proposal):
                raise SamplerError(f"propose of {type(self).__name__} must give a Proposal, got {got(proposal)}")
            if self.space.decode(proposal.x).fingerprint not in taken:
                break
        return proposal

    def history(self, study: Study, trials: list[FrozenTrial], *, without: int) -> list[Observation]:
        """Finished and running trials that hold a genotype, by slot; each slot once, the finished one first."""
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

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """A random number: those of the genotype are there already, so it is another parameter of the objective."""
        seed = np.random.SeedSequence([self.seed, trial.number, *name.encode()]).generate_state(1)[0]
        return RandomSampler(seed=int(seed)).sample_independent(study, trial, name, distribution)

    def reseed_rng(self) -> None:
        """Nothing to do: proposals of concurrent trials differ by their slot."""


class StartingSampler(GenomeSampler):
    """Base of samplers whose first trial is a start, evaluated as it is; the others come of `search`.

    Args:
        space, seed, redraw: as for `GenomeSampler`.
        start: the plan or vector (size,) to start at; by default `space.start()`.

    Attributes:
        x0: the start's genotype, float32 (size,).

    Raises:
        SpaceError: when `start` is not of this space.
    """

    def __init__(
        self, space: Space, *, seed: int | None = None, redraw: int = 20, start: Plan | ArrayLike | None = None
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw)
        self.given = start is not None
        if start is None:
            self.x0 = space.start()
        else:
            self.x0 = space.encode(start) if isinstance(start, Plan) else space.snap(start)

    @abstractmethod
    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        """As `propose`, once the start was."""

    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        if attempt == 0 and self.opens(history, slot):
            return Proposal(self.x0, START)
        return self.search(history, slot, attempt)

    def opens(self, history: list[Observation], slot: int) -> bool:
        """Whether this slot is the search's own first: no earlier one, or all earlier ones enqueued by hand."""
        earlier = [obs for obs in history if obs.slot < slot]
        return len(earlier) == slot and all(obs.operator == ENQUEUED for obs in earlier)

    def named_settings(self, name: str, *options: str, **more: Any) -> dict[str, Any]:
        return super().named_settings(name, *options, **{"start": digest(self.x0), **more})


def end_refused(study: Study, trial: FrozenTrial, reason: str, *, again: bool) -> None:
    """Fail a trial that was started and is not to be run so, with the reason; with `again` it is queued by a resume.

    In a thread of `study.optimize(n_jobs=...)` it is also warned of: Optuna loses the errors of the last ones.
    """
    if threading.current_thread() is not threading.main_thread():
        warnings.warn(reason, stacklevel=3)
    attributes.write(study, trial, {}, {genome.FAILURE: reason, **({genome.INTERRUPTED: True} if again else {})})
    study.tell(trial.number, state=TrialState.FAIL)


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters that a trial was enqueued with, by name."""
    return trial.system_attrs.get("fixed_params") or {}


def noted(obs: Observation, key: str) -> int | None:
    """A count that a sampler noted on a trial; None where there is none."""
    value = obs.notes.get(key)
    return value if description.COUNT.holds(value) else None


def check_counts(counts: Mapping[str, Any], *, least: int = 1) -> None:
    """Raise SamplerError, naming the argument, unless all are integers of at least so much."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise SamplerError(f"{name} must be an integer of at least {least}, got {count!r}")


def check_positive(values: Mapping[str, float]) -> None:
    """Raise SamplerError, naming the argument, unless all are positive numbers."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise SamplerError(f"{name} must be a positive number, got {value!r}")


def digest(x: Vector) -> str:
    """16 hex digits that name a genotype in a sampler's settings."""
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()[:16]
