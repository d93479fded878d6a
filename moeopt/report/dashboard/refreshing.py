"""Notes and figures of studies, written again when their trials changed."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import optuna

from moeopt.errors import FigureError, MoeoptError, StudyError
from moeopt.report.dashboard.digest import SELECTION, Digest, Row, digest, is_ours, shown
from moeopt.report.dashboard.drawing import Curve, best_curve, draw
from moeopt.report.dashboard.note import joined, note
from moeopt.spaces.base import NAMED_AT_MOST
from moeopt.study import COMMAND
from moeopt.study.storage import anywhere, attributes, hidden, readable_errors, study_names

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

EVERY = 15.0
"""Seconds between two refreshes of one study, at least."""
TRIES = 3
"""Times that notes and figures are written until they stand as meant, where another refresher writes, too."""


class Refresher:
    """Writes notes and figures of all studies of a storage, each no more often than `every` seconds.

    Of a study that did not change only its attributes and its unfinished trials are asked for. A study
    that moeopt did not make is left alone; one that cannot be read gets a note that says so, and does not keep others
    from theirs. Several refreshers of one storage write the same and do each other no harm.

    Args:
        storage: an Optuna storage, best one that keeps finished trials in memory.
        url: what the notes call it, without a password.
        every: seconds.
        report: takes a line for every study that could not be refreshed, once for each reason.
    """

    def __init__(
        self,
        storage: BaseStorage,
        url: str,
        *,
        every: float = EVERY,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.storage, self.url, self.every, self.report = storage, url, every, report
        self._seen: dict[int, tuple[tuple[Any, ...], float]] = {}
        self._rows: dict[int, dict[int, Row]] = {}
        self._curves: dict[int, tuple[tuple[str, ...], str, Curve]] = {}
        self._said: set[str] = set()

    def refresh(self) -> list[str]:
        """Refresh the studies that changed and are due, and return their names."""
        changed: list[tuple[int, optuna.Study, Digest]] = []
        ids = set()
        for name in study_names(self.storage):
            try:
                study_id = self.storage.get_study_id_from_name(name)
                ids.add(study_id)
                found = self._changed(name, study_id)
                if found is not None:
                    changed.append((study_id, *found))
            except Exception as error:  # gone, or damaged: it must not keep others from their figures
                self.say(name, error)
        for of in (self._seen, self._rows, self._curves):
            for gone in of.keys() - ids:
                of.pop(gone)
        done = []
        for study_id, study, read in changed:
            try:
                attach(study, read, self.url, self._others(study_id, read))
                done.append(study.study_name)
            except Exception as error:  # may not be written now, or is gone
                self._seen[study_id] = ((), time.monotonic())
                self.say(study.study_name, error)
        return done

    def say(self, name: str, error: Exception) -> None:
        """Report why a study, or with an empty name the storage, was not refreshed, unless that was said before."""
        with suppress(MoeoptError):
            try:
                with readable_errors(self.url):
                    raise error
            except MoeoptError as readable:
                error = readable
            except Exception:
                pass
        line = (f"study {shown(name)!r}" if name else "the storage") + f" is not refreshed: {_reason(error)}"
        if line not in self._said:
            self._said.add(line)
            self.report(line)

    def _changed(self, name: str, study_id: int) -> tuple[optuna.Study, Digest] | None:
        """The study and its digest where it is of moeopt, is due, and is not as it was at its last refresh."""
        before, when = self._seen.get(study_id, (None, -math.inf))
        if time.monotonic() - when < self.every:
            return None
        attrs = self.storage.get_study_user_attrs(study_id)
        if not is_ours(attrs):
            return None
        states = [trial.state for trial in self.storage.get_all_trials(study_id, deepcopy=False)]
        now = (len(states), sum(state.is_finished() for state in states), repr(attrs.get(SELECTION))[:100_000])
        if now == before:
            return None
        self._seen[study_id] = (now, time.monotonic())
        study = optuna.load_study(study_name=name, storage=self.storage)
        read = digest(study, self._rows.setdefault(study_id, {}))
        curve, of = best_curve(read), _task(read)
        if curve is not None and of is not None:
            self._curves[study_id] = (of, read.name, curve)
        return study, read

    def _others(self, study_id: int, read: Digest) -> dict[str, Curve]:
        of = _task(read)
        return {name: curve for i, (task, name, curve) in self._curves.items() if i != study_id and task == of}


class Refresh:
    """A callback of `study.optimize` that keeps the study's note and figures current, for whoever runs a dashboard.

        study.optimize(objective, n_trials=400, callbacks=[moeopt.report.dashboard.Refresh()])

    It works after a trial, at most every `every` seconds, and never raises: what went wrong is warned of, once.

    Args:
        every: seconds.
    """

    def __init__(self, every: float = EVERY) -> None:
        if not every >= 0:
            raise StudyError(f"every must be at least 0 seconds, got {every!r}")
        self.every = every
        self._last: dict[str, float] = {}
        self._rows: dict[str, dict[int, Row]] = {}
        self._lock = threading.Lock()
        self._warned = False

    def __call__(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        name = study.study_name
        with self._lock:
            if time.monotonic() - self._last.get(name, -math.inf) < self.every:
                return
            self._last[name] = time.monotonic()
            try:
                if is_ours(study.user_attrs):
                    team = attributes.team(study)
                    place = "..." if team is None else hidden(anywhere(str(team.storage.url)))
                    attach(study, digest(study, self._rows.setdefault(name, {})), place, {})
            except Exception as error:  # a figure must not end a search
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"study {shown(name)!r} has no current figures: {error}", stacklevel=2)


def attach(study: optuna.Study, read: Digest, url: str, others: Mapping[str, Curve]) -> int:
    """Write a study's note and figures where they differ from what it has; returns how many attributes changed.

    optuna-dashboard's own functions write them into a study in memory that has the dashboard's attributes of this one;
    what changed there is written here at once, so that a page never sees half a figure.

    Raises:
        FigureError: when optuna-dashboard is not installed.
    """
    try:
        from optuna_dashboard import get_note, save_note, save_plotly_graph_object
    except ImportError:
        raise FigureError("notes and figures need optuna-dashboard: pip install 'moeopt[dashboard]'") from None
    from moeopt.study.recipe import wanted as trials_wanted

    wanted = trials_wanted(study)
    about, command = draw(read, others, _named(study, read)), study.user_attrs.get(COMMAND)
    written = 0
    for _ in range(TRIES):
        there = {
            key: value
            for key, value in attributes.study_attributes(study).items()
            if key.startswith("dashboard:") and isinstance(value, int if key.endswith("note_ver") else str)
        }
        memory = optuna.storages.InMemoryStorage()
        with _unsaid():
            memory.create_new_study([optuna.study.StudyDirection.MINIMIZE], "desk")
        desk = optuna.load_study(study_name="desk", storage=memory)
        attributes.write_study(desk, there)
        before = _note(get_note, desk)
        body = joined(before, note(read, command, url, wanted))
        if body != before:
            save_note(desk, body)
        for name, figure in about.items():
            save_plotly_graph_object(desk, figure, graph_object_id=name)
        changed = {key: value for key, value in attributes.study_attributes(desk).items() if there.get(key) != value}
        if not changed:
            break
        attributes.write_study(study, changed)
        written += len(changed)
    return written


@contextmanager
def _unsaid() -> Iterator[None]:
    """Within it, Optuna does not tell of the studies in memory that this thread makes for its own use."""
    here, logger = threading.get_ident(), logging.getLogger("optuna.storages._in_memory")

    def said_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(said_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(said_elsewhere)


def _note(get_note: Callable[[Any], str], desk: optuna.Study) -> str:
    try:
        return get_note(desk)
    except (KeyError, TypeError, ValueError):  # no note, but what a stranger wrote under its keys
        return ""


def _named(study: optuna.Study, read: Digest) -> dict[str, float] | None:
    """Importances of named parameters, as the dashboard computes them; None where there are none."""
    if read.space is None or read.space.size > NAMED_AT_MOST or len(read.rows) < 20:
        return None
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that importances are equal is drawn
            return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except Exception:  # parameters of the wrong kinds; our own estimate is still drawn
        return None


def _task(read: Digest) -> tuple[str, ...] | None:
    """What studies whose losses compare have in common; None where a study does not say."""
    paths = (
        ("model", "weights"),
        ("task", "fingerprint"),
        ("task", "limit"),
        ("evaluation", "score"),
        ("space", "keep"),
    )
    if not all(isinstance(read.part(*path), str) for path in paths[:2]):
        return None
    return tuple(shown(read.part(*path)) for path in paths)


def _reason(error: Exception) -> str:
    return shown(str(error) if isinstance(error, MoeoptError) else f"{type(error).__name__}: {error}", 200)
