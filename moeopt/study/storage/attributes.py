"""Attributes of trials and of studies, through what Optuna keeps private of both.

Optuna makes a transaction of every attribute and parameter, which waits for the disk (1 to 20 ms in SQLite), and reads
the trial before each. Here those of one call are one transaction, in every database whose tables are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from moeopt.showing import shown
from moeopt.study.storage import internals
from moeopt.study.storage.writes import Attrs, Params, Taken
from moeopt.trials import genome
from moeopt.trials.description import (
    DESCRIPTION,
    TEXT,
    Maybe,
    check,
    check_depth,
    check_parts,
    described,
    go_on,
    reading,
)

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from moeopt.study.storage.resilient import ResilientStorage

SAMPLER = "moeopt:sampler"
"""System attribute of a study of plain `optuna.create_study`: settings of the sampler that it goes on with."""


class Team(NamedTuple):
    """The storage of moeopt's that a study is in, which many workers may share, and the study's key there."""

    storage: ResilientStorage
    study_id: int


def team(study: optuna.Study) -> Team | None:
    """The study's storage and its key there, where that is one of moeopt's."""
    if internals.missing() is not None:
        return None
    from moeopt.study.storage.resilient import ResilientStorage

    database = _database(study)
    return Team(database, study._study_id) if isinstance(database, ResilientStorage) else None


def _database(study: optuna.Study) -> Any:
    """A study's storage, without Optuna's cache before it."""
    return getattr(study._storage, "_backend", study._storage)


def frozen_trial(trial: Any) -> FrozenTrial:
    """A running `Trial` as its process knows it; a `FrozenTrial` itself."""
    return getattr(trial, "_cached_frozen_trial", trial)  # type: ignore[no-any-return]


def key(trial: Any) -> int:
    """A trial's key in its storage."""
    return int(trial._trial_id)


def whole_study(study: optuna.Study) -> optuna.Study:
    """The study itself where Optuna hands a sampler one Hyperband bracket of it."""
    return getattr(study, "_study", study)  # type: ignore[no-any-return]


def write(
    study: optuna.Study,
    trial: Any,
    attrs: Attrs,
    user: Attrs | None = None,
    params: Params | None = None,
    unless: Taken | None = None,
) -> bool:
    """Set attributes and new parameters of a running trial, also in the copy at hand; in a database all or none.

    Returns False where `unless` kept it from writing, as only a `ResilientStorage` can.
    """
    storage, user, params = study._storage, user or {}, params or {}
    if (shared := team(study)) is not None:
        if not shared.storage.write_trial(key(trial), attrs, user, params, unless):
            return False
    elif internals.serves(_database(study)):
        from moeopt.study.storage import rows

        rows.write(_database(study), key(trial), attrs, user, params)
    else:
        for name, value in attrs.items():
            storage.set_trial_system_attr(key(trial), name, value)
        for name, value in user.items():
            storage.set_trial_user_attr(key(trial), name, value)
        for name, (value, distribution) in params.items():
            storage.set_trial_param(key(trial), name, distribution.to_internal_repr(value), distribution)
    copy = frozen_trial(trial)
    copy.system_attrs.update(attrs)
    copy.user_attrs.update(user)
    copy.params.update({name: value for name, (value, _) in params.items()})
    copy.distributions.update({name: distribution for name, (_, distribution) in params.items()})
    return True


def taken(study: optuna.Study, plan: str, trials: Iterable[FrozenTrial]) -> Taken:
    """That another trial of a study got a plan since these were read."""
    planned = {key(trial): "plan" in genome.origin(trial) for trial in trials}
    unplanned = [trial_id for trial_id, has_plan in planned.items() if not has_plan]
    return Taken(study._study_id, plan, max(planned, default=-1), unplanned)


def mark_interrupted(study: optuna.Study, trial: FrozenTrial) -> None:
    """Note on a trial that it is to be run again, whatever becomes of it."""
    study._storage.set_trial_user_attr(key(trial), genome.INTERRUPTED, True)


def study_attributes(study: optuna.Study) -> Attrs:
    """System attributes of a study, as its storage has them now."""
    return study._storage.get_study_system_attrs(study._study_id)


def write_study(study: optuna.Study, attrs: Attrs) -> None:
    """Set system attributes of a study; in a database all or none."""
    if internals.serves(_database(study)):
        from moeopt.study.storage import rows

        def call() -> None:
            rows.write_study(_database(study), study._study_id, attrs)

        shared = team(study)
        call() if shared is None else shared.storage.waiting(call)
    else:
        for name, value in attrs.items():
            study._storage.set_study_system_attr(study._study_id, name, value)


def recorded_sampler(study: optuna.Study) -> dict[str, Any] | None:
    """The settings of the sampler that a study goes on with; None where it does not say.

    Raises:
        StudyError: when they are of another form than moeopt writes.
    """
    with reading(study.study_name):
        if DESCRIPTION in study.user_attrs:
            return described(study)["sampler"]  # type: ignore[no-any-return]
        settings = study_attributes(study).get(SAMPLER)
    where = f"study {shown(study.study_name)}: {SAMPLER!r}"
    check_depth(settings, where)
    check(settings, Maybe({"name": TEXT}), where)
    return settings


def record_sampler(study: optuna.Study, settings: Attrs) -> None:
    """Note the sampler of a study of plain `optuna.create_study`, which says nothing of what it searches."""
    write_study(study, {SAMPLER: settings})


def check_sampler(study: optuna.Study, settings: Attrs) -> None:
    """Raise StudyError, naming what differs, unless a study's sampler, if it says so, has these settings."""
    stored = recorded_sampler(study)
    if stored is not None:
        check_parts(study, {"sampler": stored}, {"sampler": settings}, go_on(study))
