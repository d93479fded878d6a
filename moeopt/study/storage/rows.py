"""What workers must agree on, each in one transaction in the tables of Optuna 5: claims, ends, take-overs, deliveries.

Whoever creates a trial, takes one over or delivers a result holds the lock on the study's row, as Optuna does when it
creates a trial; whoever ends one, the lock on the trial's. In SQLite a transaction has the one write lock from its
start. So what is read within stays true until the commit, and of a worker that dies within nothing is left.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb import models as _models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from moeopt.errors import StorageError
from moeopt.study.storage.spool import Result
from moeopt.study.storage.transaction import DIALECTS
from moeopt.trials import genome
from moeopt.trials.process import this_worker

IDENTITY = "moeopt:identity"
"""System attribute of a study: a random name, by which results on a disk know it."""
SUCCESSOR = "moeopt:successor"
"""System attribute of a trial that was taken over: the number of the one trial that repeats it."""
CLAIM = "claim"
"""In a trial's origin until its proposal is stored: names the call that created or started it."""
DEATHS = "deaths"
"""In a retried trial's origin: how many workers died with it."""
models: Any = _models  # SQLAlchemy's columns have no types there
SystemAttr, UserAttr = models.TrialSystemAttributeModel, models.TrialUserAttributeModel
KINDS = {
    "attrs": SystemAttr,
    "user_attrs": UserAttr,
    "params": models.TrialParamModel,
    "steps": models.TrialIntermediateValueModel,
}
"""What is written to a running trial."""


def study_names(storage: Any) -> list[str]:
    """Names of all studies, the oldest first; nothing else of them is read, as it may be damaged."""
    with Session(storage.engine) as session:
        found = session.query(models.StudyModel.study_name).order_by(models.StudyModel.study_id)
        return [name for (name,) in found]


class NoSlotLeft(Exception):
    """Every slot that the study shall have was started."""


class SetBack(StorageError):
    """The database was restored to an earlier state: trials that this process knows are not there, or others are."""

    def __init__(self) -> None:
        super().__init__("the database was set back to an earlier state while the study was searched; load it anew")


class StudyIsGone(StorageError):
    """The study was deleted, and its key may be another one's now."""

    def __init__(self) -> None:
        super().__init__("the study was deleted while it was searched")


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


