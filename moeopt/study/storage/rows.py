"""Rows of Optuna's tables: read, written, locked. What workers must agree on is one transaction each.

Whoever creates a trial, takes one over or delivers a result (`claims`, `ends`) holds the lock on the study's row, as
Optuna does when it creates a trial; whoever ends one, the lock on the trial's. In SQLite a transaction has the one
write lock from its start. So what is read within stays true until the commit, and of a worker that dies within nothing
is left.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models as _models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import func, or_
from sqlalchemy.orm import Session

from moeopt.study.storage.failures import SetBack, StudyIsGone
from moeopt.study.storage.internals import DIALECTS
from moeopt.study.storage.spool import Result, same_start
from moeopt.study.storage.writes import Attrs, Params, Taken
from moeopt.trials import genome

IDENTITY = "moeopt:identity"
"""System attribute of a study: a random name, by which results on a disk know it."""
SUCCESSOR = "moeopt:successor"
"""System attribute of a trial that was taken over: the number of the one trial that repeats it."""
models: Any = _models  # SQLAlchemy's columns have no types there
StudyAttr = models.StudySystemAttributeModel
SystemAttr, UserAttr = models.TrialSystemAttributeModel, models.TrialUserAttributeModel


@contextmanager
def transaction(storage: Any, study_id: int | None = None, identity: str | None = None) -> Iterator[Session]:
    """A transaction; with `study_id` it holds the lock on that study, in SQLite on the database in any case.

    With `identity` it begins only while the key is this study's, as `check_there` says.
    """
    with Session(storage.engine) as session, session.begin():
        if storage.engine.name == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        if study_id is not None:
            locked(session, models.StudyModel, study_id)
            if identity is not None:
                check_there(session, study_id, identity)
        yield session


def locked(session: Session, model: Any, key: int) -> Any:
    """The study or trial of that key, locked; StudyIsGone or SetBack where there is none."""
    try:
        return model.find_or_raise_by_id(key, session, for_update=True)
    except KeyError:
        raise (StudyIsGone if model is models.StudyModel else SetBack) from None


def attributes(session: Session, model: Any, trial_id: int) -> dict[str, Any]:
    """All attributes of a trial, of one kind."""
    return {row.key: json.loads(row.value_json) for row in session.query(model).filter_by(trial_id=trial_id)}


def set_attributes(session: Session, model: Any, owner: int, values: Attrs) -> None:
    """Insert or replace attributes of one kind, of a trial or a study by its key."""
    key = "study_id" if model is StudyAttr else "trial_id"
    # In order: two writers of the same attributes wait for each other, and do not deadlock.
    rows = [{key: owner, "key": name, "value_json": json.dumps(value)} for name, value in sorted(values.items())]
    _replace(session, model, (key, "key"), "value_json", rows)


def _replace(session: Session, model: Any, unique: Sequence[str], column: str, rows: list[dict[str, Any]]) -> None:
    """Insert rows; of those that are there, replace a column. What the session knows of them it reads anew."""
    if not rows:
        return
    session.flush()
    dialect = DIALECTS[session.get_bind().dialect.name]
    insert = import_module(f"sqlalchemy.dialects.{dialect}").insert(model.__table__)
    if dialect == "mysql":
        insert = insert.on_duplicate_key_update({column: insert.inserted[column]})
    else:
        insert = insert.on_conflict_do_update(index_elements=unique, set_={column: insert.excluded[column]})
    session.execute(insert, rows)
    session.expire_all()


def write(
    storage: Any,
    trial_id: int,
    attrs: Attrs,
    user_attrs: Attrs,
    params: Params,
    unless: Taken | None = None,
    started: datetime | None = None,
) -> bool:
    """Set system and user attributes of a running trial, and add parameters that it does not have yet.

    Args:
        storage: one that `internals.serves`.
        trial_id: Optuna's key of the trial.
        params: value and distribution by name.
        unless: what keeps it from writing; then False is returned.
        started: when the trial was started, naive UTC as Optuna stores it; None: whenever.

    Raises:
        KeyError: when there is no such trial, as the database was set back to an earlier state.
        optuna.exceptions.UpdateFinishedTrialError: when the trial has ended.
        sqlalchemy.exc.SQLAlchemyError: when the database fails; then nothing is written.
    """
    with transaction(storage, None if unless is None else unless.study_id) as session:
        if unless is not None and _is_taken(session, trial_id, unless):
            return False
        trial = session.get(models.TrialModel, trial_id, with_for_update=True)
        if trial is None or not same_start(started, trial._datetime_start_utc):
            raise KeyError(f"trial key {trial_id}")
        storage.check_trial_is_updatable(trial_id, trial.state)
        set_attributes(session, SystemAttr, trial_id, attrs)
        set_attributes(session, UserAttr, trial_id, user_attrs)
        rows = [_parameter(trial_id, name, *param) for name, param in params.items()]
        _replace(session, models.TrialParamModel, ("trial_id", "param_name"), "param_value", rows)
    return True


def _parameter(trial_id: int, name: str, value: Any, distribution: BaseDistribution) -> dict[str, Any]:
    internal, described = distribution.to_internal_repr(value), distribution_to_json(distribution)
    return {"trial_id": trial_id, "param_name": name, "param_value": internal, "distribution_json": described}


def _is_taken(session: Session, trial_id: int, taken: Taken) -> bool:
    """Whether another trial got the plan since; the session holds the study's lock, so that no other can meanwhile."""
    trials = models.TrialModel
    since = or_(trials.trial_id > taken.newest, trials.trial_id.in_(taken.open))
    noted = session.query(SystemAttr.value_json).join(trials, trials.trial_id == SystemAttr.trial_id)
    noted = noted.filter(trials.study_id == taken.study_id, since, trials.trial_id != trial_id)
    origins = [json.loads(text) for (text,) in noted.filter(SystemAttr.key == genome.ORIGIN)]
    return any(isinstance(origin, dict) and origin.get("plan") == taken.plan for origin in origins)


