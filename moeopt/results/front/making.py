"""The front itself: the study's trials, judged on dev beside the full model and uniform one-shot plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import StudyError
from moeopt.results.front.checks import METHODS, TOP, check_arguments
from moeopt.results.front.result import FULL, Front, Point
from moeopt.results.optimiser_comparison.runs import COSTS, read
from moeopt.results.steps import Progress, Steps
from moeopt.statistics import Floats
from moeopt.trials.front import broken, front, points
from moeopt.trials.hypervolume import Bounds, curve

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.results.front.judging import Judging
    from moeopt.study.objective import Objective
    from moeopt.tasks import Task


def front_of(
    study: optuna.Study,
    model: PreTrainedModel | Objective | None = None,
    tokenizer: Any = None,
    task: Task | None = None,
    *,
    dev_limit: int | None = None,
    top: int = TOP,
    methods: Sequence[str] = METHODS,
    keeps: Sequence[int] | None = None,
    health: bool = False,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Front:
    """The front of a study, on search and on dev, beside the full model and uniform plans of one-shot methods.

    Every evaluation is kept in the study at once, and so are the plans of one-shot methods: the same call again runs
    nothing, and a selection takes what is there.

    Args:
        study: of moeopt, of one objective or several.
        model: the study's objective; or the full model, then with `tokenizer` and `task`; or None: nothing is
            evaluated, and there is no dev and no one-shot plan.
        dev_limit: use only so many examples (text: windows) of dev.
        top: how many points of the front are judged on dev at most; of more, some that are spread along it.
        methods: one-shot methods that prune; calibrated on the examples that were searched. Empty: none.
        keeps: numbers of experts that their uniform plans keep; None: up to 7 of those that the space allows.
        health: whether generated answers to prompts of dev are held against the full model's
            (`moeopt.results.health`), of all that is judged there.
        batch_tokens: padded tokens a forward pass; None: the objective's, or 1,024.
        progress: called before every evaluation with how many are done, all of them, and what comes.

    Raises:
        StudyError: when the study is not of moeopt, searched another model, another task, or dev, has no complete trial
            that keeps its constraints, or an argument is out of range.
        TaskError: when the task has no dev split.
        MethodError: when a method is unknown, or does not prune.
        NonFiniteLossError: when the full model has no finite loss.
    """
    check_arguments(methods, top=top, dev_limit=dev_limit, batch_tokens=batch_tokens)
    run = read(study)
    trials = front(study)
    if not trials:
        raise StudyError(
            f"study {study.study_name!r} has no complete trial that keeps its constraints yet{broken(study)}"
        )
    at = points(trials, study.directions)
    bounds = Bounds.of(at)
    searched = [_of_trial(trial, run.objectives) for trial in trials]
    made: dict[str, Any] = {}
    if model is None:
        made = {"points": tuple(searched), "not_judged": 0, "one_shot": (), "full": _reference(study, run.objectives)}
    else:
        from moeopt.results.front.judging import Judging

        judging = Judging(study, model, tokenizer, task, dev_limit, batch_tokens, health)
        chosen = spread(bounds.scaled(at), top)
        made = _judged(judging, trials, searched, chosen, methods, keeps, progress)
    cost = next(each for each in COSTS if each in run.costs)
    return Front(
        study=study.study_name, description=run.description, objectives=run.objectives, cost=cost,
        costs=run.costs[cost], hypervolume=curve(run.points, bounds), bounds=bounds, **made,
    )  # fmt: skip


def spread(at: Floats, count: int) -> list[int]:
    """Rows of `at`, (n, m), spread over them: the first and the last, then always the one furthest from the rest."""
    if len(at) <= count:
        return list(range(len(at)))
    chosen = [0]
    distances = np.linalg.norm(at - at[0], axis=1)
    for _ in range(count - 1):
        chosen.append(len(at) - 1 if len(chosen) == 1 else int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(at - at[chosen[-1]], axis=1))
    return sorted(chosen)


def _of_trial(trial: FrozenTrial, names: Sequence[str]) -> Point:
    search = dict(zip(names, trial.values))
    return Point(f"trial {trial.number}", "search", search, trial.number, constraints=dict(trial.constraints))


def _reference(study: optuna.Study, names: Sequence[str]) -> Point | None:
    """The full model, as far as the study tells of it."""
    from moeopt.study.reference import read as read_reference

    reference = read_reference(study)
    if reference is None:
        return None
    told = {"loss": reference.loss + reference.penalty, "metric": reference.accuracy, "active": reference.active}
    return Point(FULL, "full", {name: told[name] for name in names if name in told})


def _judged(
    judging: Judging, trials: Sequence[FrozenTrial], searched: Sequence[Point], chosen: Sequence[int],
    methods: Sequence[str], keeps: Sequence[int] | None, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a `Front` that take evaluations."""
    from moeopt.models import without_plan
    from moeopt.results.front.one_shot import uniform_keeps

    keeps = list(dict.fromkeys(uniform_keeps(judging.space) if keeps is None else keeps))
    steps = Steps(progress, 2 + len(chosen) + 2 * len(methods) * len(keeps))
    done = list(searched)
    with without_plan(judging.model):
        full = judging.full(steps)
        for i in chosen:
            done[i] = judging.on_dev(searched[i], judging.space.plan(trials[i]), steps)
        plans, left_out = judging.one_shot_plans(methods, keeps)
        one_shot = [judging.one_shot(method, keep, plan, steps) for (method, keep), plan in plans.items()]
    steps.finish()
    return {
        "points": tuple(done), "not_judged": len(done) - len(chosen), "full": full, "one_shot": tuple(one_shot),
        "left_out": (*left_out, *judging.guards.missing), "examples": judging.evaluators.evaluators["dev"].examples,
        "evaluated": judging.evaluators.evaluated + judging.guards.evaluated,
        "layer_tokens": judging.evaluators.layer_tokens + judging.guards.layer_tokens,
    }  # fmt: skip
