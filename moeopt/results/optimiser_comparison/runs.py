"""A study as arrays: what it had spent, and the losses it had found, at the end of every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from moeopt.errors import StudyError
from moeopt.showing import line, shown
from moeopt.statistics import Floats, best_so_far
from moeopt.study import CALIBRATION, METHOD, WARM_START, foreign_trials
from moeopt.trials import genome
from moeopt.trials.description import ENQUEUED, FINITE, check, check_whole
from moeopt.trials.front import completed, objectives_of
from moeopt.trials.front import points as points_of
from moeopt.trials.genome import RETRIES
from moeopt.trials.objectives import LOSS
from moeopt.trials.selected import SELECTION, WINNER, check_record, recorded

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Cost = Literal["layer-tokens", "time", "trials"]
COSTS: tuple[Cost, ...] = get_args(Cost)
COMPARABLE = ("model", "task", "space", "evaluation")
"""Parts of a study's description in which all that are compared agree."""


@dataclass(frozen=True)
class HeldOut:
    """What the study's latest selection (`moeopt select`) found on test.

    Attributes:
        loss: of the winner.
        scored_on: names model, examples and score: losses are comparable where it is the same.
        examples: how many.
    """

    loss: float
    scored_on: str
    examples: int


@dataclass(frozen=True)
class Run:
    """One study: one optimiser, one seed.

    Attributes:
        study: its name.
        seed: of its sampler, and of a sampler inside it.
        settings: what makes the optimiser: the sampler without seed, the pruner, and warm starts.
        description: model, task, space and evaluation.
        costs: (trials,) for each `Cost` that the study knows: what was spent when a trial ended, in that order.
        points: (trials, objectives), the values of completed trials that keep their constraints, signed so that less
            is better; NaN for the others.
        curve: (trials,), the least loss of such a trial by then, NaN before there is one. Of several objectives it is
            NaN until `compare` makes it, as hypervolumes need bounds that all runs share.
        objectives: their names.
        counts: trials completed, pruned and failed; an attempt that was made again counts once.
        charged: failed trials that did not note their layer-tokens and are charged the dearest trial's.
        held_out: None where nothing was selected.
        foreign: numbers of trials that another sampler made (`moeopt.study.foreign_trials`).
    """

    study: str
    seed: str
    settings: Mapping[str, Any]
    description: Mapping[str, Any]
    costs: Mapping[Cost, Floats]
    points: Floats
    curve: Floats
    counts: Mapping[str, int]
    charged: int
    held_out: HeldOut | None
    foreign: tuple[int, ...] = ()
    objectives: tuple[str, ...] = (LOSS,)

    def spent(self, cost: Cost) -> float:
        """Everything, at the end."""
        return float(self.costs[cost][-1]) if len(self.curve) else 0.0


