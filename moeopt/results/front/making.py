"""The front itself: the study's trials, judged on dev beside the full model and uniform one-shot plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.results.front.checks import METHODS, TOP, check_arguments
from moeopt.results.front.result import Front, Point
from moeopt.results.optimiser_comparison.runs import COSTS, read
from moeopt.results.steps import Progress, Steps
from moeopt.spaces import space_of
from moeopt.statistics import Floats, paired_bootstrap
from moeopt.trials.front import front, points
from moeopt.trials.hypervolume import Bounds, curve

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.evaluation import Evaluation
    from moeopt.plan import Plan
    from moeopt.results.selection.evaluating import StudyEvaluators
    from moeopt.study.objective import Objective
    from moeopt.tasks import Task

FULL = "full model"


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
        raise StudyError(f"study {study.study_name!r} has no complete trial that keeps its constraints yet")
    at = points(trials, study.directions)
    bounds = Bounds.of(at)
    searched = [_of_trial(trial, run.objectives) for trial in trials]
    made: dict[str, Any] = {}
    if model is None:
        made = {"points": tuple(searched), "not_judged": 0, "one_shot": (), "full": _reference(study, run.objectives)}
    else:
        chosen = set(spread(bounds.scaled(at), top))
        judging = _Judging(study, run.objectives, model, tokenizer, task, dev_limit, batch_tokens, progress)
        made = judging.judged(trials, searched, chosen, methods, keeps)
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


class _Judging:
    """Evaluates a study's plans, the full model and one-shot plans on dev, and the latter two on search."""

    def __init__(
        self, study: optuna.Study, objectives: Sequence[str], model: Any, tokenizer: Any, task: Task | None,
        dev_limit: int | None, batch_tokens: int | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        from moeopt.results.selection.evaluating import StudyEvaluators
        from moeopt.study import check_study
        from moeopt.study.goals import Goals
        from moeopt.study.objective import Objective

        if isinstance(model, Objective):
            self.model, self.tokenizer, self.task = model.model, model.tokenizer, model.task
        elif task is None or tokenizer is None:
            raise StudyError("give either an Objective, or model, tokenizer and task")
        else:
            self.model, self.tokenizer, self.task = model, tokenizer, task
        check_study(study, self.task, self.model, ("dev",))
        self.task.examples("dev")
        self.study, self.space, self.objectives = study, space_of(study), objectives
        self.evaluators: StudyEvaluators = StudyEvaluators(
            study, model, tokenizer, task, limits={"dev": dev_limit}, batch_tokens=batch_tokens
        )
        self.goals = {split: Goals(each, objectives) for split, each in self.evaluators.evaluators.items()}
        self.full: dict[str, Evaluation] = {}
        self.steps = Steps(progress)

    def judged(
        self, trials: Sequence[FrozenTrial], searched: Sequence[Point], chosen: set[int], methods: Sequence[str],
        keeps: Sequence[int] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Fields of a `Front`."""
        from moeopt.methods import Calibration
        from moeopt.models import without_plan
        from moeopt.results.front.one_shot import uniform_keeps, uniform_plans

        with without_plan(self.model):
            keeps = list(dict.fromkeys(uniform_keeps(self.space) if keeps is None else keeps))
            self.steps.total = 2 + len(chosen) + 2 * len(methods) * len(keeps)
            for split in ("search", "dev"):
                self.steps(f"{FULL}: {split}")
                self.full[split] = self.evaluators.evaluate(None, split)
            full = self._with_dev(Point(FULL, "full", self._numbers(None, "search", self.full["search"])), None)
            done = [
                self._with_dev(point, self.space.plan(trial)) if i in chosen else point
                for i, (trial, point) in enumerate(zip(trials, searched))
            ]
            limit = self.evaluators.evaluators["search"].limit
            calibration = partial(Calibration, self.model, self.tokenizer, self.task, limit=limit)
            scored = self.evaluators.on["search"].name
            plans, left_out = uniform_plans(self.study, self.space, methods, keeps, scored, calibration)
            one_shot = [self._one_shot(name, keep, plan) for (name, keep), plan in plans.items()]
        self.steps.finish()
        return {
            "points": tuple(done), "not_judged": len(done) - len(chosen), "full": full,
            "one_shot": tuple(point for point in one_shot if point is not None), "left_out": tuple(left_out),
            "examples": self.evaluators.evaluators["dev"].examples, "evaluated": self.evaluators.evaluated,
            "layer_tokens": self.evaluators.layer_tokens,
        }  # fmt: skip

    def _one_shot(self, method: str, keep: int, plan: Plan) -> Point | None:
        name = f"{method}, {keep} of {self.space.shape.experts}"
        self.steps(f"{name}: search")
        try:
            evaluation = self.evaluators.evaluate(plan, "search")
        except NonFiniteLossError:
            self.steps(f"{name}: no finite loss")
            return None
        return self._with_dev(Point(name, "one-shot", self._numbers(plan, "search", evaluation)), plan)

    def _with_dev(self, point: Point, plan: Plan | None) -> Point:
        """The same point with its plan and what it gives on dev."""
        if plan is not None:
            self.steps(f"{point.name}: dev")
        try:
            evaluation = self.evaluators.evaluate(plan, "dev")
        except NonFiniteLossError:
            return replace(point, plan=plan)
        gap = None if plan is None else paired_bootstrap(evaluation, self.full["dev"])
        return replace(point, plan=plan, dev=self._numbers(plan, "dev", evaluation), against_full=gap)

    def _numbers(self, plan: Plan | None, split: str, evaluation: Evaluation) -> dict[str, float]:
        from moeopt.plan import Plan

        shape = self.space.shape
        whole = Plan.identity(shape.layers, shape.experts, shape.k) if plan is None else plan
        numbers = self.goals[split].numbers(whole, evaluation, self.full[split].scores)
        return {name: float(value) for name, value in numbers.items()}
