"""Trials of workers that died, queued again."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from moeopt.study.storage import attributes
from moeopt.trials import genome, process


def reclaim(study: optuna.Study, *, other_hosts: bool = False) -> list[int]:
    """Queue again the trials whose worker died, or was interrupted; returns their numbers.

    The dead trial is marked failed, and a waiting copy keeps its genotype and its slot; in a storage of `open_storage`
    both in one transaction, and not more often than its `retries`. What dead workers of this host had evaluated and
    could not store is stored first.

    Args:
        study: of moeopt, or a plain one with a sampler of moeopt.
        other_hosts: also take running trials of other hosts for dead, where it cannot be seen. Say so only when no
            worker runs there (a container that was started anew has another host name).
    """
    team = attributes.team(study)
    if team is not None:
        team.storage.recover(team.study_id, other_hosts)
    trials = study.get_trials(deepcopy=False)
    before = len(trials)
    retried = {number for trial in trials for number in trial.system_attrs.get(genome.RETRIES, [])}
    reclaimed = []
    for trial in trials:
        if trial.number in retried:
            continue
        running = trial.state == TrialState.RUNNING
        dead = running and process.is_dead(genome.origin(trial).get("worker"), other_hosts)
        if not dead and not (trial.state == TrialState.FAIL and trial.user_attrs.get(genome.INTERRUPTED)):
            continue
        if team is not None:
            if team.storage.take_over(team.study_id, attributes.key(trial), "its worker died") is not None:
                reclaimed.append(trial.number)
            continue
        if dead:
            attributes.mark_interrupted(study, trial)
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # it ended, or another worker reclaimed it, in the meantime
                continue
        study.add_trial(genome.retry(trial))
        reclaimed.append(trial.number)
    if team is not None:
        team.storage.take_over_stale(team.study_id)
        now = study.get_trials(deepcopy=False)[before:]
        stale = {t.system_attrs[genome.RETRIES][-1] for t in now if t.system_attrs.get(genome.RETRIES)}
        reclaimed += sorted(stale - set(reclaimed))
    return reclaimed