def write_study(storage: Any, study_id: int, attrs: Attrs) -> None:
    """Set system attributes of a study.

    Args:
        storage: one that `internals.serves`.
        study_id: Optuna's key of the study.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: when the database fails; then nothing is written.
    """
    with transaction(storage) as session:
        set_attributes(session, StudyAttr, study_id, attrs)


def check_there(session: Session, study_id: int, identity: str) -> None:
    """Raise StudyIsGone unless the key is this study's; SQLite gives that of one that was deleted to the next.

    What must see what others committed has its lock before: a transaction of MySQL sees what was at its first read.
    """
    stored = session.query(StudyAttr.value_json).filter_by(study_id=study_id, key=IDENTITY).scalar()
    if stored is None or json.loads(stored) != identity:
        raise StudyIsGone


def still_there(storage: Any, results: Mapping[int, Result]) -> set[int]:
    """Which of these trials are in the database, rather than none or others by their keys."""
    trials = models.TrialModel
    with Session(storage.engine) as session:
        stored = session.query(trials.trial_id, trials._datetime_start_utc).filter(trials.trial_id.in_(results))
        return {trial_id for trial_id, started in stored if results[trial_id].is_of(started)}


def tables(storage: Any) -> Any:
    """What changes when the tables are made anew."""
    asked = {
        "sqlite": "PRAGMA schema_version",
        "postgresql": "SELECT CAST(CAST('studies' AS regclass) AS oid)",
        "mysql": "SELECT create_time FROM information_schema.tables"
        " WHERE table_schema = DATABASE() AND table_name = 'studies'",
    }
    with storage.engine.connect() as connection:
        return connection.exec_driver_sql(asked[DIALECTS[storage.engine.name]]).scalar()


def identity(storage: Any, study_id: int) -> str:
    """The study's random identity; a study without gets one."""
    with transaction(storage, study_id) as session:
        row = session.query(StudyAttr).filter_by(study_id=study_id, key=IDENTITY).one_or_none()
        if row is None:
            row = StudyAttr(study_id=study_id, key=IDENTITY, value_json=json.dumps(uuid.uuid4().hex))
            session.add(row)
        return str(json.loads(row.value_json))


def study_names(storage: Any) -> list[str]:
    """Names of all studies, the oldest first; nothing else of them is read, as it may be damaged."""
    with Session(storage.engine) as session:
        names = session.query(models.StudyModel.study_name).order_by(models.StudyModel.study_id)
        return [name for (name,) in names]


def study_of(storage: Any, trial_id: int) -> int:
    """The study of a trial."""
    with Session(storage.engine) as session:
        return int(models.TrialModel.find_or_raise_by_id(trial_id, session).study_id)


def frozen(storage: Any, trial: Any) -> FrozenTrial:
    """A trial as the database has it."""
    return RDBStorage._build_frozen_trial_from_trial_model(storage, trial)


def repeating(storage: Any, study_id: int, number: int) -> list[int]:
    """Keys of a trial, of the one that repeats it, of the one that repeats that, and so on."""
    ids: list[int] = []
    with Session(storage.engine) as session:
        trials = session.query(models.TrialModel.trial_id)
        while (trial_id := trials.filter_by(study_id=study_id, number=number).scalar()) is not None:
            ids.append(trial_id)
            noted = session.query(SystemAttr.value_json).filter_by(trial_id=trial_id, key=SUCCESSOR).scalar()
            successor = None if noted is None else json.loads(noted)
            if not isinstance(successor, int) or successor <= number:
                break
            number = successor
    return ids


def beat(storage: Any, trial_ids: list[int]) -> None:
    """Note that these trials' worker lives."""
    beats = models.TrialHeartbeatModel
    with transaction(storage) as session:
        session.query(beats).filter(beats.trial_id.in_(trial_ids)).update(
            {beats.heartbeat: func.current_timestamp()}, synchronize_session=False
        )


def heartbeats(storage: Any, study_id: int) -> dict[int, datetime]:
    """The last heartbeat of every running trial that has one; not to be compared with any clock."""
    trials, beats = models.TrialModel, models.TrialHeartbeatModel
    with Session(storage.engine) as session:
        running = session.query(trials.trial_id, beats.heartbeat).join(beats)
        return dict(map(tuple, running.filter(trials.study_id == study_id, trials.state == TrialState.RUNNING)))
