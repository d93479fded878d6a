"""The selection itself: candidates by their loss on search, one of them by its loss on dev, its result on test."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.evaluation import Evaluation
from moeopt.evaluation.store import plan_name
from moeopt.evaluation.teacher import LABEL_FREE
from moeopt.models import without_plan
from moeopt.results.guarding import UNSEEN, GuardJudge
from moeopt.results.health import HealthCheck
from moeopt.results.selection.candidates import Ranked, TrialSizes, check_some, ranked_trials, surely_within
from moeopt.results.selection.checks import TOP, check, check_arguments, check_goal
from moeopt.results.selection.evaluating import StudyEvaluators
from moeopt.results.selection.record import Candidate, Selection, look_warning
from moeopt.results.steps import Progress, Steps
from moeopt.statistics import paired_bootstrap
from moeopt.study.guards import broken
from moeopt.study.objective import Objective
from moeopt.trials.description import check as check_form
from moeopt.trials.objectives import size_of
from moeopt.trials.selected import FULL, HEALTH, SEARCH_BEST, SELECTION, WINNER, recorded

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.defaults import Score
    from moeopt.plan import Plan
    from moeopt.study.guards import Guarded
    from moeopt.tasks import Task


def select(
    study: optuna.Study,
    model: PreTrainedModel | Objective,
    tokenizer: Any = None,
    task: Task | None = None,
    *,
    top: int = TOP,
    dev_limit: int | None = None,
    test_limit: int | None = None,
    score: Score | None = None,
    stock_only: bool = False,
    fit: int | str | None = None,
    loss_within: float | None = None,
    health: bool = False,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Judge the study's best plans on dev, and the winner, once, on test, against the full model.

    What a search minimises for hundreds of trials, its best trial has partly by luck. So the `top` distinct plans of
    least loss on search are evaluated on dev; the one of least loss there wins, and its loss on test is an honest one,
    as long as test is not looked at again to choose something else.

    Of a study of several objectives it is said what to choose: the least loss that fits so many bytes (`fit`), or the
    smallest plan that surely loses no more than so much (`loss_within`), of those that fit. Trials that break a
    constraint are no candidates.

    Guards of the study are judged on examples of dev and test as well, paired to the full model: what breaks one on dev
    does not win as long as another does not, and a winner that breaks one on test is not called good.

    Every evaluation is kept in the study at once, so that a selection that was cut off goes on where it was, the same
    one again runs nothing, and another one runs only what is missing. Whenever something new runs on test, that is a
    look at it; from the second on there is a warning. The study's user attribute ``selection`` is the record of the
    latest selection (`Selection.record`).

    Args:
        study: of moeopt, as it is: more trials later may give another selection.
        model: the study's objective; or the full model, then with `tokenizer` and `task`.
        top: how many plans are candidates, at most 1,000; fewer where the study has fewer.
        dev_limit, test_limit: use only so many examples (text: windows) of dev and test.
        score: what plans are chosen by on dev and reported in; None: what the study minimised. Its `active_weight`
            counts in any case. The task's metric is reported besides; where losses are distances from the full model,
            how often both have the same first choice.
        stock_only: consider only plans that an ordinary checkpoint can hold.
        fit: consider only plans whose checkpoint has at most so many bytes of weights; a number, or as ``"24GB"``.
        loss_within: what the winner may lose on dev against the full model: the upper end of its paired interval is at
            most that, and of those whose is it is the smallest. Candidates are then on the front of loss and bytes, the
            `top` around where that loss is reached on search.
        health: whether the winner's generated answers to prompts of dev are held against the full model's
            (`moeopt.results.health`); one that fails that is not called good.
        batch_tokens: padded tokens a forward pass; None: the objective's, or 1,024.
        progress: called before every evaluation with how many are done, all of them, and what comes.

    Raises:
        StudyError: when an argument is out of range, or the study is not of moeopt, searched another model, another
            task, or dev or test, or has no completed trial that could be a candidate; when it has several objectives
            and neither `fit` nor `loss_within` is given, or nothing fits, or is surely within.
        TaskError: when the task has no dev or no test split.
        NonFiniteLossError: when no candidate has a finite loss on dev, or the winner has none on test.
    """
    limits = {"dev": dev_limit, "test": test_limit}
    check_arguments(top=top, score=score, loss_within=loss_within, dev_limit=dev_limit, test_limit=test_limit)
    most = None if fit is None else size_of(fit)
    whole, task = (model.model, model.task) if isinstance(model, Objective) else (model, task)
    if task is None:
        raise StudyError("give either an Objective, or model, tokenizer and task")
    with without_plan(whole):
        check(study, task, whole)
        check_goal(study, most, loss_within)
        evaluators = StudyEvaluators(
            study, model, tokenizer, task, limits=limits, score=score, batch_tokens=batch_tokens
        )
        sized = None if most is None and loss_within is None else TrialSizes(study, whole)
        full_loss = math.nan if loss_within is None else evaluators.evaluate(None, "search").loss + loss_within
        ranked = ranked_trials(study, top, stock_only, sized, most, full_loss)
        check_some(ranked, study, sized, most)
        batch_tokens = evaluators.evaluators["dev"].batch_tokens
        guards = GuardJudge(study, model, tokenizer, batch_tokens)
        judging = _Judging(evaluators, guards, Steps(progress, len(ranked) + 9 + health))
        candidates = judging.candidates(ranked, sized, loss_within)
        winner, best = candidates[0], min(candidates, key=lambda candidate: (candidate.search_loss, candidate.trial))
        alone = winner is best or loss_within is not None
        compared = {WINNER: winner} if alone else {WINNER: winner, SEARCH_BEST: best}
        evaluations = judging.compared(compared, {each.trial.number: each.trial for each in ranked})
        guarded = judging.kept(winner.plan)
        reported = None
        if health:
            dev = evaluators.evaluators["dev"]
            check_health = HealthCheck(whole, dev.tokenizer, task, batch_tokens=batch_tokens)
            reported = judging.health(study, check_health, winner.plan)
    goal = {"fit": most, "loss_within": loss_within}
    selection = Selection(
        study=study.study_name,
        metric="agreement" if evaluators.score in LABEL_FREE else task.metric,
        settings={
            "top": top, "dev_limit": dev_limit, "test_limit": test_limit, "score": evaluators.score,
            "stock_only": stock_only, **{name: value for name, value in goal.items() if value is not None},
        },
        examples={
            split: {"count": evaluator.examples, "of": evaluators.on[split].name}
            for split, evaluator in evaluators.evaluators.items()
        },
        candidates=tuple(candidates),
        evaluations=evaluations,
        looks=evaluators.store.looks,
        evaluated=evaluators.evaluated + guards.evaluated,
        layer_tokens=evaluators.layer_tokens + guards.layer_tokens,
        full_bytes=None if sized is None else sized.full,
        guards=guarded,
        not_judged=tuple(guards.missing),
        passed_over=judging.passed_over,
        health=reported,
    )  # fmt: skip
    if study.user_attrs.get(SELECTION) != selection.record:
        study.set_user_attr(SELECTION, selection.record)
    judging.steps.finish()
    return selection


