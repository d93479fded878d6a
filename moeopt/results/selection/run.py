"""The selection itself: candidates by their loss on search, one of them by its loss on dev, its result on test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.evaluation import Compression, Evaluation, Evaluator
from moeopt.evaluation.teacher import LABEL_FREE
from moeopt.models import without_plan
from moeopt.plan import Plan
from moeopt.results.selection.checks import TOP, UNSEEN, check, check_arguments
from moeopt.results.selection.kept import Kept, name_of
from moeopt.results.selection.record import FULL, SEARCH_BEST, SELECTION, WINNER, Candidate, Selection, look_warning
from moeopt.study.objective import Objective
from moeopt.study.scores import penalty, remembered, scores_name
from moeopt.trials.description import described

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluator import Score
    from moeopt.tasks import Task

Progress = Callable[[int, int, str], None]
Ranked = list[tuple["FrozenTrial", Plan]]


@overload
def select(
    study: optuna.Study,
    model: Objective,
    *,
    top: int = ...,
    dev_limit: int | None = ...,
    test_limit: int | None = ...,
    score: Score | None = ...,
    stock_only: bool = ...,
    progress: Progress | None = ...,
) -> Selection: ...


@overload
def select(
    study: optuna.Study,
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    *,
    top: int = ...,
    dev_limit: int | None = ...,
    test_limit: int | None = ...,
    score: Score | None = ...,
    stock_only: bool = ...,
    batch_tokens: int | None = ...,
    progress: Progress | None = ...,
) -> Selection: ...


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
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Judge the study's best plans on dev, and the winner, once, on test, against the full model.

    What a search minimises for hundreds of trials, its best trial has partly by luck. So the `top` distinct plans of
    least loss on search are evaluated on dev; the one of least loss there wins, and its loss on test is an honest one,
    as long as test is not looked at again to choose something else.

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
        batch_tokens: padded tokens a forward pass; None: the objective's, or 1,024.
        progress: called before every evaluation with how many are done, all of them, and what comes.

    Raises:
        StudyError: when an argument is out of range, or the study is not of moeopt, searched another model, another
            task, or dev or test, or has no completed trial that could be a candidate.
        TaskError: when the task has no dev or no test split.
        NonFiniteLossError: when no candidate has a finite loss on dev, or the winner has none on test.
    """
    teacher = None
    if isinstance(model, Objective):
        tokenizer, task, batch_tokens = model.tokenizer, model.task, batch_tokens or model.evaluator.batch_tokens
        teacher, model = model.evaluator.teacher, model.model
    if task is None or tokenizer is None:
        raise StudyError("give either an Objective, or model, tokenizer and task")
    settings = {
        "top": top, "dev_limit": dev_limit, "test_limit": test_limit, "score": score, "stock_only": stock_only,
    }  # fmt: skip
    check_arguments(top=top, dev_limit=dev_limit, test_limit=test_limit, score=score)
    with without_plan(model):
        check(study, task, model)
        ranked = _ranked(study, top, stock_only)
        compression = None if teacher is None else teacher.compression
        bench = Bench(study, model, tokenizer, task, settings, batch_tokens or 1024, compression, len(ranked), progress)
        candidates = _judged(bench, ranked)
        trials = {trial.number: trial for trial, _ in ranked}
        winner, best = candidates[0], min(candidates, key=lambda one: (one.search_loss, one.trial))
        compared = {WINNER: winner} if winner is best else {WINNER: winner, SEARCH_BEST: best}
        found = {
            "search": {
                FULL: bench.evaluate(None, "search", "full model"),
                **{name: bench.search(trials[one.trial], one.plan) for name, one in compared.items()},
            },
            "dev": {
                FULL: bench.evaluate(None, "dev", "full model"),
                **{name: one.dev for name, one in compared.items() if one.dev is not None},
            },
            "test": _tested(bench, compared),
        }
    selection = Selection(
        study=study.study_name,
        metric="agreement" if bench.score in LABEL_FREE else task.metric,
        settings={**settings, "score": bench.score},
        examples={s: {"count": e.examples, "of": bench.of[s]} for s, e in bench.evaluators.items()},
        candidates=tuple(candidates),
        evaluations=found,
        looks=bench.kept.looks,
        evaluated=bench.evaluated,
        layer_tokens=bench.layer_tokens,
    )
    if study.user_attrs.get(SELECTION) != selection.record:
        study.set_user_attr(SELECTION, selection.record)
    bench.finish()
    return selection


def _ranked(study: optuna.Study, top: int, stock_only: bool) -> Ranked:
    """The best distinct plans by search loss, each with the first trial of least loss that had it."""
    from optuna.trial import TrialState

    from moeopt.exporting import why_not_stock
    from moeopt.study import space_of

    space = space_of(study)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: dict[str, tuple[FrozenTrial, Plan]] = {}
    finite = (t for t in done if t.value is not None and math.isfinite(t.value))
    for trial in sorted(finite, key=lambda t: (t.value, t.number)):
        if len(found) == top:
            break
        plan = space.plan(trial)
        if not (stock_only and why_not_stock(plan)):
            found.setdefault(plan.fingerprint, (trial, plan))
    if not found:
        raise StudyError(f"study {study.study_name!r} has no completed trial that an ordinary checkpoint can hold")
    return list(found.values())


