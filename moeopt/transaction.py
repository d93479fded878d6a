"""What is written to a database in one transaction: Optuna's storage makes one of every attribute and parameter.

A transaction waits for the disk (1 to 20 ms in SQLite), and Optuna reads the trial before each write. The rows are
those that Optuna writes, in the tables of its schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIALECTS = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
"""Databases whose INSERT replaces a row that is there, and where SQLAlchemy has it."""


SCHEMA = "5."
"""Optuna's versions whose tables are known; with any other, every attribute is written through its storage."""


def serves(storage: Any) -> bool:
    """Whether `write` knows this storage: the `RDBStorage` of this Optuna on one of these databases."""
    import optuna

    known = optuna.__version__.startswith(SCHEMA)
    return known and isinstance(storage, optuna.storages.RDBStorage) and storage.engine.name in DIALECTS


def write(
    storage: Any,
    trial_id: int,
    attrs: Mapping[str, Any],
    user_attrs: Mapping[str, Any],
    params: Mapping[str, tuple[Any, BaseDistribution]],
) -> None:
    """Set system and user attributes, and add parameters that the trial does not have yet.

    Args:
        storage: an `RDBStorage` that `serves`.
        trial_id: Optuna's key of a running trial.
        params: value and distribution by name.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: when the trial has ended.
        sqlalchemy.exc.SQLAlchemyError: when the database fails; then nothing is written.
    """
    from optuna.distributions import distribution_to_json
    from optuna.storages._rdb import models

    dialect = DIALECTS[storage.engine.name]
    with storage.engine.begin() as connection:
        trials = models.TrialModel.__table__
        trial = connection.execute(trials.select().where(trials.c.trial_id == trial_id)).one()
        storage.check_trial_is_updatable(trial_id, trial.state)
        for model, values in ((models.TrialSystemAttributeModel, attrs), (models.TrialUserAttributeModel, user_attrs)):
            _upsert(connection, dialect, model, "trial_id", trial_id, values)
        if params:
            columns = ("param_name", "param_value", "distribution_json")
            facts = [(name, d.to_internal_repr(value), distribution_to_json(d)) for name, (value, d) in params.items()]
            rows = _insert(dialect)(models.TrialParamModel.__table__)
            connection.execute(rows, [{"trial_id": trial_id, **dict(zip(columns, fact))} for fact in facts])


def write_study(storage: Any, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Set system attributes of a study.

    Args:
        storage: an `RDBStorage` that `serves`.
        study_id: Optuna's key of the study.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: when the database fails; then nothing is written.
    """
    from optuna.storages._rdb import models

    in_order = dict(sorted(attrs.items()))  # two writers of the same keys wait for each other, and do not deadlock
    with storage.engine.begin() as connection:
        dialect = DIALECTS[storage.engine.name]
        _upsert(connection, dialect, models.StudySystemAttributeModel, "study_id", study_id, in_order)


def _upsert(connection: Any, dialect: str, model: Any, owner: str, key: int, values: Mapping[str, Any]) -> None:
    if not values:
        return
    rows = _insert(dialect)(model.__table__)
    if dialect == "mysql":
        rows = rows.on_duplicate_key_update(value_json=rows.inserted.value_json)
    else:
        newer = {"value_json": rows.excluded.value_json}
        rows = rows.on_conflict_do_update(index_elements=[owner, "key"], set_=newer)
    connection.execute(rows, [{owner: key, "key": name, "value_json": json.dumps(v)} for name, v in values.items()])


def _insert(dialect: str) -> Any:
    return import_module(f"sqlalchemy.dialects.{dialect}").insert
