"""What is written to a database in one transaction: Optuna's storage makes one of every attribute and parameter.

A transaction waits for the disk (1 to 20 ms in SQLite), and Optuna reads the trial before each write. The rows are
those that Optuna writes, in the tables of its schema.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIALECTS = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
"""Databases whose INSERT replaces a row that is there, and where SQLAlchemy has it."""


SCHEMA = "5."
"""Optuna's versions whose tables are known; with any other, every attribute is written through its storage."""


ORIGIN = "moeopt:origin"
"""System attribute of a trial that names its plan (`genome.ORIGIN`)."""


@dataclass(frozen=True)
class Taken:
    """Nothing is written where another trial has this plan that was not known when the plan was made.

    Args:
        study_id: Optuna's key of the study.
        plan: its fingerprint.
        newest: the largest key of the trials that were known.
        open: keys of those of them whose plan was not.
    """

    study_id: int
    plan: str
    newest: int
    open: Collection[int]


def known_schema() -> bool:
    """Whether the tables of this Optuna are known."""
    import optuna

    return optuna.__version__.startswith(SCHEMA)


def tables() -> set[str]:
    """The tables of Optuna's schema."""
    from optuna.storages._rdb import models

    return {*models.BaseModel.metadata.tables, "alembic_version"}


def serves(storage: Any) -> bool:
    """Whether `write` knows this storage: the `RDBStorage` of this Optuna on one of these databases."""
    import optuna

    return known_schema() and isinstance(storage, optuna.storages.RDBStorage) and storage.engine.name in DIALECTS


def write(
    storage: Any,
    trial_id: int,
    attrs: Mapping[str, Any],
    user_attrs: Mapping[str, Any],
    params: Mapping[str, tuple[Any, BaseDistribution]],
    unless: Taken | None = None,
    started: datetime | None = None,
) -> bool:
    """Set system and user attributes, and add parameters that the trial does not have yet.

    Args:
        storage: an `RDBStorage` that `serves`.
        trial_id: Optuna's key of a running trial.
        params: value and distribution by name.
        unless: what keeps it from writing; then False is returned.
        started: when the trial was started, naive UTC as Optuna stores it; None: whenever.

    Raises:
        KeyError: when there is no such trial, as the database was set back to an earlier state.
        optuna.exceptions.UpdateFinishedTrialError: when the trial has ended.
        sqlalchemy.exc.SQLAlchemyError: when the database fails; then nothing is written.
    """
    from optuna.distributions import distribution_to_json
    from optuna.storages._rdb import models

    dialect, insert = _dialect(storage)
    with storage.engine.begin() as connection:
        if dialect == "sqlite":  # the lock that INSERT takes, before what is read
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        trials = models.TrialModel.__table__
        if unless is not None and _is_taken(connection, trial_id, unless):
            return False
        found = connection.execute(trials.select().where(trials.c.trial_id == trial_id).with_for_update())
        trial = found.one_or_none()
        if trial is None or not same_start(started, trial.datetime_start):
            raise KeyError(f"trial key {trial_id}")
        storage.check_trial_is_updatable(trial_id, trial.state)
        for model, values in ((models.TrialSystemAttributeModel, attrs), (models.TrialUserAttributeModel, user_attrs)):
            if not values:
                continue
            written = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(v)} for key, v in values.items()]
            connection.execute(_replacing(insert(model.__table__), dialect, ["trial_id", "key"], "value_json"), written)
        if params:
            columns = ("param_name", "param_value", "distribution_json")
            facts = [(name, d.to_internal_repr(value), distribution_to_json(d)) for name, (value, d) in params.items()]
            rows = _replacing(
                insert(models.TrialParamModel.__table__), dialect, ["trial_id", "param_name"], "param_value"
            )
            connection.execute(rows, [{"trial_id": trial_id, **dict(zip(columns, fact))} for fact in facts])
    return True


def same_start(started: datetime | None, stored: datetime | None) -> bool:
    """Whether a trial is the one that was started then; another gets its key when a database is set back.

    MySQL rounds to whole seconds, MariaDB down to them.
    """
    if started is None or stored is None or stored.microsecond:
        return started in (None, stored)
    return abs(stored - started) < timedelta(seconds=1)


def write_study(storage: Any, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Set system attributes of a study.

    Args:
        storage: an `RDBStorage` that `serves`.
        study_id: Optuna's key of the study.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: when the database fails; then nothing is written.
    """
    from optuna.storages._rdb import models

    if not attrs:
        return
    dialect, insert = _dialect(storage)
    rows = insert(models.StudySystemAttributeModel.__table__)
    in_order = sorted(attrs.items())  # two writers of the same keys wait for each other, and do not deadlock
    with storage.engine.begin() as connection:
        connection.execute(
            _replacing(rows, dialect, ["study_id", "key"], "value_json"),
            [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in in_order],
        )


def _dialect(storage: Any) -> tuple[str, Any]:
    """Name and INSERT of a database's dialect."""
    dialect = DIALECTS[storage.engine.name]
    return dialect, import_module(f"sqlalchemy.dialects.{dialect}").insert


def _replacing(rows: Any, dialect: str, unique: list[str], column: str) -> Any:
    """An INSERT that replaces a column of a row that is there."""
    if dialect == "mysql":
        return rows.on_duplicate_key_update({column: rows.inserted[column]})
    return rows.on_conflict_do_update(index_elements=unique, set_={column: rows.excluded[column]})


def _is_taken(connection: Any, trial_id: int, taken: Taken) -> bool:
    """Whether another trial got the plan since; holds the study's lock, so that no other can until the commit.

    Nothing is read before the lock is held: a transaction of MySQL sees what was committed at its first read.
    """
    from optuna.storages._rdb import models
    from sqlalchemy import or_, select

    trials, attrs = models.TrialModel.__table__.c, models.TrialSystemAttributeModel.__table__.c
    studies = models.StudyModel.__table__.c
    connection.execute(select(studies.study_id).where(studies.study_id == taken.study_id).with_for_update())
    since = or_(trials.trial_id > taken.newest, trials.trial_id.in_(taken.open))
    origins = select(attrs.value_json).join_from(
        models.TrialSystemAttributeModel.__table__, models.TrialModel.__table__, attrs.trial_id == trials.trial_id
    )
    found = origins.where(trials.study_id == taken.study_id, since, trials.trial_id != trial_id, attrs.key == ORIGIN)
    others = (json.loads(text) for (text,) in connection.execute(found))
    return any(isinstance(origin, dict) and origin.get("plan") == taken.plan for origin in others)
