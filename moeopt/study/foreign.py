"""Trials of a study that its own sampler did not make."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from moeopt.samplers import operators
from moeopt.trials import genome
from moeopt.trials.description import described


def foreign_trials(study: optuna.Study) -> list[int]:
    """Numbers of the trials with a loss that another sampler than the study's made, or that were added by hand.

    A trial says in its origin what made it; one of Optuna's own samplers says nothing. What was enqueued is the
    study's own. Studies whose trials say nothing at all of where they come from cannot be judged, and have none.

    Raises:
        StudyError: when moeopt did not make the study, or its description is of another form.
    """
    made = operators(described(study)["sampler"])
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    if not any(trial.params or genome.ORIGIN in trial.system_attrs for trial in trials):
        return []
    by = {trial.number: genome.origin(trial).get("operator") for trial in trials}
    return [number for number, operator in by.items() if operator is None or (made and operator not in made)]
