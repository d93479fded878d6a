"""What this room uses of Optuna that is private, and whether the Optuna at hand has it as Optuna 5.0 does.

Where it has not, a storage is Optuna's own (`opening`), and attributes are written one by one (`attributes`).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

MODELS = "optuna.storages._rdb.models"
SCHEMA_VERSION = 12
TABLES = frozenset({
    "alembic_version", "studies", "study_directions", "study_system_attributes", "study_user_attributes",
    "trial_heartbeats", "trial_intermediate_values", "trial_params", "trial_system_attributes",
    "trial_user_attributes", "trial_values", "trials", "version_info",
})  # fmt: skip
METHODS = (
    "_build_frozen_trial_from_trial_model", "_create_new_trial", "_get_best_trial_id", "_get_prepared_new_trial",
    "_get_stale_trial_ids", "_get_trials", "_set_trial_param", "_set_trial_value_without_commit",
    "check_trial_is_updatable", "get_heartbeat_interval", "record_heartbeat",
)  # fmt: skip
"""Of `RDBStorage`."""
COLUMNS = {
    "StudyModel": ("find_or_raise_by_id", "study_id", "study_name"),
    "StudySystemAttributeModel": ("key", "study_id", "value_json"),
    "TrialModel": (
        "_datetime_start_utc", "datetime_complete", "datetime_start", "find_or_raise_by_id", "number", "state",
        "study_id", "trial_id",
    ),
    "TrialSystemAttributeModel": ("key", "trial_id", "value_json"),
    "TrialUserAttributeModel": ("key", "trial_id", "value_json"),
    "TrialParamModel": ("distribution_json", "param_name", "param_value", "trial_id"),
    "TrialIntermediateValueModel": ("step", "trial_id"),
    "TrialHeartbeatModel": ("heartbeat", "trial_id"),
}  # fmt: skip
DIALECTS = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
"""Databases whose INSERT replaces a row that is there, and where SQLAlchemy has it."""


@cache
def missing() -> str | None:
    """The first private part that this Optuna lacks, or has otherwise; None where it has all."""
    from optuna import storages
    from optuna.storages import RDBStorage

    cache = getattr(getattr(storages, "_CachedStorage", None), "__init__", None)
    if "_backend" not in getattr(getattr(cache, "__code__", None), "co_names", ()):  # set there, and read by `team`
        return "this Optuna has no _CachedStorage._backend"
    try:
        models: Any = import_module(MODELS)
    except ImportError:
        return f"this Optuna has no module {MODELS}"
    schema = getattr(models, "SCHEMA_VERSION", None)
    if schema != SCHEMA_VERSION:
        return f"the tables of this Optuna are of version {schema}, not {SCHEMA_VERSION}"
    lacking = [f"RDBStorage.{name}" for name in METHODS if not hasattr(RDBStorage, name)]
    for model, names in COLUMNS.items():
        lacking += [f"{model}.{name}" for name in names if not hasattr(getattr(models, model, None), name)]
    return f"this Optuna has no {lacking[0]}" if lacking else None


def serves(database: Any) -> bool:
    """Whether rows of a storage may be written here: it is Optuna's `RDBStorage` on a known schema and database."""
    from optuna.storages import RDBStorage

    return isinstance(database, RDBStorage) and database.engine.name in DIALECTS and missing() is None
