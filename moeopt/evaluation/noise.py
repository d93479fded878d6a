"""The noise floor: how much a loss moves when nothing of the plan changes, only how it is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moeopt.evaluation.evaluator import Evaluator
from moeopt.models import is_exact

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluation import Evaluation
    from moeopt.evaluation.evaluator import Score
    from moeopt.evaluation.teacher import Compression
    from moeopt.plan import Plan
    from moeopt.tasks import Task

BACKENDS = ("eager", "grouped_mm")
"""Experts implementations of transformers tried by default; ``"batched_mm"`` copies the experts of every token."""


@dataclass(frozen=True)
class Movement:
    """One change of the computation, and how far the losses moved.

    Args:
        cause: what was changed.
        setting: to what: an experts implementation, padded tokens a forward pass, a dtype; ``"again"`` where nothing
            was, on a model whose kernels do not give the same bits each time (`Evaluator.exact`).
        mean: the absolute difference of the mean losses.
        largest: the largest absolute difference of an example's losses.
    """

    cause: Literal["backend", "batch", "dtype", "repetition"]
    setting: str
    mean: float
    largest: float


@dataclass(frozen=True)
class NoiseFloor:
    """Differences of mean loss up to `value` say nothing of two plans, unless both ran under the same settings.

    Args:
        loss: the mean loss under the settings that everything is compared with.
        examples: how many it is the mean of.
        movements: one for each change, in the order they were made.
    """

    loss: float
    examples: int
    movements: tuple[Movement, ...]

    @property
    def value(self) -> float:
        """The largest movement of the mean loss by backend, batch size or repetition; 0 when neither could be changed.

        The dtype is left out: it makes another model.
        """
        return max((moved.mean for moved in self.movements if moved.cause != "dtype"), default=0.0)


def noise_floor(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    *,
    plan: Plan | None = None,
    split: str = "search",
    limit: int | None = None,
    batch_tokens: int = 1024,
    max_length: int | None = None,
    score: Score = "likelihood",
    compression: Compression | None = None,
    backends: Sequence[str] = BACKENDS,
    dtypes: Sequence[torch.dtype] = (),
) -> NoiseFloor:
    """Evaluates the plan once as it is, then once for each change: other experts backends, smaller batches, dtypes.

    Args:
        model, tokenizer, task, split, limit, batch_tokens, max_length, score, compression: as for `Evaluator`. The
            model is left as it was found.
        plan: what to evaluate; None for the model as it is.
        backends: experts implementations; the model's own is passed over, and so is what it does not offer.
        dtypes: for each, a copy of the whole model in this dtype is made and evaluated: its memory comes on top.

    Raises:
        TaskError, PlanError, ModelError, NonFiniteLossError: as `Evaluator` and `Evaluator.evaluate`.
    """

    def evaluate(model: PreTrainedModel, batch_tokens: int = batch_tokens) -> Evaluation:
        given = {"split": split, "limit": limit, "max_length": max_length, "score": score, "compression": compression}
        return Evaluator(model, tokenizer, task, batch_tokens=batch_tokens, **given).evaluate(plan)  # type: ignore[arg-type]

    base = evaluate(model)
    movements: list[Movement] = []

    def note(cause: Literal["backend", "batch", "dtype", "repetition"], setting: str, other: Evaluation) -> None:
        largest = float(np.abs(other.losses.astype(np.float64) - base.losses).max())
        movements.append(Movement(cause, setting, abs(other.loss - base.loss), largest))

    if not is_exact(model):
        note("repetition", "again", evaluate(model))
    for backend in backends:
        with experts_backend(model, backend) as changed:
            if changed:
                note("backend", backend, evaluate(model))
    for tokens in (batch_tokens // 2, batch_tokens // 4):
        if tokens:
            note("batch", f"{tokens} tokens", evaluate(model, tokens))
    for dtype in dtypes:
        if dtype != model.dtype:
            note("dtype", str(dtype).removeprefix("torch."), evaluate(copy.deepcopy(model).to(dtype)))
    return NoiseFloor(base.loss, len(base.losses), tuple(movements))


@contextmanager
def experts_backend(model: PreTrainedModel, name: str) -> Iterator[bool]:
    """While the context is open, the model's experts run under another transformers implementation.

    Yields whether they do: not where the model has it already or does not offer it, nor for an unknown name.
    """
    configs = list({id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values())
    before = [getattr(config, "_experts_implementation", None) for config in configs]
    try:
        with suppress(ValueError, ImportError, RuntimeError):
            model.set_experts_implementation(name)
        yield [getattr(config, "_experts_implementation", None) for config in configs] != before
    finally:
        for config, implementation in zip(configs, before):
            config._experts_implementation = {"": implementation}  # "": not its sub-configs
