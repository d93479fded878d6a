"""Plans evaluated on the splits as their study did on its own, each once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import StorageError, StudyError
from moeopt.evaluation import Compression, Evaluation, Evaluator
from moeopt.evaluation.store import FULL, Scored, StoredEvaluators, StudyStore
from moeopt.evaluation.teacher import LABEL_FREE
from moeopt.study.objective import Objective
from moeopt.study.scores import penalty, remembered
from moeopt.trials.description import described
from moeopt.trials.selected import SELECTION, check_record, recorded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.defaults import Score
    from moeopt.plan import Plan
    from moeopt.tasks import Task


class StudyEvaluators(StoredEvaluators):
    """The evaluators of a study on the split that it searched, and on others; what the study holds is not run again.

    Args:
        study: of moeopt.
        model, tokenizer, task, batch_tokens: as for `Evaluator`; or the study's objective as `model`.
        limits: examples of further splits; None for all.
        score: what losses are; None: the study's.
    """

    store: StudyStore

    def __init__(
        self, study: optuna.Study, model: PreTrainedModel | Objective, tokenizer: Any = None, task: Task | None = None,
        *, limits: Mapping[str, int | None], score: Score | None = None, batch_tokens: int | None = None,
    ) -> None:  # fmt: skip
        about = described(study)
        searched, evaluation = about["task"], about.get("evaluation") or {}
        self.score: Score = score or evaluation.get("score") or "likelihood"
        self._active_weight = float(evaluation.get("active_weight") or 0.0)
        compression = None
        if isinstance(model, Objective):
            tokenizer, task, batch_tokens = model.tokenizer, model.task, batch_tokens or model.evaluator.batch_tokens
            teacher, model = model.evaluator.teacher, model.model
            compression = None if teacher is None else teacher.compression
        if task is None or tokenizer is None:
            raise StudyError("give either an Objective, or model, tokenizer and task")
        if self.score in LABEL_FREE and compression is None:
            compression = Compression(top_p=evaluation.get("top_p") or Compression.top_p)
        options: dict[str, Any] = {
            "batch_tokens": batch_tokens or 1024, "max_length": searched.get("max_length"), "score": self.score,
            "compression": compression,
        }  # fmt: skip
        limits = {searched["split"]: searched.get("limit"), **limits}
        evaluators = {
            split: Evaluator(model, tokenizer, task, split=split, limit=limit, **options)
            for split, limit in limits.items()
        }
        super().__init__(evaluators, StudyStore(study))

    def evaluate(self, plan: Plan | None, split: str) -> Evaluation:
        """What a plan gives on a split, with the active experts in the losses as the study's objective has them."""
        return self._weighed(super().evaluate(plan, split))

    def searched(self, trial: FrozenTrial, plan: Plan) -> Evaluation:
        """What a trial's plan gave on search, from the trial where it says so."""
        evaluation = remembered(trial, plan, self.on["search"].name)
        if evaluation is None or len(evaluation.losses) != self.evaluators["search"].examples:
            return self.evaluate(plan, "search")
        return self._weighed(evaluation)

    def _weighed(self, evaluation: Evaluation) -> Evaluation:
        if not self._active_weight:
            return evaluation
        added = np.float32(penalty(self._active_weight, evaluation))
        return replace(evaluation, losses=evaluation.losses + added)


def on_test(study: optuna.Study) -> dict[str, Evaluation]:
    """What the latest selection got on test, example by example, to pair it with something else; needs no model.

    Returns:
        Evaluations of ``"full"``, ``"winner"`` and, as in `Selection.evaluations`, ``"search_best"``. Losses are the
        task's own, active experts not weighed in.

    Raises:
        StudyError: when nothing was selected yet.
        StorageError: when the study has lost some of it.
    """
    record = recorded(study)
    if record is None:
        raise StudyError(f"nothing was selected from study {study.study_name!r} yet")
    check_record(record, f"study {study.study_name!r}: {SELECTION}")
    store, on = StudyStore(study), Scored("test", record["examples"]["test"]["of"])
    evaluations = {name: store.get(plan, on) for name, plan in {FULL: FULL, **record["plans"]}.items()}
    if None in evaluations.values():
        raise StorageError(f"study {study.study_name!r} has lost scores of its selection; select again")
    return {name: evaluation for name, evaluation in evaluations.items() if evaluation is not None}
