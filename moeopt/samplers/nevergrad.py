"""Any optimiser of Nevergrad's registry, by name (Rapin & Teytaud, 2018).

The optimiser works on z = (x - start) / step. Nothing of it is stored: it is rebuilt by going through the study slot by
slot, asking, and telling what the study knows. A proposal whose plan the study already holds is told that plan's loss
and asked again; how often is noted on the trial (``asks``), so that a rebuilt optimiser repeats it exactly and proposes
what an uninterrupted one would, bit for bit. Losses that are not known (failed trials, trials of other workers still
running) are told as the worst so far.

An asked point that no trial took, as happens with several workers, stays on offer; trials that the optimiser did not
ask for are told as such, where it takes them (scipy's and some others do not).

Not every one of the 540 optimisers serves: AX, BOBYQA, NLOPT, Pymoo, SMAC3 and the like need packages of their own,
SPSA asks for NaN, BO takes a second a trial at 16 numbers, scipy's methods and OnePlusOne ask for the same pruning over
and over once their steps are small. Metamodels stop their inner search by the clock, and MultiDS runs threads of its
own: these may not repeat bit for bit.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SamplerError, nearest
from moeopt.plan import Plan
from moeopt.samplers.base import START, Proposal, StartingSampler
from moeopt.samplers.checks import check_counts, check_positive
from moeopt.samplers.history import Observation, noted
from moeopt.spaces.base import Space
from moeopt.trials.genome import Vector

T = TypeVar("T")
UNKNOWN = 1e6
"""Told for an unknown loss before any is known."""


class NevergradSampler(StartingSampler):
    """A Nevergrad optimiser, told one trial at a time.

    Args:
        space: what to search.
        optimizer: a name of `nevergrad.optimizers.registry`: ``"DE"``, ``"OnePlusOne"``, ``"PSO"``, ``"NGOpt"``, ...
        seed, redraw: as for `GenomeSampler`.
        budget: trials the optimiser plans for; many adapt to it.
        sigma: first standard deviation of each number, as a multiple of `space.step`; Nevergrad's CMA family takes 0.15
            to 0.3 of it.
        start: the plan or vector (size,) to start at, evaluated first; by default `space.start()`.

    Raises:
        SamplerError: when the optimiser is unknown, needs a package that is missing, or fails.
        SpaceError: when `start` is not of this space.
    """

    options = ("budget", "sigma")

    def __init__(
        self,
        space: Space,
        optimizer: str,
        *,
        seed: int | None = None,
        redraw: int = 20,
        budget: int = 400,
        sigma: float = 1.0,
        start: Plan | ArrayLike | None = None,
    ) -> None:
        super().__init__(space, seed=seed, redraw=redraw, start=start)
        check_counts({"budget": budget})
        check_positive({"sigma": sigma})
        names = registry()
        if optimizer not in names:
            hint = nearest(str(optimizer), names)
            raise SamplerError(f"Nevergrad has no optimiser {optimizer!r}{hint} (its registry has {len(names)})")
        self.optimizer, self.budget, self.sigma = optimizer, budget, float(sigma)
        self.name, self.operators = f"nevergrad:{optimizer}", (optimizer,)
        self._replay: _Replay | None = None

    def search(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        keys = [(obs.slot, obs.operator, obs.fingerprint, obs.loss, obs.failed) for obs in history]
        replay = self._replay
        if replay is None or not replay.leads_to(keys, history, attempt):
            replay = self._replay = _Replay(self)
        try:
            x = replay.propose(history, keys, attempt)
        except BaseException as error:
            self._replay = None
            if not isinstance(error, Exception):
                raise
            raise SamplerError(
                f"Nevergrad's {self.optimizer} failed after {len(history)} trials on {self.space.size} numbers: "
                f"{type(error).__name__}: {error}"
            ) from error
        return Proposal(x, self.optimizer, notes={"asks": replay.asks})


def registry() -> list[str]:
    """Names of all optimisers of the installed Nevergrad."""
    with _random_states(_states(0, 0)):  # a few optimisers draw settings when Nevergrad is imported
        try:
            import nevergrad
        except ImportError:
            raise SamplerError("Nevergrad is not installed: pip install nevergrad") from None
    return sorted(nevergrad.optimizers.registry)


class _Replay:
    """One optimiser and what it was told.

    Attributes:
        keys: of the trials it went through, in order.
        asks: how many points it was asked for since the last of them.
    """

    def __init__(self, sampler: NevergradSampler) -> None:
        self.space, self.x0, self.name = sampler.space, sampler.x0.astype(np.float64), sampler.optimizer
        self.budget, self.sigma, self.most = sampler.budget, sampler.sigma, sampler.redraw + 1
        self.keys: list[Any] = []
        self.asks = 0
        self._optimizer: Any = None
        self._offer: tuple[Any, Vector] | None = None
        self._losses: dict[str, float] = {}
        self._worst: float | None = None
        self._seeds = np.random.SeedSequence([sampler.seed, 0]).generate_state(3)
        self._states = _states(*self._seeds[:2])

    def leads_to(self, keys: list[Any], history: list[Observation], attempt: int) -> bool:
        """Whether going on from here gives what starting afresh would."""
        if self.keys != keys[: len(self.keys)]:
            return False
        if len(keys) == len(self.keys):
            return self.asks <= attempt
        return self.asks in (0, self._asked_for(history[len(self.keys)]))

    def propose(self, history: list[Observation], keys: list[Any], attempt: int) -> Vector:
        """Go through the trials not seen yet; the point to evaluate then, (size,)."""

        def work() -> Vector:
            if self._optimizer is None:
                self._optimizer = self._new()
            for obs, key in zip(history[len(self.keys) :], keys[len(self.keys) :]):
                self._advance(obs, key)
            return self._candidate(attempt)

        with _random_states(self._states), _pycma_without_clock(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _in_daemon_thread(work)

    def _new(self) -> Any:
        import nevergrad as ng
        from nevergrad.optimization import metamodel

        # Nevergrad 1.0.12 takes float() of an array of one element there, which NumPy 2.4 refuses.
        vars(metamodel).setdefault("float", lambda array: np.asarray(array).item())
        low, high = self._z(self.space.low), self._z(self.space.high)
        array = ng.p.Array(init=np.zeros(low.size))
        array.set_bounds(low, np.where(high > low, high, low + 1.0), full_range_sampling=False)
        array.set_mutation(sigma=self.sigma)
        array.random_state = np.random.RandomState(self._seeds[2])
        return ng.optimizers.registry[self.name](array, budget=self.budget, num_workers=1)

    def _advance(self, obs: Observation, key: Any) -> None:
        """Repeat the asks that led to a trial, and tell its loss."""
        loss = obs.loss
        if loss is None:
            loss = UNKNOWN if self._worst is None else self._worst
        asks = self._asked_for(obs)
        if asks and np.array_equal(self._candidate(asks - 1), obs.x):
            self._answer(loss)
        elif obs.loss is not None:
            self._tell_not_asked(obs.x, loss)
        self.keys.append(key)
        self.asks = 0
        self._losses[obs.fingerprint] = loss
        if obs.loss is not None:
            self._worst = obs.loss if self._worst is None else max(self._worst, obs.loss)

    def _candidate(self, attempt: int) -> Vector:
        """The point on offer after `attempt` duplicates."""
        while self.asks <= attempt:
            if self.asks > 0 and self._offer is not None:
                loss = self._losses.get(self.space.decode(self._offer[1]).fingerprint)
                if loss is None:  # no duplicate, as it was for the worker that proposed the trial: it stays on offer
                    break
                self._answer(loss)
            if self._offer is None:
                asked = self._optimizer.ask()
                self._offer = asked, self.space.snap(self.x0 + asked.value[: self.space.size] * self.space.step)
            self.asks += 1
        assert self._offer is not None
        return self._offer[1]

    def _answer(self, loss: float) -> None:
        assert self._offer is not None
        self._optimizer.tell(self._offer[0], loss)
        self._offer = None

    def _tell_not_asked(self, x: Vector, loss: float) -> None:
        from nevergrad.common.errors import TellNotAskedNotSupportedError

        with suppress(TellNotAskedNotSupportedError):
            self._optimizer.tell(self._optimizer.parametrization.spawn_child(new_value=self._z(x)), loss)

    def _asked_for(self, obs: Observation) -> int:
        if obs.operator == START:  # many ask for it first; told twice, it would count as the only point without noise
            return 1
        return min(noted(obs, "asks") or 0, self.most) if obs.operator == self.name else 0

    def _z(self, x: Vector) -> NDArray[np.float64]:
        """What the optimiser works on: (size,), with an idle 0 added to a single number, which its CMA cannot take."""
        z = (x.astype(np.float64) - self.x0) / self.space.step
        return z if z.size > 1 else np.append(z, 0.0)


def _states(numpy_seed: int, python_seed: int) -> list[Any]:
    return [np.random.RandomState(numpy_seed).get_state(), random.Random(int(python_seed)).getstate()]


@contextmanager
def _random_states(states: list[Any]) -> Iterator[None]:
    """Give the optimiser its own global random states, which some use, and the caller's back on exit."""
    outer: list[Any] = [np.random.get_state(), random.getstate()]  # noqa: NPY002
    try:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
        yield
    finally:
        states[:] = [np.random.get_state(), random.getstate()]  # noqa: NPY002
        np.random.set_state(outer[0])  # noqa: NPY002
        random.setstate(outer[1])


@contextmanager
def _pycma_without_clock() -> Iterator[None]:
    """Keep pycma, which some optimisers call, from seeding the random state from the clock."""
    import cma  # type: ignore[import-untyped]

    options = cma.CMAOptions.defaults()
    clock = options["seed"]
    options["seed"] = np.nan
    try:
        yield
    finally:
        options["seed"] = clock


def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` where the threads it starts are daemons: else Nevergrad's scipy threads keep Python from exiting."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
