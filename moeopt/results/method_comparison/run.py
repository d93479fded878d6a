"""The comparison itself: which plans are made, and what they are scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.defaults import Score
from moeopt.evaluation import Evaluation, Evaluator, Interval, paired_bootstrap
from moeopt.evaluation.store import StoredEvaluators
from moeopt.models import Sizes, describe, shape_of, without_plan
from moeopt.results.method_comparison.checks import ComparisonError, check, check_methods
from moeopt.results.method_comparison.comparison import MethodComparison, Row, Size, best_one_shot
from moeopt.results.method_comparison.folder import Workspace
from moeopt.results.method_comparison.making import Maker, kept_experts
from moeopt.results.method_comparison.searched import Searched, searched
from moeopt.results.steps import Progress, Steps

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel

    from moeopt.tasks import Task

DRAWS, TEST_DRAWS = 20, 5


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    *,
    keep: Sequence[int],
    methods: Sequence[str] | None = None,
    active: Sequence[int] | None = None,
    skipping: bool = False,
    refits: bool = False,
    draws: int = DRAWS,
    test_draws: int = TEST_DRAWS,
    calibration: Task | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    calibration_limit: int | None = None,
    study: optuna.Study | None = None,
    seed: int = 0,
    score: Score = "likelihood",
    batch_tokens: int = 1024,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> MethodComparison:
    """The full model, random prunings, one-shot methods and a search on the same examples (EEP, Table 1).

    Every plan is scored on each split that the task has. What is not the full model gets an interval of its test loss
    minus the full model's, and minus that of the best one-shot method of the same keep and k, which the dev split
    chooses (the search split where there is none).

    Args:
        model, tokenizer: as `moeopt.load` returns them. The model is left as it was found.
        task: what to be good at. It needs a search split.
        keep: numbers of experts kept per layer.
        methods: one-shot methods; None: all but random. Of all, those that cannot do it on this model are left out.
        active: numbers of experts that run per token; None: the model's.
        skipping: whether each plan with two or more active experts also comes with NAEE's calibrated dynamic skipping
            (of the random prunings the best one).
        refits: whether each pruned or merged plan (of the random prunings the best one) also comes refitted
            (`moeopt.refit`) to what one-shot methods look at.
        draws: random prunings scored on the search split; 0: none.
        test_draws: how many of them are scored on dev and test, too. The best by search loss always is.
        calibration: whose search split one-shot methods look at; None: the task's own, so that they are task-specific.
            Any other makes them task-agnostic.
        limit: examples (windows, for text) of the search split; None: all.
        test_limit: the same of dev and test.
        calibration_limit: the same for one-shot methods; None: as `limit`.
        study: a study of moeopt whose best trial, and best pruning, are compared.
        seed: of the random prunings.
        score: what a loss is, as for `Evaluator`; it also says which one-shot method is best.
        batch_tokens: padded tokens a forward pass.
        out: a folder. Everything found is kept in it at once and never computed again; `moeopt.report.save` writes the
            tables and figures there.
        progress: called before every step with the steps done, all of them, and what comes.

    Raises:
        ComparisonError: when an argument is out of range, or the folder is of something else.
        MethodError: when a method is unknown, or one that was named cannot do it on this model.
        StudyError: when the study searched another model, another task, or the test split.
        TaskError, ModelError: as for `Evaluator`.
    """
    with without_plan(model):
        shape = shape_of(model)
        ks = check(shape, keep, active)
        names = check_methods(methods)
        for name, value in (("draws", draws), ("test_draws", test_draws)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ComparisonError(f"{name} must be an integer of at least 0, got {value!r}")
        task.examples("search")
        trials = [] if study is None else _searched(study, task, model, keep)
        source = task if calibration is None else calibration
        splits = [split for split in ("search", "dev", "test") if split in task.splits]
        about = {"model": describe(model), "task": task.describe(), "calibration": source.describe()}
        evaluators: dict[str, Evaluator] = {
            split: Evaluator(
                model, tokenizer, task, split=split, limit=limit if split == "search" else test_limit, prefix_memory=0,
                batch_tokens=batch_tokens, score=score,
            )
            for split in splits
        }  # fmt: skip
        workspace, test_draws = Workspace(None if out is None else Path(out), about), min(draws, test_draws)
        try:
            maker = Maker(
                StoredEvaluators(evaluators, workspace.evaluations), workspace, source,
                limit if calibration_limit is None else calibration_limit, about["model"], shape, Sizes(model), seed,
                skipping, refits, Steps(progress),
            )  # fmt: skip
            jobs = list(maker.jobs(keep, ks, names, draws, test_draws, methods is not None, trials))
            maker.steps.total = sum(steps for steps, _ in jobs)
            for _, job in jobs:
                job()
        finally:
            workspace.close()
    maker.steps.finish()
    chosen_on = "dev" if "dev" in splits else "search"
    return MethodComparison(
        model=about["model"],
        task=about["task"],
        shape=shape,
        splits={split: Size(evaluator.examples, evaluator.tokens) for split, evaluator in evaluators.items()},
        calibrated=maker.calibrated,
        rows=tuple(_with_intervals(maker.rows, chosen_on)),
        chosen_on=chosen_on,
        score=score,
        draws=draws,
        test_draws=test_draws,
        seed=seed,
        left_out=tuple(maker.left_out),
    )


def _searched(study: optuna.Study, task: Task, model: PreTrainedModel, keep: Sequence[int]) -> list[Searched]:
    from moeopt.study import check_study

    check_study(study, task, model)
    trials = searched(study)
    for trial in trials:
        if kept_experts(trial.plan) not in keep:
            raise ComparisonError(
                f"study {study.study_name!r} keeps {kept_experts(trial.plan)} experts, which is not among those to "
                f"compare: {', '.join(map(str, keep))}"
            )
    return trials


def _with_intervals(rows: Sequence[Row], chosen_on: str) -> list[Row]:
    full = rows[0].evaluations

    def against(row: Row, other: Mapping[str, Evaluation]) -> Interval | None:
        if "test" not in row.evaluations or row.evaluations is other:
            return None
        return paired_bootstrap(row.evaluations["test"], other["test"])

    judged = []
    for row in rows:
        best = best_one_shot(rows, row.keep, row.k, chosen_on) if row.kind != "full" else None
        against_best = None if best is None else against(row, best.evaluations)
        judged.append(replace(row, against_full=against(row, full), against_best=against_best))
    return judged
