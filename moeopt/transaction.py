"""What a trial writes to a database, in one transaction: Optuna's storage makes one of every attribute and parameter.

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
    insert = import_module(f"sqlalchemy.dialects.{dialect}").insert
    with storage.engine.begin() as connection:
        trials = models.TrialModel.__table__
        trial = connection.execute(trials.select().where(trials.c.trial_id == trial_id)).one()
        storage.check_trial_is_updatable(trial_id, trial.state)
        for model, values in ((models.TrialSystemAttributeModel, attrs), (models.TrialUserAttributeModel, user_attrs)):
            if not values:
                continue
            rows = insert(model.__table__)
            if dialect == "mysql":
                rows = rows.on_duplicate_key_update(value_json=rows.inserted.value_json)
            else:
                newer = {"value_json": rows.excluded.value_json}
                rows = rows.on_conflict_do_update(index_elements=["trial_id", "key"], set_=newer)
            written = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(v)} for key, v in values.items()]
            connection.execute(rows, written)
        if params:
            columns = ("param_name", "param_value", "distribution_json")
            facts = [(name, d.to_internal_repr(value), distribution_to_json(d)) for name, (value, d) in params.items()]
            rows = insert(models.TrialParamModel.__table__)
            connection.execute(rows, [{"trial_id": trial_id, **dict(zip(columns, fact))} for fact in facts])
