"""Plans evaluated on the splits as their study did on its own, each once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import StorageError, StudyError
from moeopt.evaluation import Compression, Evaluation, Evaluator
from moeopt.evaluation.store import FULL, Scored, StoredEvaluators, StudyStore
from moeopt.evaluation.teacher import LABEL_FREE
from moeopt.results.selection.record import SELECTION, check_record, recorded
from moeopt.study.objective import Objective, penalty, remembered
from moeopt.trials.description import described

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluator import Score
    from moeopt.plan import Plan
    from moeopt.tasks import Task


class StudyEvaluators(StoredEvaluators):
    """The evaluators of a study on the split that it searched, and on others; what the study holds is not run again.

    Args:
        study: of moeopt.
        model, tokenizer, task: as for `Evaluator`.
        limits: examples of further splits; None for all.
        score: what losses are; None: the study's.
        batch_tokens: padded tokens a forward pass.
        compression: of the full model's distributions; None: the study's.

    Attributes:
        score: what losses are.
        store: what the study holds.
    """

    store: StudyStore

    def __init__(
        self,
        study: optuna.Study,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        limits: dict[str, int | None],
        *,
        score: Score | None = None,
        batch_tokens: int = 1024,
        compression: Compression | None = None,
    ) -> None:
        about = described(study)
        searched, evaluation = about["task"], about.get("evaluation") or {}
        self.score: Score = score or evaluation.get("score") or "likelihood"
        if self.score in LABEL_FREE and compression is None:
            compression = Compression(top_p=evaluation.get("top_p") or Compression.top_p)
        self._active_weight = float(evaluation.get("active_weight") or 0.0)
        options: dict[str, Any] = {
            "batch_tokens": batch_tokens, "max_length": searched.get("max_length"), "score": self.score,
            "compression": compression,
        }  # fmt: skip
        limits = {searched["split"]: searched.get("limit"), **limits}
        evaluators = {
            split: Evaluator(model, tokenizer, task, split=split, limit=limit, **options)
            for split, limit in limits.items()
        }
        super().__init__(evaluators, StudyStore(study))

    @classmethod
    def by(cls, objective: Objective, study: optuna.Study, limits: dict[str, int | None]) -> StudyEvaluators:
        """Those of a study's own objective."""
        teacher, parts = objective.evaluator.teacher, (objective.model, objective.tokenizer, objective.task)
        compression = None if teacher is None else teacher.compression
        return cls(
            study, *parts, limits, batch_tokens=objective.evaluator.batch_tokens, compression=compression
        )  # fmt: skip

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
    evaluations = {}
    for name, plan in {FULL: FULL, **record["plans"]}.items():
        evaluation = store.get(plan, on)
        if evaluation is None:
            raise StorageError(f"study {study.study_name!r} has lost scores of its selection; select again")
        evaluations[name] = evaluation
    return evaluations
