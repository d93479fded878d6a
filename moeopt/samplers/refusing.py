"""Trials that were started and are not run: those of a study that would not go on as it was made."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import StudyError
from moeopt.study.storage import attributes
from moeopt.trials import genome


class UnknownSampler(BaseSampler):
    """Stands in a study whose own sampler cannot be rebuilt: the study can be read, and none of its trials starts.

    Args:
        why: what is said to whoever starts one.
    """

    def __init__(self, why: str) -> None:
        self.why = why

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        end_refused(attributes.whole_study(study), trial, self.why, again=True)
        raise StudyError(self.why)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise StudyError(self.why)

    infer_relative_search_space = sample_relative = sample_independent = _refuse


def end_refused(study: Study, trial: FrozenTrial, reason: str, *, again: bool) -> None:
    """Fail a trial that was started and is not to be run so, with the reason; with `again` it is queued by a resume.

    In a thread of `study.optimize(n_jobs=...)` it is also warned of: Optuna loses the errors of the last ones.
    """
    if threading.current_thread() is not threading.main_thread():
        warnings.warn(reason, stacklevel=3)
    attributes.write(study, trial, {}, {genome.FAILURE: reason, **({genome.INTERRUPTED: True} if again else {})})
    study.tell(trial.number, state=TrialState.FAIL)
