"""Whether what a process knows of a study is still in the database, which may be dropped, made anew or set back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from moeopt.study.storage import rows
from moeopt.trials import genome

if TYPE_CHECKING:
    from moeopt.study.storage.resilient import ResilientStorage

logger = logging.getLogger("moeopt.study.storage")

LAST = 2
"""Trials of those that ended last which are looked at again."""


class Ends:
    """The trials of each study that were seen to end last: a database that is set back undoes what happened last."""

    def __init__(self) -> None:
        self._last: dict[int, dict[int, tuple[int, TrialState, datetime | None]]] = {}

    def of(self, study_id: int) -> set[int]:
        """Keys of those of a study."""
        return {*self._last.get(study_id, {})}

    def agree(self, study_id: int, trials: Sequence[FrozenTrial], *, with_last: bool) -> bool:
        """Note what ended; whether trials that were read, which hold those `of` the study, are as they were seen."""
        last = self._last.get(study_id, {}) if with_last else {}
        ends = {t._trial_id: (t.number, t.state, t.datetime_complete) for t in trials if t.state.is_finished()}
        if last.items() - ends.items():
            return False
        if new := sorted(ends.keys() - last.keys(), key=lambda trial_id: (str(ends[trial_id][2]), trial_id)):
            self._last[study_id] = {trial_id: ends[trial_id] for trial_id in new[-LAST:]}
        return True


def set_back(storage: ResilientStorage) -> rows.SetBack:
    """The error; a trial that Optuna ends because of it is to be run again."""
    for owned in [*storage._owned.values()]:
        owned.result.user_attrs[genome.INTERRUPTED] = True
    return rows.SetBack()


def check_there(storage: ResilientStorage, study_id: int) -> None:
    """Raise StudyIsGone when a study was deleted since this process knows it; nothing of it is kept on the disk.

    Raise SetBack when a trial is not there that this thread runs.
    """
    if study_id not in storage._identities:
        return

    def check() -> None:
        with rows.transaction(storage) as session:
            rows.check_there(session, study_id, storage._identities[study_id])

    try:
        storage.waiting(check)
    except rows.StudyIsGone:
        for owned in [*storage._owned.values()]:
            if owned.study_id == study_id:
                owned.result.remove()
        raise
    mine = storage.run_here(study_id)
    if storage.waiting(lambda: rows.still_there(storage, mine)) != mine.keys():
        raise set_back(storage)


def is_missing(storage: ResilientStorage, shaken: bool) -> bool:
    """Whether a study is not there that this process knows, other than by being deleted.

    Args:
        shaken: a connection was lost since it was seen; else it was deleted, unless tables were made anew.
    """
    if not shaken and storage._made in (None, rows.made(storage)):
        return False
    try:
        with rows.transaction(storage) as session:
            for study_id, identity in storage._identities.items():
                rows.check_there(session, study_id, identity)
    except rows.StudyIsGone:
        return True
    return False


def start_over(study: optuna.Study) -> None:
    """After the database was set back: read the study anew, queue what this thread runs, forget what is not there."""
    team: Any = genome.shared(study)
    storage, study_id = team
    logger.warning("%s was set back to an earlier state; the search goes on from there", storage.waiting.place)
    study._storage = optuna.storages.get_storage(storage)  # whose cache holds nothing yet
    mine = storage.run_here(study_id)
    there = storage.waiting(lambda: rows.still_there(storage, mine))
    for trial_id, result in mine.items():
        storage._owned.pop(trial_id, None)
        result.remove()
        if trial_id in there:
            storage.take_over(study_id, trial_id, "the database was set back while it ran")
