"""What can be judged before anything is evaluated: arguments, study, task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from moeopt.defaults import Score
from moeopt.errors import StudyError, TaskError

if TYPE_CHECKING:
    import optuna
    from torch import nn

    from moeopt.tasks import Task

TOP, MOST = 20, 1000
"""Candidates unless said otherwise, and most of them: the study keeps their losses in one attribute of 60,000 bytes."""
UNSEEN = ("dev", "test")


def check(study: optuna.Study, task: Task, model: nn.Module | None = None) -> None:
    """Raise StudyError or TaskError unless something can be selected from the study by this task; see `select`."""
    from optuna.trial import TrialState

    from moeopt.study import check_study

    check_study(study, task, model, UNSEEN)
    missing = [split for split in UNSEEN if split not in task.splits]
    if missing:
        raise TaskError(
            f"task {task.name!r} has no {' and no '.join(missing)} split (it has {', '.join(task.splits)}); a "
            "selection chooses on dev and reports on test"
        )
    if not any(t.value is not None and math.isfinite(t.value) for t in study.get_trials(False, (TrialState.COMPLETE,))):
        raise StudyError(f"study {study.study_name!r} has no completed trial with a finite loss yet")


def check_arguments(*, top: int, score: str | None, **limits: int | None) -> None:
    """Raise StudyError unless `select` can take these."""
    for name, value in {"top": top, **limits}.items():
        if (value is not None or name == "top") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise StudyError(f"{name} must be an integer of at least 1, got {value!r}")
    if top > MOST:
        raise StudyError(f"top must be at most {MOST}, got {top}")
    if score is not None and score not in get_args(Score):
        raise StudyError(
            f"score must be one of {', '.join(get_args(Score))}, or None for the study's own, got {score!r}"
        )
