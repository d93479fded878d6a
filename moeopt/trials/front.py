"""What a study optimises, and the trials of it that no other beats in all of its objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from moeopt.showing import line
from moeopt.trials.description import described, objective_names

if TYPE_CHECKING:
    import optuna


def objectives_of(study: optuna.Study) -> tuple[str, ...]:
    """The names of the objectives of a study of moeopt, in the order of its trials' values.

    Raises:
        StudyError: as `moeopt.trials.description.described`, or when they are no objectives.
    """
    return objective_names(described(study))


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps all of its constraints; one without constraints does."""
    return all(value <= 0 for value in trial.constraints.values())


def points(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> NDArray[np.float64]:
    """The values of complete trials, signed so that less is better in all: (trials, objectives)."""
    signs = np.array([-1.0 if each == StudyDirection.MAXIMIZE else 1.0 for each in directions])
    values = np.array([trial.values for trial in trials], dtype=np.float64).reshape(len(trials), len(signs))
    signed: NDArray[np.float64] = values * signs
    return signed


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Complete trials that keep their constraints and whose values are finite, by number."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [t for t in done if t.values is not None and np.isfinite(t.values).all() and is_feasible(t)]


def broken(study: optuna.Study) -> str:
    """Which constraints a study's complete trials break, how many each and by how little, as the end of a message."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    over: dict[str, list[float]] = {}
    for trial in done:
        for name, value in trial.constraints.items():
            if value > 0:
                over.setdefault(name, []).append(value)
    told = [f"{len(by)} of {len(done)} break {line(name, 60)!r}, by {min(by):.3g} or more" for name, by in over.items()]
    return ": " + ", ".join(told[:8]) if told else ""


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of `completed` that no other is at least as good as in all objectives and better in one.

    Of trials with equal values the first; by their first objective, the best first.
    """
    trials = completed(study)
    return [trials[i] for i in nondominated(points(trials, study.directions))]


def nondominated(at: NDArray[np.float64]) -> list[int]:
    """Rows of `at`, (n, m), less being better, that no other dominates, of equal ones the first; by their columns.

    Two columns take a sort; more take a sort and a comparison with the front for every row.
    """
    order = np.lexsort((np.arange(len(at)), *at.T[::-1]))  # a row comes after all that dominate it
    chosen: list[int] = []
    front = np.empty((0, at.shape[1]))
    least = np.inf
    for i in order:
        if at.shape[1] <= 2:
            last = float(at[i, -1])
            if last >= least or (at.shape[1] == 1 and chosen):
                continue
            least = last
        elif (front <= at[i]).all(axis=1).any():
            continue
        else:
            front = np.vstack([front, at[i]])
        chosen.append(int(i))
    return chosen