class _Judging:
    """Evaluates candidates on dev, and what is compared on all three splits.

    Attributes:
        passed_over: candidates that would have won if they did not break a guard on dev.
    """

    def __init__(self, evaluators: StudyEvaluators, guards: GuardJudge, steps: Steps) -> None:
        self.evaluators, self.guards, self.steps = evaluators, guards, steps
        self.passed_over = 0

    def candidates(self, ranked: list[Ranked], sized: TrialSizes | None, loss_within: float | None) -> list[Candidate]:
        """The candidates, the winner first, then the best on dev; those without a finite loss there come last."""
        full = None if loss_within is None else self._evaluate(None, "dev", "full model")
        candidates, errors = [], []
        for i, each in enumerate(ranked, start=1):
            dev = None
            try:
                dev = self._evaluate(each.plan, "dev", f"candidate {i} of {len(ranked)} (trial {each.trial.number})")
            except NonFiniteLossError as error:
                errors.append(error)
            size = None if sized is None else sized(each.trial, each.plan)
            gap = None if full is None or dev is None else paired_bootstrap(dev, full)
            candidates.append(Candidate(each.trial.number, each.plan, each.loss, dev, size, gap))
        if len(errors) == len(candidates):
            first = errors[0]
            raise NonFiniteLossError(f"no candidate has a finite loss on dev; the best: {first}", layer=first.layer)
        candidates.sort(key=lambda c: (math.inf if c.dev is None else c.dev.loss, c.search_loss, c.trial))
        able = [c for c in candidates if c.dev] if loss_within is None else surely_within(candidates, loss_within)
        self.steps("guards: dev")
        winner = next((c for c in able if not broken(self.guards(c.plan, "dev"))), able[0])
        self.passed_over = able.index(winner)
        return [winner, *(candidate for candidate in candidates if candidate is not winner)]

    def kept(self, plan: Plan) -> tuple[Guarded, ...]:
        """The winner on the guards, on dev and on test."""
        self.steps("guards: test")
        return tuple(each for split in UNSEEN for each in self.guards(plan, split))

    def health(self, study: optuna.Study, check: HealthCheck, plan: Plan) -> dict[str, Any]:
        """The record of the winner's health report: that of the study's latest selection, where it is of the same."""
        self.steps("health")
        earlier: dict[str, Any] | None = (recorded(study) or {}).get("health")
        if earlier is not None:
            check_form(earlier, HEALTH, f"study {study.study_name!r}: {SELECTION}.health")
            if (earlier["plan"], earlier["of"]) == (plan.fingerprint, check.of):
                return earlier
        return check(plan).record

    def compared(
        self, compared: dict[str, Candidate], trials: dict[int, FrozenTrial]
    ) -> dict[str, dict[str, Evaluation]]:
        """By split, what the full model and some candidates give."""
        search = {FULL: self._evaluate(None, "search", "full model")}
        for name, candidate in compared.items():
            self.steps(f"trial {candidate.trial}: search")
            search[name] = self.evaluators.searched(trials[candidate.trial], candidate.plan)
        dev = {FULL: self._evaluate(None, "dev", "full model")}
        dev |= {name: candidate.dev for name, candidate in compared.items() if candidate.dev is not None}
        return {"search": search, "dev": dev, "test": self._tested(compared)}

    def _tested(self, compared: dict[str, Candidate]) -> dict[str, Evaluation]:
        """What they give on test; only the winner must give a finite loss there."""
        store, on = self.evaluators.store, self.evaluators.on["test"]
        plans, looks = [plan_name(candidate.plan) for candidate in compared.values()], store.looks
        if not all(store.has(plan, on) for plan in (FULL, *plans)):
            store.look(plans, on)
        tested = {FULL: self._evaluate(None, "test", "full model")}
        for name, candidate in compared.items():
            try:
                tested[name] = self._evaluate(candidate.plan, "test", f"trial {candidate.trial}")
            except NonFiniteLossError as error:
                if name == WINNER:
                    message = f"trial {candidate.trial}, the winner, on test: {error}"
                    raise NonFiniteLossError(message, layer=error.layer) from None
        if 1 < store.looks != looks:
            warnings.warn(look_warning(store.looks), stacklevel=4)
        return tested

    def _evaluate(self, plan: Plan | None, split: str, what: str) -> Evaluation:
        self.steps(f"{what}: {split}")
        return self.evaluators.evaluate(plan, split)
