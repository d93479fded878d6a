"""What moeopt's samplers share: they draw a whole genotype in `before_trial`, as a function of the study alone."""

from __future__ import annotations

import os
import threading
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from moeopt.errors import SamplerError, SpaceError, StudyError, got
from moeopt.plan import Plan
from moeopt.samplers.checks import check_counts, digest
from moeopt.samplers.history import History, Observation
from moeopt.samplers.refusing import end_refused
from moeopt.spaces.base import NAMED_AT_MOST, Space
from moeopt.study.storage import attributes
from moeopt.trials import description, genome, process
from moeopt.trials.description import ENQUEUED
from moeopt.trials.genome import Vector

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

START = "start"
"""Operator of a search's own first trial, its start."""

SEVERAL = "guided, local, nsgaii, nsgaiii, tpe, gp, random and Optuna's own samplers"

_asking = threading.RLock()
"""Threads of one process ask one after the other, so that each sees what the others already try."""


def _forked() -> None:
    """A forked process has no thread but one; another may have been asking."""
    global _asking
    _asking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


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

    @property
    def origin(self) -> dict[str, Any]:
        """What a trial records of it beside the numbers, JSON."""
        parents = [int(parent) for parent in self.parents]
        origin = {"operator": self.operator, "parents": parents, "notes": dict(self.notes)}
        return origin if self.phase is None else origin | {"phase": self.phase}


class GenomeSampler(BaseSampler):
    """Base of moeopt's samplers; works with a plain `optuna.create_study` and on any storage.

    A proposal is a function of (seed, slot, finished and running trials), and nothing else is kept: a study that is
    killed and resumed goes on as if it had not been. A trial that already has a genotype (enqueued, or retried after
    a crash) keeps it; `study.enqueue_trial` by parameter names works for spaces of at most 48 numbers, and the sampler
    fills in those not named.

    Subclasses implement `propose`, and say what they are called and record in these class attributes.

    Attributes:
        name: among the settings, by which `moeopt.samplers.from_settings` finds the class; by default the class's.
        options: attributes that hold its hyperparameters, JSON values or tuples of them, which settings record.
        operators: what its proposals may bear (`Proposal.operator`), by which trials of another sampler are told from
            its own; empty: anything.
        several: whether it takes several objectives.

    Args:
        space: what to search.
        seed: of all random draws; None draws one from the operating system.
        redraw: how often a proposal whose plan the study already holds is drawn again; 0 keeps duplicates.
    """

    name: str = ""
    options: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    several: bool = False

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
        self.history = History(space)

    @abstractmethod
    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        """A new point, called by `before_trial`.

        Args:
            history: finished and running trials, by slot.
            slot: the place of the new trial in the sequence of proposals.
            attempt: 0, then 1, 2, ... while the proposal's plan is one that `history` already holds.
        """

    def settings(self) -> dict[str, Any]:
        """The sampler's name and hyperparameters, JSON; a study is resumed only with equal ones."""
        values = {option: getattr(self, option) for option in ("seed", "redraw", *self.options)}
        plain = {option: [*value] if isinstance(value, tuple) else value for option, value in values.items()}
        return {"name": self.name or type(self).__name__, **plain}

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

    def check_objectives(self, count: int) -> None:
        """Raise SamplerError unless it takes so many objectives."""
        if count > 1 and not self.several:
            raise SamplerError(
                f"{self.name or type(self).__name__} optimises one objective, the study has {count}; several are for "
                f"{SEVERAL}"
            )

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
        self.check_objectives(len(whole.directions))
        trials = whole.get_trials(deepcopy=False)
        description.check_trial(trial, whole.study_name, len(whole.directions))
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
            if stored is None:
                proposal = self._proposal(whole, trial, trials, slot)
                x, origin = self.space.snap(proposal.x), recorded | proposal.origin
            else:
                x, origin = stored, Proposal(stored, ENQUEUED).origin | recorded
            origin["plan"] = self.space.decode(x).fingerprint
            packed = genome.pack(genome.GENOME, x) if stored is None else {}
            params = {name: number for name, number in self.parameters(x).items() if name not in trial.params}
            drawn = stored is None and origin["operator"] != ENQUEUED
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

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"start": digest(self.x0)}


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters that a trial was enqueued with, by name."""
    return trial.system_attrs.get("fixed_params") or {}
