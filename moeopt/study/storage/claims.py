"""Claims: which worker runs which trial, and how many there may be."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import func
from sqlalchemy.orm import Session

from moeopt.study.storage.failures import NoSlotLeft
from moeopt.study.storage.rows import (
    SystemAttr,
    UserAttr,
    attributes,
    frozen,
    locked,
    models,
    set_attributes,
    transaction,
)  # fmt: skip
from moeopt.trials import genome
from moeopt.trials.process import this_worker

CLAIM = "claim"
"""In a trial's origin until its proposal is stored: names the call that created or started it."""


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


def claimed(session: Session, study_id: int, claim: str) -> int | None:
    """The trial that a call created or started whose answer was lost."""
    mine = SystemAttr.value_json.contains(f'"{CLAIM}": "{claim}"', autoescape=True)
    trials = models.TrialModel
    claims = session.query(trials.trial_id).join(SystemAttr).filter(trials.study_id == study_id, mine)
    trial_id: int | None = claims.filter(SystemAttr.key == genome.ORIGIN).scalar()
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
