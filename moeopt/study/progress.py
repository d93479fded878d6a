"""How far a study is."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial

from moeopt.trials import genome


def finished(study: optuna.Study) -> int:
    """Trials that ended, each counted once however often it was retried."""
    trials = study.get_trials(deepcopy=False)
    return sum(t.state.is_finished() for t in trials) - sum(bool(t.system_attrs.get(genome.RETRIES)) for t in trials)


def stalled(study: optuna.Study) -> int:
    """Finished trials since the best one."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    best = best_trial(study)
    return len(done) if best is None else sum(t.number > best.number for t in done)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The completed trial of least loss, the first of equals."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.value is not None]
    return min(done, key=lambda t: (t.value, t.number), default=None)
