"""Notes and figures of studies, written again when their trials changed."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import optuna

from moeopt.errors import FigureError, MoeoptError, StudyError
from moeopt.report.dashboard.digest import LONGEST, SELECTION, Digest, Row, digest
from moeopt.report.dashboard.drawing import Curve, best_curve, draw
from moeopt.report.dashboard.note import joined, note
from moeopt.showing import line
from moeopt.study import COMMAND, DESCRIPTION
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
        self, storage: BaseStorage, url: str, *, every: float = EVERY, report: Callable[[str], None] = lambda line: None
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
                changed += self._changed(name, study_id)
            except Exception as error:  # gone, or damaged: it must not keep others from their figures
                self.say(name, error)
        for by_id in (self._seen, self._rows, self._curves):
            for gone in by_id.keys() - ids:
                by_id.pop(gone)
        done = []
        for study_id, study, content in changed:
            task = _task(content)
            others = {name: curve for i, (t, name, curve) in self._curves.items() if i != study_id and t == task}
            try:
                attach(study, content, self.url, others)
                done.append(study.study_name)
            except Exception as error:  # may not be written now, or is gone
                self._seen[study_id] = ((), time.monotonic())
                self.say(study.study_name, error)
        return done

    def say(self, name: str, error: Exception) -> None:
        """Report why a study, or with an empty name the storage, was not refreshed, unless that was said before."""
        try:
            with readable_errors(self.url):
                raise error
        except MoeoptError as readable:
            reason = str(readable)
        except Exception:
            reason = f"{type(error).__name__}: {error}"
        what = f"study {line(name, LONGEST)!r}" if name else "the storage"
        told = f"{what} is not refreshed: {line(reason)}"
        if told not in self._said:
            self._said.add(told)
            self.report(told)

    def _changed(self, name: str, study_id: int) -> list[tuple[int, optuna.Study, Digest]]:
        """The study and its digest where it is of moeopt, is due, and is not as it was at its last refresh."""
        before, when = self._seen.get(study_id, (None, -math.inf))
        if time.monotonic() - when < self.every:
            return []
        attrs = self.storage.get_study_user_attrs(study_id)
        if DESCRIPTION not in attrs:
            return []
        states = [trial.state for trial in self.storage.get_all_trials(study_id, deepcopy=False)]
        now = (len(states), sum(state.is_finished() for state in states), repr(attrs.get(SELECTION))[:100_000])
        if now == before:
            return []
        self._seen[study_id] = (now, time.monotonic())
        study = optuna.load_study(study_name=name, storage=self.storage)
        content = digest(study, self._rows.setdefault(study_id, {}))
        curve, task = best_curve(content), _task(content)
        if curve is not None and task is not None:
            self._curves[study_id] = (task, content.name, curve)
        return [(study_id, study, content)]


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
                if DESCRIPTION in study.user_attrs:
                    team = attributes.team(study)
                    place = "..." if team is None else hidden(anywhere(str(team.storage.url)))
                    attach(study, digest(study, self._rows.setdefault(name, {})), place, {})
            except Exception as error:  # a figure must not end a search
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"study {line(name, LONGEST)!r} has no current figures: {error}", stacklevel=2)


def attach(study: optuna.Study, content: Digest, url: str, others: Mapping[str, Curve]) -> int:
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

    text = note(content, study.user_attrs.get(COMMAND), url, trials_wanted(study))
    figures = draw(content, others)
    written = 0
    for _ in range(TRIES):
        there = {
            key: value
            for key, value in attributes.study_attributes(study).items()
            if key.startswith("dashboard:") and isinstance(value, int if key.endswith("note_ver") else str)
        }
        desk = _study_in_memory()
        attributes.write_study(desk, there)
        try:
            before = get_note(desk)
        except (KeyError, TypeError, ValueError):  # no note, but what a stranger wrote under its keys
            before = ""
        body = joined(before, text)
        if body != before:
            save_note(desk, body)
        for name, figure in figures.items():
            save_plotly_graph_object(desk, figure, graph_object_id=name)
        changed = {key: value for key, value in attributes.study_attributes(desk).items() if there.get(key) != value}
        if not changed:
            break
        attributes.write_study(study, changed)
        written += len(changed)
    return written


def _study_in_memory() -> optuna.Study:
    """A study for this module's own use, of which Optuna does not tell; it does of those that other threads make."""
    here, logger = threading.get_ident(), logging.getLogger("optuna.storages._in_memory")

    def said_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(said_elsewhere)
    try:
        return optuna.create_study(study_name="desk", storage=optuna.storages.InMemoryStorage())
    finally:
        logger.removeFilter(said_elsewhere)


def _task(content: Digest) -> tuple[str, ...] | None:
    """What studies whose losses compare have in common; None where a study does not say."""
    paths = (
        ("model", "weights"),
        ("task", "fingerprint"),
        ("task", "limit"),
        ("evaluation", "score"),
        ("space", "keep"),
    )
    if not all(isinstance(content.part(*path), str) for path in paths[:2]):
        return None
    return tuple(line(content.part(*path)) for path in paths)
