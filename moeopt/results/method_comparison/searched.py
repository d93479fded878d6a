"""What a study gave, to compare: what was selected, its best trial, and where it merged also its best pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeopt.errors import StudyError
from moeopt.plan import Plan
from moeopt.showing import line

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Searched:
    """A trial's plan, its name, and what all trials of its study cost, and the methods that it started from."""

    name: str
    plan: Plan
    layer_tokens: int


def searched(study: optuna.Study) -> list[Searched]:
    """What was selected from a study, if anything, its best completed trial, and its best pruning, if these are others.

    Raises:
        StudyError: when the study has several objectives, no completed trial that keeps its constraints, or moeopt did
            not make it.
    """
    from moeopt.results.selection import recorded, selected_trial
    from moeopt.study import CALIBRATION, METHOD, best_trial, space_of
    from moeopt.trials.description import number
    from moeopt.trials.front import completed, points

    space = space_of(study)
    trials = study.get_trials(deepcopy=False)
    best = best_trial(study)
    if best is None:
        raise StudyError(f"study {study.study_name!r} has no completed trial that keeps its constraints yet")
    chosen = {"search": best}
    if "merge" in space.phases:
        done = completed(study)
        ranked = (done[i] for i in points(done, study.directions)[:, 0].argsort(kind="stable"))
        pruned = next((t for t in ranked if space.plan(t).with_skip(0).is_one_hot), None)
        if pruned is not None and pruned.number != best.number:
            chosen["search, pruning only"] = pruned
    if recorded(study) is not None:
        selected = selected_trial(study)
        if selected.number not in {trial.number for trial in chosen.values()}:
            chosen = {"search, selected on dev": selected, **chosen}
    # by method, as retries repeat what it cost
    started = {str(t.user_attrs.get(METHOD)): int(number(t.user_attrs, CALIBRATION) or 0) for t in trials}
    cost = sum(int(number(t.user_attrs, "layer_tokens") or 0) for t in trials) + sum(started.values())

    def named(name: str, trial: FrozenTrial) -> str:
        return f"{name} (from {line(trial.user_attrs[METHOD], 40)})" if METHOD in trial.user_attrs else name

    return [Searched(named(name, trial), space.plan(trial), cost) for name, trial in chosen.items()]
