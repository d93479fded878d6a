"""The objective of a search: trial -> plan -> loss."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt import genome
from moeopt.errors import NonFiniteLossError, SpaceError, StudyError
from moeopt.evaluation import Evaluator
from moeopt.models import describe, shape_of
from moeopt.spaces import Space

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeopt.tasks import Task

FAILURE = "failure"


class Objective:
    """`objective(trial) -> float`: the task loss of the trial's plan; works with any `study.optimize`.

    Every trial keeps, as user attributes, `accuracy` (0 to 1), `seconds`, `tokens` (non-padding tokens run),
    `layer_tokens` (tokens times decoder layers), `operator`, `phase` and `parents` where the sampler names them, and
    `drift` (mean absolute distance of the genotype from the start); its per-example losses are packed in a system
    attribute. A plan whose loss is NaN or infinite makes the trial fail, with the layer in `failure`; the search goes
    on.

    Args:
        model, tokenizer: the full model, as `moeopt.load` returns them. Its parameters are never changed.
        task: what to score.
        space: what to search; for a model of the same shape.
        split: ``"search"`` unless you know better; ``"dev"`` and ``"test"`` are for afterwards.
        limit: use only so many examples (text: windows), the same ones every time.
        batch_tokens: padded tokens a forward pass.
        max_length: tokens a sequence may have; longer prompts lose their beginning.

    Raises:
        SpaceError: when the space is for a model of another shape.
        TaskError: when the task has no such split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        space: Space,
        *,
        split: str = "search",
        limit: int | None = None,
        batch_tokens: int = 1024,
        max_length: int | None = None,
    ) -> None:
        shape = shape_of(model)
        if shape != space.shape:
            raise SpaceError(f"the space is for {space.shape}, the model has {shape}")
        self.model, self.tokenizer, self.task, self.space, self.split = model, tokenizer, task, space, split
        self.evaluator = Evaluator(
            model,
            tokenizer,
            task,
            split=split,
            limit=limit,
            batch_tokens=batch_tokens,
            max_length=max_length,
        )
        self._limits = {"split": split, "limit": limit, "max_length": max_length}

    def __call__(self, trial: optuna.trial.BaseTrial) -> float:
        """The loss of the trial's plan, NaN where it is not finite.

        Raises:
            StudyError: when the study maximises.
        """
        study = getattr(trial, "study", None)
        if study is not None and study.direction.name == "MAXIMIZE":
            raise StudyError("the objective is a loss: create the study with direction='minimize'")
        try:
            return self._evaluate(trial, study)
        except KeyboardInterrupt:
            trial.set_user_attr(genome.INTERRUPTED, True)
            raise

    def _evaluate(self, trial: optuna.trial.BaseTrial, study: optuna.Study | None) -> float:
        started = time.perf_counter()
        for key, value in _facts(genome.origin(trial)).items():
            trial.set_user_attr(key, value)
        x = self.space.vector(trial)
        try:
            evaluation = self.evaluator.evaluate(self.space.decode(x))
        except NonFiniteLossError as error:
            trial.set_user_attr(FAILURE, str(error))
            return float("nan")
        if study is not None:
            scores = np.stack([evaluation.losses, evaluation.weights, evaluation.correct])
            genome.write(study, trial, genome.pack(genome.SCORES, scores.reshape(-1)))
        facts = {
            "accuracy": evaluation.accuracy,
            "seconds": round(time.perf_counter() - started, 4),
            "tokens": evaluation.tokens,
            "layer_tokens": evaluation.layer_tokens,
            "drift": round(self.space.drift(x), 6),
        }
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        return evaluation.loss

    def describe(self) -> dict[str, Any]:
        """Model, task and space as JSON: what a study must agree on to be resumed."""
        return {
            "model": describe(self.model),
            "task": {**self.task.describe(), **self._limits},
            "space": self.space.describe(),
        }


def _facts(origin: dict[str, Any]) -> dict[str, Any]:
    facts = {key: origin[key] for key in ("operator", "phase") if origin.get(key) is not None}
    if origin.get("parents"):
        facts["parents"] = origin["parents"]
    return facts
