"""What can be judged before anything is evaluated: arguments, study, task."""

from __future__ import annotations

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
    from moeopt.study import check_study
    from moeopt.trials.front import broken, completed

    check_study(study, task, model, UNSEEN)
    missing = [split for split in UNSEEN if split not in task.splits]
    if missing:
        raise TaskError(
            f"task {task.name!r} has no {' and no '.join(missing)} split (it has {', '.join(task.splits)}); a "
            "selection chooses on dev and reports on test"
        )
    if not completed(study):
        told = broken(study)
        within = f" that keeps its constraints{told}" if told else ""
        raise StudyError(f"study {study.study_name!r} has no completed trial with a finite loss yet{within}")


def check_goal(study: optuna.Study, fit: int | None, loss_within: float | None) -> None:
    """Raise StudyError unless it is said what to choose by from a study of several objectives."""
    from moeopt.trials.front import objectives_of

    names = objectives_of(study)
    if len(names) > 1 and fit is None and loss_within is None:
        raise StudyError(
            f"study {study.study_name!r} has the objectives {', '.join(names)}: say how small a plan must be (fit, "
            "--fit 24GB), or how much of the loss it may cost (loss_within, --loss-within 0.01)"
        )


def check_arguments(*, top: int, score: str | None, loss_within: float | None = None, **limits: int | None) -> None:
    """Raise StudyError unless `select` can take these."""
    is_number = isinstance(loss_within, (int, float)) and not isinstance(loss_within, bool)
    if loss_within is not None and not (is_number and 0 <= loss_within < float("inf")):
        raise StudyError(f"loss_within must be a loss of at least 0, got {loss_within!r}")
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