def read(study: optuna.Study) -> Run:
    """The arrays of a study.

    Raises:
        StudyError: as `moeopt.trials.description.check_whole`, or when another attribute that counts is not what moeopt
            writes; the message names it.
        StorageError: when the study cannot be read.
    """
    name = study.study_name
    about = check_whole(study)
    sampler = about["sampler"]
    if not isinstance(sampler.get("name"), str):
        raise StudyError(f"study {shown(name)} does not name its sampler: got {shown(sampler.get('name'))}")
    everything = study.get_trials(deepcopy=False)
    repeated = {number for trial in everything for number in trial.system_attrs.get(RETRIES) or []}
    trials = sorted(
        (t for t in everything if t.state.is_finished() and t.number not in repeated),
        key=lambda t: (t.datetime_complete or datetime.max, t.number),
    )
    names = objectives_of(study)
    points = _points(study, trials)
    layer_tokens, charged = _layer_tokens(name, trials)
    costs: dict[Cost, Floats] = {"trials": np.arange(1.0, len(trials) + 1)}
    if layer_tokens is not None:
        costs["layer-tokens"] = np.cumsum(layer_tokens)
    if all(t.datetime_start and t.datetime_complete for t in trials):
        costs["time"] = _elapsed(trials)
    states = [t.state.name for t in trials]
    ends = {"completed": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    return Run(
        study=name,
        seed="/".join(map(str, _seeds(sampler))) or "?",
        settings={**_without_seed(sampler), **_extras(about.get("pruner"), everything)},
        description={part: about.get(part) or {} for part in COMPARABLE},
        costs=costs,
        points=points,
        curve=best_so_far(points[:, 0]) if len(names) == 1 else np.full(len(trials), np.nan),
        counts={name: states.count(state) for name, state in ends.items()},
        charged=charged,
        held_out=_held_out(study) if len(names) == 1 else None,  # one plan of a front says nothing of the front
        foreign=tuple(foreign_trials(study)),
        objectives=names,
    )


def _points(study: optuna.Study, trials: Sequence[FrozenTrial]) -> Floats:
    """Signed values of each trial, (trials, objectives); those of a pruned one are not of all examples, and none."""
    usable = {trial.number: trial for trial in completed(study)}
    at = np.full((len(trials), len(study.directions)), np.nan)
    rows = [i for i, trial in enumerate(trials) if trial.number in usable]
    at[rows] = points_of([trials[i] for i in rows], study.directions)
    return at


def _layer_tokens(name: str, trials: Sequence[FrozenTrial]) -> tuple[Floats | None, int]:
    """What each trial cost, (trials,), calibration included, and how many were charged; None where one does not say."""
    spent = [_count(name, t, "layer_tokens") for t in trials]
    dearest = max((s for s in spent if s is not None), default=None)
    charged = 0
    for i, trial in enumerate(trials):
        if spent[i] is None and "copied_from" in trial.user_attrs:
            spent[i] = 0.0
        elif spent[i] is None and trial.state.name == "FAIL" and dearest is not None:
            spent[i] = dearest
            charged += 1
    if None in spent:
        return None, 0
    calibration = [_count(name, t, CALIBRATION) or 0.0 for t in trials]
    return np.array(spent, dtype=np.float64) + np.array(calibration, dtype=np.float64), charged


def _count(name: str, trial: FrozenTrial, key: str) -> float | None:
    value = trial.user_attrs.get(key)
    if value is None:
        return None
    if not FINITE.holds(value) or not 0 <= value <= 1 << 53:
        raise StudyError(
            f"study {shown(name)}, trial {trial.number}: {key} must be a number from 0, got {shown(value)}"
        )
    return float(value)


def _elapsed(trials: Sequence[FrozenTrial]) -> Floats:
    """Seconds in which at least one trial ran, by the end of each, (trials,): the time between two runs is none."""
    ends = [t.datetime_complete.timestamp() for t in trials if t.datetime_complete]
    spans = sorted((t.datetime_start.timestamp(), end) for t, end in zip(trials, ends) if t.datetime_start)
    merged: list[list[float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, max(start, end)])
    begins, stops = np.array(merged, dtype=np.float64).reshape(-1, 2).T
    before = np.concatenate([[0.0], np.cumsum(stops - begins)])
    index = np.maximum(0, np.searchsorted(begins, ends, side="right") - 1)
    within = np.maximum(0.0, np.minimum(ends, stops[index]) - begins[index])
    return np.maximum.accumulate(before[index] + within)


def _seeds(settings: Any) -> list[Any]:
    """Every value named seed in nested settings, the outermost first."""
    if not isinstance(settings, dict):
        return []
    outer = [settings["seed"]] if settings.get("seed") is not None else []
    return outer + [seed for value in settings.values() for seed in _seeds(value)]


def _without_seed(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {key: _without_seed(value) for key, value in settings.items() if key != "seed"}


def _extras(pruner: Any, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """The pruner, where there is one, and what was enqueued: methods by name, other plans by their first digits."""
    extras: dict[str, Any] = {}
    if isinstance(pruner, dict) and not str(pruner.get("class")).endswith(".NopPruner"):
        extras["pruner"] = _without_seed(pruner)
    given = [(t, t.user_attrs.get(WARM_START) or _enqueued(t)) for t in trials]
    starts = {line(t.user_attrs.get(METHOD) or f"plan {line(plan)[:8]}", 40) for t, plan in given if plan}
    return extras | ({"warm_starts": sorted(starts)} if starts else {})


def _enqueued(trial: FrozenTrial) -> str | None:
    """The plan of a trial that a person enqueued."""
    origin = genome.origin(trial)
    return origin.get("plan") if origin.get("operator") == ENQUEUED else None


def _held_out(study: optuna.Study) -> HeldOut | None:
    record = recorded(study)
    if record is None:
        return None
    where = f"study {shown(study.study_name)}: {SELECTION}"
    check_record(record, where)
    check(record["scores"]["test"].get(WINNER), {"loss": FINITE}, f"{where}.scores.test.{WINNER}")
    about = record["examples"]["test"]
    return HeldOut(float(record["scores"]["test"][WINNER]["loss"]), about["of"], about["count"])