class Bench:
    """Evaluates plans on the splits as the study did on its own, each once.

    Attributes:
        kept: what the study knows.
        of: names model and examples of each split.
        evaluated, layer_tokens: evaluations made here, and their cost.
    """

    def __init__(
        self,
        study: optuna.Study,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        settings: dict[str, Any],
        batch_tokens: int,
        compression: Compression | None,
        candidates: int,
        progress: Progress | None,
    ) -> None:
        about = described(study)
        searched, evaluation = about["task"], about.get("evaluation") or {}
        self.score: Score = settings["score"] or evaluation.get("score") or "likelihood"
        if self.score in LABEL_FREE and compression is None:
            compression = Compression(top_p=evaluation.get("top_p") or Compression.top_p)
        self._active_weight = float(evaluation.get("active_weight") or 0.0)
        unseen = {split: settings.get(f"{split}_limit") for split in UNSEEN if split in task.splits}
        limits = {searched["split"]: searched.get("limit"), **unseen}
        self.evaluators = {
            split: Evaluator(
                model,
                tokenizer,
                task,
                split=split,
                limit=limit,
                batch_tokens=batch_tokens,
                max_length=searched.get("max_length"),
                score=self.score,
                compression=compression,
            )
            for split, limit in limits.items()
        }
        self.of = {split: scores_name(evaluator) for split, evaluator in self.evaluators.items()}
        self.kept = Kept(study)
        self.evaluated = self.layer_tokens = self._done = 0
        self._progress = progress or (lambda done, steps, what: None)
        self._steps = candidates + 5

    @classmethod
    def for_study(cls, study: optuna.Study, objective: Objective, **limits: int | None) -> Bench:
        """For a study's own objective, with a limit for each split."""
        evaluator = objective.evaluator
        compression = None if evaluator.teacher is None else evaluator.teacher.compression
        parts = objective.model, objective.tokenizer, objective.task
        return cls(study, *parts, {"score": None, **limits}, evaluator.batch_tokens, compression, 0, None)

    def evaluate(self, plan: Plan | None, split: str, what: str) -> Evaluation:
        """What a plan gives on a split.

        Raises:
            NonFiniteLossError: when that is no finite loss.
        """
        self._progress(min(self._done, self._steps), self._steps, f"{what}: {split}")
        self._done += 1
        of = split, self.of[split], name_of(plan)
        known = self.kept.get(*of)
        if known is None:
            for other, evaluator in self.evaluators.items():
                if other != split:
                    evaluator.clear()
            self.evaluated += 1
            try:
                known = self.evaluators[split].evaluate(plan)
            except NonFiniteLossError as error:
                self.kept.put_not_finite(str(error), *of)
                raise
            self.kept.put(known, *of)
            self.layer_tokens += known.layer_tokens
        return self._weighed(known)

    def search(self, trial: FrozenTrial, plan: Plan) -> Evaluation:
        """What a trial's plan gave on search, from the trial where it says so."""
        known = remembered(trial, plan, self.of["search"])
        if known is None or len(known.losses) != self.evaluators["search"].examples:
            return self.evaluate(plan, "search", f"trial {trial.number}")
        return self._weighed(known)

    def finish(self) -> None:
        """Say that every step is done."""
        self._progress(self._steps, self._steps, "done")

    def _weighed(self, evaluation: Evaluation) -> Evaluation:
        """With the active experts in the losses, as the study's objective has them."""
        if not self._active_weight:
            return evaluation
        added = np.float32(penalty(self._active_weight, evaluation))
        return replace(evaluation, losses=evaluation.losses + added)


def _judged(bench: Bench, ranked: Ranked) -> list[Candidate]:
    """The candidates, the best on dev first; those without a finite loss there come last."""
    found, errors = [], []
    for i, (trial, plan) in enumerate(ranked, start=1):
        dev = None
        try:
            dev = bench.evaluate(plan, "dev", f"candidate {i} of {len(ranked)} (trial {trial.number})")
        except NonFiniteLossError as error:
            errors.append(error)
        assert trial.value is not None
        found.append(Candidate(trial.number, plan, trial.value, dev))
    if len(errors) == len(found):
        raise NonFiniteLossError(f"no candidate has a finite loss on dev; the best: {errors[0]}", layer=errors[0].layer)
    return sorted(found, key=lambda c: (math.inf if c.dev is None else c.dev.loss, c.search_loss, c.trial))


def _tested(bench: Bench, compared: dict[str, Candidate]) -> dict[str, Evaluation]:
    """What the full model and the candidates give on test; only the winner must give a finite loss there."""
    of, looks = bench.of["test"], bench.kept.looks
    plans = [one.plan for one in compared.values()]
    if not all(bench.kept.has("test", of, name_of(plan)) for plan in (None, *plans)):
        bench.kept.look(of, *map(name_of, plans))
    found = {FULL: bench.evaluate(None, "test", "full model")}
    for name, one in compared.items():
        try:
            found[name] = bench.evaluate(one.plan, "test", f"trial {one.trial}")
        except NonFiniteLossError as error:
            if name == WINNER:
                raise NonFiniteLossError(
                    f"trial {one.trial}, the winner, on test: {error}", layer=error.layer
                ) from None
    if 1 < bench.kept.looks != looks:
        warnings.warn(look_warning(bench.kept.looks), stacklevel=3)
    return found
