"""What a study optimises: its objectives by name, their directions, and the trials that no other beats in all of them.

An objective is ``"loss"`` (what a study without others minimises), ``"metric"``, ``"worst"`` (of a mixture, its worst
member's loss over the full model's), ``"bytes"``, ``"active"`` or ``"latency"``; of one member of a mixture,
``"loss:NAME"`` and ``"metric:NAME"``. Metrics are maximised, all else is minimised. A study keeps the names, in the
order of its trials' values, in its description; one that names none has the loss alone.

A constraint is Optuna's: a number by name (`FrozenTrial.constraints`), at most 0 where it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import StudyError, nearest
from moeopt.showing import shown
from moeopt.trials.description import DESCRIPTION, described

if TYPE_CHECKING:
    import optuna

LOSS = "loss"
OF_TASK = (LOSS, "metric", "worst")
"""Objectives that are of scores; the others are of a plan."""
NAMES = (*OF_TASK, "bytes", "active", "latency")
OF_MEMBERS = (LOSS, "metric")
"""Objectives that a mixture has of each of its members, as ``"loss:NAME"``."""

Direction = Literal["minimize", "maximize"]


def check_names(objectives: Any) -> tuple[str, ...]:
    """The names of objectives; StudyError, naming the one that is none or comes twice, unless they are such."""
    if isinstance(objectives, str):
        objectives = (objectives,)
    if not isinstance(objectives, (tuple, list)) or not objectives:
        raise StudyError(f"objectives must be names such as ('loss', 'bytes'), got {objectives!r:.120}")
    for name in objectives:
        kind, colon, member = name.partition(":") if isinstance(name, str) else (name, "", "")
        if kind not in NAMES or (colon and (kind not in OF_MEMBERS or not member)):
            raise StudyError(
                f"an objective is one of {', '.join(NAMES)}, or of a mixture's member as loss:NAME, got "
                f"{name!r:.80}{nearest(str(name), [*NAMES])}"
            )
        if objectives.count(name) > 1:
            raise StudyError(f"objective {name!r} is named twice")
    return tuple(objectives)


def direction(name: str) -> Direction:
    """Whether an objective is minimised or maximised."""
    return "maximize" if name.partition(":")[0] == "metric" else "minimize"


def objectives_of(study: optuna.Study) -> tuple[str, ...]:
    """The names of a study's objectives, in the order of its trials' values.

    Raises:
        StudyError: when the description names others than the study has directions, or what is none.
    """
    if DESCRIPTION not in study.user_attrs:
        names: tuple[str, ...] = (LOSS,)
    else:
        names = check_names((described(study).get("evaluation") or {}).get("objectives", [LOSS]))
    directions = [each.name.lower() for each in study.directions]
    if directions != [direction(name) for name in names]:
        raise StudyError(
            f"study {shown(study.study_name)}: its objectives are {', '.join(map(shown, names))}, and its directions "
            f"{', '.join(directions)}; moeopt's objectives are minimised, metrics maximised"
        )
    return names


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps all of its constraints; one without constraints does."""
    return all(value <= 0 for value in trial.constraints.values())


def points(trials: Sequence[FrozenTrial], names: Sequence[str]) -> NDArray[np.float64]:
    """The values of complete trials, signed so that less is better in all: (trials, objectives)."""
    signs = np.array([-1.0 if direction(name) == "maximize" else 1.0 for name in names])
    values = [[np.nan if value is None else value for value in trial.values] for trial in trials]
    signed: NDArray[np.float64] = np.array(values, dtype=np.float64).reshape(len(trials), len(signs)) * signs
    return signed


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Complete trials that keep their constraints and whose values are finite, by number."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [t for t in done if t.values is not None and np.isfinite(t.values).all() and is_feasible(t)]


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of `completed` that no other is at least as good as in all objectives and better in one.

    Of trials with equal values the first; by their first objective, the best first.
    """
    names, trials = objectives_of(study), completed(study)
    at = points(trials, names)
    return [trials[i] for i in nondominated(at)]


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
