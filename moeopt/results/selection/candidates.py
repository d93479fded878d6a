"""Which trials of a study are candidates of a selection, and how large each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moeopt.errors import StudyError
from moeopt.results.selection.record import selected_trial
from moeopt.study.quantities import QUANTITIES
from moeopt.trials import genome
from moeopt.trials.description import number
from moeopt.trials.front import completed, nondominated, objectives_of
from moeopt.trials.objectives import LOSS
from moeopt.trials.selected import WINNER, check_record, recorded

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.plan import Plan
    from moeopt.results.selection.record import Candidate

BYTES = "bytes"


class Ranked(NamedTuple):
    """A trial with its loss on search and its plan."""

    trial: FrozenTrial
    loss: float
    plan: Plan


class TrialSizes:
    """Bytes of the weights that the plans of trials have as checkpoints: those that trials noted, else computed.

    Args:
        study: it.
        model: the full model.

    Attributes:
        full: those of the full model.
    """

    def __init__(self, study: optuna.Study, model: PreTrainedModel) -> None:
        from moeopt.models import shape_of
        from moeopt.plan import Plan

        self._names = objectives_of(study)
        self._quantity = QUANTITIES[BYTES](model)
        shape = shape_of(model)
        self.full = self.of_plan(Plan.identity(shape.layers, shape.experts, shape.k))

    def __call__(self, trial: FrozenTrial, plan: Plan) -> float:
        noted = noted_bytes(trial, self._names)
        return self.of_plan(plan) if noted is None else noted

    def of_plan(self, plan: Plan) -> float:
        """Those of any plan."""
        return float(self._quantity(plan, None))


def noted_bytes(trial: FrozenTrial, names: Sequence[str]) -> float | None:
    """Bytes of the weights of a complete trial's plan, as far as the trial tells."""
    noted = trial.values[names.index(BYTES)] if BYTES in names else number(trial.user_attrs, BYTES)
    return None if noted is None else float(noted)


def search_loss(trial: FrozenTrial, names: Sequence[str]) -> float:
    """The loss of a complete trial on search: its value, or the mean over its examples where that is no objective."""
    if LOSS in names:
        return float(trial.values[names.index(LOSS)])
    scores = genome.read_scores(trial)
    return np.inf if scores is None else float(np.average(scores[0].astype(np.float64), weights=scores[1]))


def ranked_trials(
    study: optuna.Study, top: int, stock_only: bool, sizes: TrialSizes | None, most: int | None, within: float
) -> list[Ranked]:
    """The candidates: the distinct plans of least loss on search, each with the first trial of least loss that had it.

    Args:
        study: it.
        top: how many at most.
        stock_only: only plans that an ordinary checkpoint can hold.
        sizes: of trials; None: no matter.
        most: bytes that a plan may have; None: any number.
        within: not NaN: the candidates are on the front of loss and bytes, around where this loss is reached.
    """
    from moeopt.exporting import why_not_stock
    from moeopt.spaces import space_of

    space, names = space_of(study), objectives_of(study)
    everything = np.isnan(within)
    ranked: dict[str, Ranked] = {}
    sized: dict[str, float] = {}
    losses = {trial.number: search_loss(trial, names) for trial in completed(study)}
    trials = sorted(completed(study), key=lambda t: (losses[t.number], t.number))
    noted = [noted_bytes(trial, names) for trial in trials]
    if not everything and not stock_only and None not in noted:  # of the others no plan is decoded
        at = np.array([[size, losses[trial.number]] for size, trial in zip(noted, trials)], dtype=np.float64)
        trials = [trials[i] for i in sorted(nondominated(at))]
    for trial in trials:
        if everything and len(ranked) == top:
            break
        size = noted_bytes(trial, names)
        if most is not None and size is not None and size > most:
            continue
        plan = space.plan(trial)
        if plan.fingerprint in ranked or (stock_only and why_not_stock(plan)):
            continue
        if sizes is not None:
            size = sizes(trial, plan)
            if most is not None and size > most:
                continue
            sized[plan.fingerprint] = size
        ranked[plan.fingerprint] = Ranked(trial, losses[trial.number], plan)
    if everything or not ranked:
        return list(ranked.values())
    return _around([(each, sized[name]) for name, each in ranked.items()], top, within)


def check_some(ranked: Sequence[Ranked], study: optuna.Study, sizes: TrialSizes | None, most: int | None) -> None:
    """Raise StudyError, saying why, where there is no candidate."""
    if ranked:
        return
    if sizes is None or most is None:
        raise StudyError(f"study {study.study_name!r} has no completed trial that an ordinary checkpoint can hold")
    from moeopt.spaces import space_of

    smallest = min(sizes(trial, space_of(study).plan(trial)) for trial in completed(study))
    raise _none_fits(study, most, smallest)


def _none_fits(study: optuna.Study, most: int, smallest: float) -> StudyError:
    why = f": the smallest of its trials has {smallest:,.0f}" if smallest > most else " in an ordinary checkpoint"
    return StudyError(f"no plan of study {study.study_name!r} fits {most:,} bytes{why}")


def fitting_trial(study: optuna.Study, most: int) -> tuple[FrozenTrial, bool]:
    """The trial that the latest selection chose, if it has at most so many bytes; else the best on search that has.

    Returns:
        It, and whether it was selected.

    Raises:
        StudyError: when none fits, or the study does not tell the sizes of its plans.
    """
    record = recorded(study)
    if record is not None:
        check_record(record)
        sizes = dict(zip(record["candidates"]["trial"], record["candidates"].get(BYTES) or ()))
        if (sizes.get(record[WINNER]) or np.inf) <= most:
            return selected_trial(study), True
    names = objectives_of(study)
    noted = {trial.number: noted_bytes(trial, names) for trial in completed(study)}
    told = [size for size in noted.values() if size is not None]
    if not told:
        raise StudyError(
            f"study {study.study_name!r} does not tell how large its plans are; moeopt select --fit computes it"
        )
    fits = [trial for trial in completed(study) if (noted[trial.number] or np.inf) <= most]
    if not fits:
        raise _none_fits(study, most, min(told))
    return min(fits, key=lambda trial: (search_loss(trial, names), trial.number)), False


def _around(ranked: Sequence[tuple[Ranked, float]], top: int, within: float) -> list[Ranked]:
    """Of the front of loss and bytes, smallest first, the `top` around the smallest whose loss is at most `within`.

    A quarter of them is smaller: what is within surely takes more than what seems so on search.
    """
    at = np.array([[size, each.loss] for each, size in ranked])
    front = [ranked[i][0] for i in nondominated(at)]
    first = next((i for i, each in enumerate(front) if each.loss <= within), len(front) - 1)
    start = max(0, min(first - top // 4, len(front) - top))
    return front[start : start + top]


def surely_within(candidates: Sequence[Candidate], loss: float) -> list[Candidate]:
    """Those that surely lose at most so much against the full model on dev, the smallest first.

    Raises:
        StudyError: when there is none; the message names the nearest.
    """
    judged = [(c.against_full.high, c) for c in candidates if c.against_full is not None]
    sure = [candidate for high, candidate in judged if high <= loss]
    if not sure:
        high, nearest = min(judged, key=lambda pair: (pair[0], pair[1].trial))
        raise StudyError(
            f"no candidate is surely within {loss:g} of the full model's loss on dev: the nearest, trial "
            f"{nearest.trial}, is at {nearest.against_full}; allow {high:.2g}, or judge on more dev examples or "
            "candidates"
        )
    return sorted(sure, key=lambda c: (c.bytes or 0.0, 0.0 if c.dev is None else c.dev.loss, c.trial))
