"""What judges a study's plans on dev: its evaluators, and the objectives' numbers that their evaluations give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.methods import Calibration
from moeopt.plan import Plan
from moeopt.results.front.one_shot import one_shot_name, uniform_plans
from moeopt.results.front.result import FULL, Point
from moeopt.results.guarding import GuardJudge
from moeopt.results.health import HealthCheck
from moeopt.results.selection.evaluating import StudyEvaluators
from moeopt.results.steps import Steps
from moeopt.spaces import space_of
from moeopt.statistics import paired_bootstrap
from moeopt.study import check_study
from moeopt.study.goals import Goals
from moeopt.study.objective import Objective
from moeopt.trials.front import objectives_of

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel

    from moeopt.evaluation import Evaluation
    from moeopt.tasks import Task


class Judging:
    """Evaluates a study's plans, the full model and one-shot plans, each once, and keeps that in the study.

    Args:
        study: of moeopt.
        model, tokenizer, task, dev_limit, batch_tokens, health: as for `front_of`.

    Raises:
        StudyError: when the study searched another model, another task, or dev.
        TaskError: when the task has no dev split.
    """

    def __init__(
        self, study: optuna.Study, model: PreTrainedModel | Objective, tokenizer: Any, task: Task | None,
        dev_limit: int | None, batch_tokens: int | None, health: bool = False,
    ) -> None:  # fmt: skip
        whole, goal = (model.model, model.task) if isinstance(model, Objective) else (model, task)
        if goal is None:
            raise StudyError("give either an Objective, or model, tokenizer and task")
        check_study(study, goal, whole, ("dev",))
        goal.examples("dev")
        self.study, self.space, self.model = study, space_of(study), whole
        self.evaluators = StudyEvaluators(
            study, model, tokenizer, task, limits={"dev": dev_limit}, batch_tokens=batch_tokens
        )
        dev = self.evaluators.evaluators["dev"]
        self.guards = GuardJudge(study, model, tokenizer, dev.batch_tokens)
        self._check = HealthCheck(whole, dev.tokenizer, goal, batch_tokens=dev.batch_tokens) if health else None
        names = objectives_of(study)
        self._goals = {split: Goals(each, names) for split, each in self.evaluators.evaluators.items()}
        search = self.evaluators.evaluators["search"]
        self._calibration = partial(Calibration, whole, search.tokenizer, goal, limit=search.limit)
        self._full: dict[str, Evaluation] = {}

    def full(self, steps: Steps) -> Point:
        """The full model on search and dev, which the numbers of others need."""
        for split in ("search", "dev"):
            steps(f"{FULL}: {split}")
            self._full[split] = self.evaluators.evaluate(None, split)
        search, dev = (self._numbers(None, split, self._full[split]) for split in ("search", "dev"))
        return Point(FULL, "full", search, dev=dev)

    def on_dev(self, point: Point, plan: Plan, steps: Steps) -> Point:
        """The same point with its plan and what that gives on dev; without numbers where its loss is not finite."""
        steps(f"{point.name}: dev")
        try:
            evaluation = self.evaluators.evaluate(plan, "dev")
        except NonFiniteLossError:
            return replace(point, plan=plan)
        gap = paired_bootstrap(evaluation, self._full["dev"])
        return replace(
            point, plan=plan, dev=self._numbers(plan, "dev", evaluation), against_full=gap,
            guards=tuple(self.guards(plan, "dev")), health=None if self._check is None else self._check(plan).record,
        )  # fmt: skip

    def one_shot(self, method: str, keep: int, plan: Plan, steps: Steps) -> Point:
        """A method's uniform plan on search and dev."""
        name = one_shot_name(method, keep, self.space.shape.experts)
        steps(f"{name}: search")
        try:
            search = self._numbers(plan, "search", self.evaluators.evaluate(plan, "search"))
        except NonFiniteLossError:
            search = {}
        return self.on_dev(Point(name, "one-shot", search), plan, steps)

    def one_shot_plans(
        self, methods: Sequence[str], keeps: Sequence[int]
    ) -> tuple[dict[tuple[str, int], Plan], list[str]]:
        """Uniform plans by method and number of experts kept, and what could not be made."""
        scored = self.evaluators.on["search"].name
        return uniform_plans(self.study, self.space, methods, keeps, scored, self._calibration)

    def _numbers(self, plan: Plan | None, split: str, evaluation: Evaluation) -> dict[str, float]:
        shape = self.space.shape
        whole = Plan.identity(shape.layers, shape.experts, shape.k) if plan is None else plan
        numbers = self._goals[split].numbers(whole, evaluation, self._full[split].scores)
        return {name: float(value) for name, value in numbers.items()}
