"""Trials run until a study holds all that are wanted, by this worker and any others."""

from __future__ import annotations

import math
import numbers
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from moeopt.deprecation import deprecated
from moeopt.errors import StorageError, StudyError, got
from moeopt.samplers import GenomeSampler, UnknownSampler
from moeopt.study import recipe
from moeopt.study.progress import finished, stalled
from moeopt.study.reclaiming import reclaim
from moeopt.study.storage import attributes
from moeopt.study.storage.failures import NoSlotLeft, SetBack, StudyIsGone

SHORTEST_LOOK = 0.05
LONGEST_LOOK = 1.0
"""Seconds, at most, between two looks for a trial to start, while others run elsewhere."""
Goal = Callable[[optuna.Trial], "float | Sequence[float]"]
Callback = Callable[[optuna.Study, FrozenTrial], None]
"""What is called after each trial with the study and that trial, as callbacks of Optuna are."""


def optimize(
    study: optuna.Study,
    objective: Goal,
    *,
    n_trials: int | None = None,
    timeout: float | None = None,
    patience: int | None = None,
    callbacks: Iterable[Callback] = (),
    trials: int | None = None,
) -> None:
    """`study.optimize` until the whole study holds `n_trials` finished trials, so that a resumed run does the rest.

    Any number of workers may call it for one study, whose storage is of `open_storage`: each starts the next trial
    while fewer than `n_trials` were started, so that none is one too many. A worker that finds no trial to start waits
    for those that run elsewhere, as their workers may die, and returns when they have ended.

    The first Ctrl-C lets the running trial finish and returns; a second one interrupts it, and the trial is queued
    again when the study is resumed. While the database is away, the first Ctrl-C returns at once, and so does the end
    of the timeout: what was evaluated is stored by the next worker of this host.

    Args:
        n_trials: finished trials the study shall hold, those of earlier runs included.
        timeout: seconds for this run.
        patience: stop after so many trials without a better one.
        trials: the former name of `n_trials`, gone in 0.2.0.

    Warns where the sampler says that so many trials leave out what it is for (`GenomeSampler.shortfall`).

    Raises:
        StudyError: when none of the three says when to stop, or one cannot; when the study would not go on as it was
            made (`Objective.check`), before a trial starts.
        StorageError: when the database was away for longer than its storage waits, or the study was deleted.
    """
    if trials is not None:
        deprecated("optimize(trials=)", "n_trials=, as by Optuna", since="0.1.0", until="0.2.0")
        n_trials = trials if n_trials is None else n_trials
    check_limits(n_trials, timeout, patience)
    callbacks = _checked(study, objective, callbacks)
    left_out = study.sampler.shortfall(n_trials) if n_trials and isinstance(study.sampler, GenomeSampler) else None
    until = None if timeout is None else time.monotonic() + timeout
    team = attributes.team(study)

    def enough() -> bool:
        return (n_trials is not None and finished(study) >= n_trials) or (
            patience is not None and stalled(study) >= patience
        )

    stop = _Stop()

    def stop_when_done(study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        stop.delay = SHORTEST_LOOK
        if stop.asked or ((patience is not None or team is None) and enough()):
            study.stop()

    def left() -> float | None:
        return None if until is None else max(0.0, until - time.monotonic())

    def run() -> None:
        nonlocal left_out
        if left_out is not None and not finished(study):  # of a study that goes on, it was said
            warnings.warn(left_out, stacklevel=3)
        left_out = None
        if n_trials is not None or patience is not None:
            recipe.want(study, n_trials, patience)
        reclaim(study)
        while not stop.asked and not enough():
            try:
                with nullcontext() if team is None else team.storage.slots(n_trials):
                    study.optimize(
                        _on_disk_first(study, objective), timeout=left(), callbacks=[*callbacks, stop_when_done]
                    )
                return
            except NoSlotLeft:
                if not _wait_for_others(study, n_trials, stop, left):
                    return

    with _stoppable(study, stop, until):
        while True:
            try:
                return run()
            except Exception as error:
                if not _goes_on_from_earlier(study, error):
                    raise
                time.sleep(SHORTEST_LOOK)


def _checked(study: Any, objective: Any, callbacks: Any) -> list[Callback]:
    """The callbacks, once all three are what they are called; StudyError for what is not, or goes on with another."""
    if not isinstance(study, optuna.Study):
        raise StudyError(f"study must be an optuna.Study, as moeopt.create_study gives it, got {got(study)}")
    if not callable(objective):
        raise StudyError(f"objective must be called with trials, such as a moeopt.Objective, got {got(objective)}")
    if callable(callbacks) or isinstance(callbacks, str):
        raise StudyError(f"callbacks is a list, got {got(callbacks)}")
    ours = sys.modules.get("moeopt.study.objective")  # which imports torch; whoever has an objective has it
    if ours is not None and isinstance(objective, ours.Objective):
        objective.check(study)
    elif isinstance(study.sampler, UnknownSampler):
        raise StudyError(study.sampler.why)
    return list(callbacks)


def check_limits(n_trials: Any = None, timeout: Any = None, patience: Any = None) -> None:
    """Raise StudyError unless these, of `optimize`, say when to stop."""
    if n_trials is None and timeout is None and patience is None:
        raise StudyError("say when to stop: n_trials, timeout or patience")
    for name, count in (("n_trials", n_trials), ("patience", patience)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1):
            raise StudyError(f"{name} must be an integer of at least 1, got {count!r}")
    if timeout is not None and (not isinstance(timeout, numbers.Real) or not float(timeout) >= 0):
        raise StudyError(f"timeout must be a number of seconds of at least 0, got {timeout!r}")


def _on_disk_first(study: optuna.Study, objective: Goal) -> Goal:
    """The objective; what it gives is on this host's disk before Optuna tells the storage, which may be away."""
    team = attributes.team(study)
    if team is None:
        return objective
    storage = team.storage

    def evaluated(trial: optuna.Trial) -> float | Sequence[float]:
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            storage.hold(attributes.key(trial), TrialState.PRUNED)
            raise
        values: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
        if all(isinstance(each, numbers.Real) and not math.isnan(each) for each in values):
            storage.hold(attributes.key(trial), TrialState.COMPLETE, [float(each) for each in values])
        else:
            storage.hold(attributes.key(trial), TrialState.FAIL)
        return value

    return evaluated


def _wait_for_others(study: optuna.Study, n_trials: int | None, stop: _Stop, left: Callable[[], float | None]) -> bool:
    """Wait until there is a trial to start; False when there will be none, or it is time to stop."""
    team = attributes.team(study)
    assert team is not None
    while not stop.asked and (remaining := left()) != 0.0:
        # First, and longer as long as nothing is run: however the others' trials look, nobody turns in circles.
        time.sleep(stop.delay * random.uniform(0.5, 1.0) if remaining is None else min(stop.delay, remaining))
        stop.delay = min(2 * stop.delay, LONGEST_LOOK)
        reclaim(study)
        if n_trials is not None and finished(study) >= n_trials:
            return False
        with team.storage.slots(n_trials):
            if team.storage.claimable(team.study_id):
                return True
    return False


def _goes_on_from_earlier(study: optuna.Study, error: BaseException) -> bool:
    """Whether an error is that the database was set back to an earlier state; then the study is read anew from there.

    Raises:
        StudyIsGone: where the study is not there any more.
    """
    team, failure = attributes.team(study), _storage_failure(error)
    if team is None or failure is None or (isinstance(failure, StorageError) and not isinstance(failure, SetBack)):
        return False
    try:
        team.storage.check_there(team.study_id)
    except SetBack as set_back:
        failure = set_back
    if not isinstance(failure, SetBack):
        return False
    team.storage.start_over(study)
    return True


@dataclass
class _Stop:
    """Whether Ctrl-C was pressed, and how long to wait until the next look for a trial to start."""

    asked: bool = False
    delay: float = SHORTEST_LOOK


def _storage_failure(error: BaseException | None) -> StorageError | KeyError | AssertionError | None:
    """What a storage raised that is behind an error, or else Optuna, which read there what cannot be.

    Where a storage fails while Optuna ends a trial, Optuna stumbles over that, and raises anything.
    """
    stumble: KeyError | AssertionError | None = None
    while error is not None:
        if isinstance(error, StorageError):
            return error
        if stumble is None and isinstance(error, (KeyError, AssertionError)):
            stumble = error
        error = None if error.__suppress_context__ else error.__context__
    return stumble


@contextmanager
def _stoppable(study: optuna.Study, stop: _Stop, until: float | None) -> Iterator[None]:
    """Within it, the first Ctrl-C lets the running trial finish; the second raises KeyboardInterrupt.

    While the database is away, neither it nor the end of the time (`until`, `time.monotonic`) is waited out.
    """
    team = attributes.team(study)
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None

    def finish_trial(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.asked = True
        if team is not None:
            team.storage.waiting.stopped = True
        with suppress(RuntimeError):  # before the first trial, or while others run the last ones
            study.stop()

    if team is not None:
        team.storage.waiting.deadline = until
    if main:
        signal.signal(signal.SIGINT, finish_trial)
    try:
        yield
    except Exception as error:
        failure = _storage_failure(error)
        unclear = failure is not None and not isinstance(failure, StorageError)
        if team is not None and (unclear or isinstance(failure, StudyIsGone)):
            team.storage.check_there(team.study_id)
        if not isinstance(failure, StorageError):
            raise
        if not stop.asked and (until is None or time.monotonic() < until):
            raise failure from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
        if team is not None:
            team.storage.waiting.deadline = None
            team.storage.waiting.stopped = False