def set_attributes(session: Session, model: Any, trial_id: int, values: Mapping[str, Any]) -> None:
    """Insert or replace attributes of a trial."""
    there = {row.key: row for row in session.query(model).filter_by(trial_id=trial_id)} if values else {}
    for key, value in values.items():
        if key in there:
            there[key].value_json = json.dumps(value)
        else:
            session.add(model(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def check_there(session: Session, study_id: int, identity: str) -> None:
    """Raise StudyIsGone unless the key is this study's; SQLite gives that of one that was deleted to the next.

    What must see what others committed has its lock before: a transaction of MySQL sees what was at its first read.
    """
    kind = models.StudySystemAttributeModel
    found = session.query(kind.value_json).filter_by(study_id=study_id, key=IDENTITY).scalar()
    if found is None or json.loads(found) != identity:
        raise StudyIsGone


def still_there(storage: Any, results: Mapping[int, Result]) -> set[int]:
    """Which of these trials are in the database, rather than none or others by their keys."""
    trials = models.TrialModel
    with Session(storage.engine) as session:
        stored = session.query(trials.trial_id, trials._datetime_start_utc).filter(trials.trial_id.in_(results))
        return {trial_id for trial_id, started in stored if results[trial_id].is_of(started)}


def made(storage: Any) -> Any:
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
    kind = models.StudySystemAttributeModel
    with transaction(storage, study_id) as session:
        row = session.query(kind).filter_by(study_id=study_id, key=IDENTITY).one_or_none()
        if row is None:
            row = kind(study_id=study_id, key=IDENTITY, value_json=json.dumps(uuid.uuid4().hex))
            session.add(row)
        return str(json.loads(row.value_json))


def started(session: Session, study_id: int) -> int:
    """Slots that were started: trials that do not repeat another, and do not wait.

    A running trial without a heartbeat is not counted: should its worker be dead, nobody would know.
    """
    trials, beats = models.TrialModel, models.TrialHeartbeatModel
    retry = (SystemAttr.trial_id == trials.trial_id) & (SystemAttr.key == genome.RETRIES)
    return int(
        session.query(func.count(trials.trial_id))
        .outerjoin(SystemAttr, retry)
        .outerjoin(beats, beats.trial_id == trials.trial_id)
        .filter(trials.study_id == study_id, trials.state != TrialState.WAITING, SystemAttr.trial_id.is_(None))
        .filter((trials.state != TrialState.RUNNING) | beats.trial_id.is_not(None))
        .scalar()
    )


def room(session: Session, study_id: int, slots: int | None) -> bool:
    """Whether fewer than `slots` were started; None: any number may be."""
    if slots is None:
        return True
    total = session.query(func.count(models.TrialModel.trial_id)).filter_by(study_id=study_id).scalar()
    return total < slots or started(session, study_id) < slots


def claimable(storage: Any, study_id: int, slots: int | None) -> bool:
    """Whether a trial may be started: a new slot, or a waiting trial that repeats another."""
    with transaction(storage) as session:
        if room(session, study_id, slots):
            return True
        waiting = session.query(models.TrialModel.trial_id).join(SystemAttr)
        waiting = waiting.filter(models.TrialModel.study_id == study_id, models.TrialModel.state == TrialState.WAITING)
        return waiting.filter(SystemAttr.key == genome.RETRIES).first() is not None


def study_of(storage: Any, trial_id: int) -> int:
    """The study of a trial."""
    with Session(storage.engine) as session:
        return int(models.TrialModel.find_or_raise_by_id(trial_id, session).study_id)


def frozen(storage: Any, trial: Any) -> FrozenTrial:
    """A trial as the database has it."""
    return RDBStorage._build_frozen_trial_from_trial_model(storage, trial)


def claimed(session: Session, study_id: int, claim: str) -> int | None:
    """The trial that a call created or started whose answer was lost."""
    mine = SystemAttr.value_json.contains(f'"{CLAIM}": "{claim}"', autoescape=True)
    trials = models.TrialModel
    found = session.query(trials.trial_id).join(SystemAttr).filter(trials.study_id == study_id, mine)
    trial_id: int | None = found.filter(SystemAttr.key == genome.ORIGIN).scalar()
    return trial_id


def create(
    storage: Any, study: tuple[int, str], template: FrozenTrial | None, claim: str, slots: int | None, *, again: bool
) -> FrozenTrial:
    """A new trial, running, or as the template says.

    Args:
        study: its key and identity.
        claim: names this call, so that a repetition (`again`) finds what the first try made.
        slots: of `room`, for a trial without template.
    """
    study_id, _ = study
    with transaction(storage, *study) as session:
        trial_id = claimed(session, study_id, claim) if again else None
        if trial_id is not None:
            return frozen(storage, models.TrialModel.find_or_raise_by_id(trial_id, session))
        if template is None and not room(session, study_id, slots):
            raise NoSlotLeft
        made = create_trial(state=TrialState.RUNNING) if template is None else copy.deepcopy(template)
        note = {**genome.origin(made), CLAIM: claim}
        if made.state == TrialState.RUNNING:
            made.datetime_start = made.datetime_start or datetime.now()
            note["worker"] = this_worker()
        made.system_attrs = {**made.system_attrs, genome.ORIGIN: note}
        trial = storage._get_prepared_new_trial(study_id, made, session)
        if made.state == TrialState.RUNNING:
            session.add(models.TrialHeartbeatModel(trial_id=trial.trial_id))
        made.number, made._trial_id = trial.number, trial.trial_id
        return made


def create_once(storage: Any, study: tuple[int, str], template: FrozenTrial, user_attrs: Mapping[str, Any]) -> bool:
    """A new trial as the template says, unless the study has one with these user attributes; whether it was made."""
    study_id, _ = study
    with transaction(storage, *study) as session:
        trials = session.query(models.TrialModel.trial_id).filter_by(study_id=study_id)
        for key, value in user_attrs.items():
            trials = trials.filter(
                session.query(UserAttr)
                .filter_by(trial_id=models.TrialModel.trial_id, key=key, value_json=json.dumps(value))
                .exists()
            )
        if trials.first() is not None:
            return False
        storage._get_prepared_new_trial(study_id, copy.deepcopy(template), session)
        return True


def start(storage: Any, study: tuple[int, str], trial_id: int, claim: str, slots: int | None) -> FrozenTrial | None:
    """Make a waiting trial this worker's; None where it cannot: another has it, or every slot was started."""
    study_id, _ = study
    with transaction(storage, *study) as session:
        trial = locked(session, models.TrialModel, trial_id)
        storage.check_trial_is_updatable(trial_id, trial.state)
        attrs = attributes(session, SystemAttr, trial_id)
        origin = attrs.get(genome.ORIGIN) or {}
        if trial.state != TrialState.WAITING:
            return frozen(storage, trial) if origin.get(CLAIM) == claim else None
        if not attrs.get(genome.RETRIES) and not room(session, study_id, slots):
            return None
        trial.state, trial.datetime_start = TrialState.RUNNING, datetime.now()
        note = {**origin, "worker": this_worker(), CLAIM: claim}
        set_attributes(session, SystemAttr, trial_id, {genome.ORIGIN: note})
        session.add(models.TrialHeartbeatModel(trial_id=trial_id))
        session.flush()
        return frozen(storage, trial)


def beat(storage: Any, trial_ids: list[int]) -> None:
    """Note that these trials' worker lives."""
    beats = models.TrialHeartbeatModel
    with transaction(storage) as session:
        session.query(beats).filter(beats.trial_id.in_(trial_ids)).update(
            {beats.heartbeat: func.current_timestamp()}, synchronize_session=False
        )


def end(
    storage: Any,
    study_id: int,
    trial_id: int,
    result: Result,
    state: TrialState,
    values: list[float] | None,
    written: Mapping[str, Collection[Any]],
) -> bool:
    """End a trial with what is known of it; whether it was still running, or ended so before.

    Args:
        written: names, by kind (of KINDS), of what its worker wrote to it before.

    Raises:
        SetBack: when that is not all there.
    """
    with transaction(storage) as session:
        trial = session.get(models.TrialModel, trial_id, with_for_update=True)
        check_there(session, study_id, result.study)
        if trial is None or not result.is_of(trial._datetime_start_utc):
            raise SetBack
        if trial.state.is_finished():
            ended = frozen(storage, trial)
            attrs = attributes(session, SystemAttr, trial_id)
            return ended.state == state and (ended.values or None) == (values or None) and SUCCESSOR not in attrs
        if not _holds(session, trial_id, result.plan, written):
            raise SetBack
        _end(storage, session, trial, result, state, values)
        return True


def _holds(session: Session, trial_id: int, plan: str | None, written: Mapping[str, Collection[Any]]) -> bool:
    """Whether a trial has its plan, and as many attributes and numbers as were written."""
    counts = [
        select(func.count()).select_from(model).where(model.trial_id == trial_id).scalar_subquery()
        for model in KINDS.values()
    ]
    origin = select(SystemAttr.value_json).where(SystemAttr.trial_id == trial_id, SystemAttr.key == genome.ORIGIN)
    *there, noted = session.execute(select(*counts, origin.scalar_subquery())).one()
    known = plan is None or (noted is not None and json.loads(noted).get("plan") == plan)
    return known and all(count >= len(written.get(kind, ())) for kind, count in zip(KINDS, there))


def _end(
    storage: Any, session: Session, trial: Any, result: Result, state: TrialState, values: list[float] | None
) -> None:
    set_attributes(session, SystemAttr, trial.trial_id, result.attrs)
    set_attributes(session, UserAttr, trial.trial_id, result.user_attrs)
    session.flush()
    if trial.state == TrialState.WAITING:
        trial.state, trial.datetime_start = TrialState.RUNNING, datetime.now()
    for objective, value in enumerate(values or []):
        storage._set_trial_value_without_commit(session, trial, objective, value)
    trial.state, trial.datetime_complete = state, datetime.now()


def heartbeats(storage: Any, study_id: int) -> dict[int, datetime]:
    """The last heartbeat of every running trial that has one; not to be compared with any clock."""
    trials, beats = models.TrialModel, models.TrialHeartbeatModel
    with Session(storage.engine) as session:
        running = session.query(trials.trial_id, beats.heartbeat).join(beats)
        return dict(map(tuple, running.filter(trials.study_id == study_id, trials.state == TrialState.RUNNING)))


def take_over(
    storage: Any, study_id: int, trial_id: int, failure: str, *, retries: int, heard: datetime | None = None
) -> int | None:
    """Fail a running trial whose worker died, and queue the one that repeats it, under a new number, which is returned.

    None where that was done before, where the trial is none to take over (any more), or where so many workers died
    with it already. A trial that Ctrl-C ended is queued again however often.

    Args:
        failure: the reason, kept as the trial's user attribute.
        retries: how many workers may die with a trial before it is failed for good.
        heard: only where its last heartbeat is this one.
    """
    with transaction(storage, study_id) as session:
        trial = locked(session, models.TrialModel, trial_id)
        dead = frozen(storage, trial)
        if SUCCESSOR in dead.system_attrs:
            return None
        origin = genome.origin(dead)
        deaths = int(origin[DEATHS]) if isinstance(origin.get(DEATHS), int) else 0
        if dead.state == TrialState.RUNNING:
            last = session.query(models.TrialHeartbeatModel.heartbeat).filter_by(trial_id=trial_id).scalar()
            if heard is not None and last != heard:
                return None
            deaths += 1
            if deaths > retries:
                failure += f"; not tried again, as {deaths} workers died with it"
            set_attributes(session, UserAttr, trial_id, {genome.FAILURE: failure})
            trial.state, trial.datetime_complete = TrialState.FAIL, datetime.now()
            session.flush()
            if deaths > retries:
                return None
        elif dead.state != TrialState.FAIL or not dead.user_attrs.get(genome.INTERRUPTED):
            return None
        retry = genome.retry(dead)
        retry.system_attrs[genome.ORIGIN] |= {DEATHS: deaths} if deaths else {}
        new = storage._get_prepared_new_trial(study_id, retry, session)
        set_attributes(session, SystemAttr, trial_id, {SUCCESSOR: new.number})
        return int(new.number)


def deliver(storage: Any, study_id: int, result: Result) -> int | None:
    """Store what was kept of a trial: in it, or in the last of those that repeat it, if that has not ended.

    Returns the number of the trial that took it; None where it has ended, or has another plan.
    """
    looked: list[int] = []
    while (ids := repeating(storage, study_id, result.number)) != looked:
        with transaction(storage, study_id) as session:
            trial = locked(session, models.TrialModel, ids[-1])
            check_there(session, study_id, result.study)
            if not trial.state.is_finished():
                return _delivered(storage, session, result, session.get(models.TrialModel, ids[0]), trial)
        looked = ids
    return None


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


def _delivered(storage: Any, session: Session, result: Result, first: Any, trial: Any) -> int | None:
    """Store a result in a running or waiting trial, which is locked; `first` is the one that it was kept of."""
    known = attributes(session, SystemAttr, trial.trial_id)
    plan = (known.get(genome.ORIGIN) or {}).get("plan")
    if (result.plan != plan) if result.plan is not None else not result.is_of(first._datetime_start_utc):
        return None
    if trial is not first:
        if result.state == "FAIL":  # the trial that repeats it shall tell
            return None
        result = _with_facts(storage, first, result)
        _copy(session, models.TrialParamModel, "param_name", first.trial_id, trial.trial_id)
        _copy(session, models.TrialIntermediateValueModel, "step", first.trial_id, trial.trial_id)
    session.flush()
    if result.state is None:
        set_attributes(session, SystemAttr, trial.trial_id, result.attrs)
        set_attributes(session, UserAttr, trial.trial_id, result.user_attrs)
    else:
        values = result.values
        if result.state == "PRUNED":
            last = frozen(storage, trial)
            values = None if last.last_step is None else [last.intermediate_values[last.last_step]]
        _end(storage, session, trial, result, TrialState[result.state], values)
    return int(trial.number)


def _with_facts(storage: Any, first: Any, result: Result) -> Result:
    """The result for a trial that repeats the first: with what that one had stored, but for what is its own."""
    had = frozen(storage, first)
    own = {genome.ORIGIN, genome.RETRIES, SUCCESSOR, "failed_trial"}
    attrs = {key: value for key, value in {**had.system_attrs, **result.attrs}.items() if key not in own}
    user = {**had.user_attrs, **result.user_attrs}
    user.pop(genome.INTERRUPTED, None)
    if genome.FAILURE not in result.user_attrs:
        user.pop(genome.FAILURE, None)
    return Result(result.study, result.number, result.worker, result.plan, result.state, result.values, attrs, user)


def _copy(session: Session, model: Any, name: str, source: int, target: int) -> None:
    """Copy parameters or intermediate values that the target trial lacks."""
    there = {getattr(row, name) for row in session.query(model).filter_by(trial_id=target)}
    columns = [column.key for column in model.__table__.columns if not column.primary_key and column.key != "trial_id"]
    for row in session.query(model).filter_by(trial_id=source).all():
        if getattr(row, name) not in there:
            session.add(model(trial_id=target, **{column: getattr(row, column) for column in columns}))
