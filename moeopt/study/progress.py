"""How far a study is."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial

from moeopt.errors import StudyError
from moeopt.trials import genome
from moeopt.trials.front import front


def finished(study: optuna.Study) -> int:
    """Trials that ended, each counted once however often it was retried."""
    trials = study.get_trials(deepcopy=False)
    return sum(t.state.is_finished() for t in trials) - sum(bool(t.system_attrs.get(genome.RETRIES)) for t in trials)


def stalled(study: optuna.Study) -> int:
    """Finished trials since the best one; of several objectives, since the front last changed."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    last = max((t.number for t in best_trials(study)), default=-1)
    return sum(t.number > last for t in done)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The completed trial that is best in the study's one objective, the first of equals, and keeps its constraints.

    Raises:
        StudyError: when the study has several objectives, of which no trial is the best.
    """
    count = len(study.directions)
    if count > 1:
        raise StudyError(
            f"study {study.study_name!r} has {count} objectives and no best trial: choose one of its front (moeopt "
            "front, study.best_trials) by number"
        )
    return next(iter(front(study)), None)


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial, or, of several objectives, all trials of the front; none as long as there is none."""
    return front(study)
