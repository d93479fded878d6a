"""Ends: a trial's result stored by its worker, by the next one, or in the trial that repeats it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from optuna.trial import TrialState
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from moeopt.study.storage.failures import SetBack
from moeopt.study.storage.rows import (
    SUCCESSOR,
    SystemAttr,
    UserAttr,
    attributes,
    check_there,
    frozen,
    locked,
    models,
    repeating,
    set_attributes,
    transaction,
)  # fmt: skip
from moeopt.study.storage.spool import Result
from moeopt.trials import genome

DEATHS = "deaths"
"""In a retried trial's origin: how many workers died with it."""
KINDS = {
    "attrs": SystemAttr,
    "user_attrs": UserAttr,
    "params": models.TrialParamModel,
    "steps": models.TrialIntermediateValueModel,
}
"""What is written to a running trial."""


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
    same_plan = plan is None or (noted is not None and json.loads(noted).get("plan") == plan)
    return same_plan and all(count >= len(written.get(kind, ())) for kind, count in zip(KINDS, there))


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


def _delivered(storage: Any, session: Session, result: Result, first: Any, trial: Any) -> int | None:
    """Store a result in a running or waiting trial, which is locked; `first` is the one that it was kept of."""
    attrs = attributes(session, SystemAttr, trial.trial_id)
    plan = (attrs.get(genome.ORIGIN) or {}).get("plan")
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
    not_copied = {genome.ORIGIN, genome.RETRIES, SUCCESSOR, "failed_trial"}
    attrs = {key: value for key, value in {**had.system_attrs, **result.attrs}.items() if key not in not_copied}
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
