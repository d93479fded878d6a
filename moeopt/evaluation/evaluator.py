"""The evaluator: a plan in, losses of a task's examples out."""

from __future__ import annotations

import inspect
import threading
import time
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.errors import NonFiniteLossError
from moeopt.evaluation.batches import Batch, pack
from moeopt.evaluation.evaluation import Evaluation
from moeopt.evaluation.scoring import score
from moeopt.models import MergedCache, MoELayer, moe_layers, patched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from moeopt.plan import Plan
    from moeopt.tasks import Task


class Evaluator:
    """Evaluates plans on the same examples, tokenised and batched once.

    The same plan always gives bitwise the same losses. With `limit`, the examples are the first of the task's fixed
    random order, so that a larger limit holds the examples of a smaller one, in front. Threads that share a model take
    turns.

    Args:
        model: a causal language model, on one device or dispatched by accelerate. It is left as it was found.
        tokenizer: its tokenizer; a pad token is not needed.
        task: what to score.
        split: "search", "dev" or "test".
        limit: how many examples (windows, for text); None for all.
        batch_tokens: most padded tokens a forward pass; a longer sequence runs alone.
        max_length: most tokens a sequence; None for the model's `max_position_embeddings`.

    Raises:
        TaskError: if the split is empty, or an example does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        *,
        split: str = "search",
        limit: int | None = None,
        batch_tokens: int = 1024,
        max_length: int | None = None,
    ) -> None:
        config = model.config.get_text_config()
        if max_length is None:
            max_length = getattr(config, "max_position_embeddings", None)
        self.model = model
        self.task = task
        self.split = split
        self.limit = limit
        self._requests = task.requests(split, tokenizer, limit=limit, max_length=max_length)
        self._batches = pack(self._requests, batch_tokens)
        self._cache = MergedCache()
        self._layers = int(config.num_hidden_layers)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def tokens(self) -> int:
        """Non-padding tokens that one evaluation runs."""
        return sum(batch.tokens for batch in self._batches)

    def evaluate(self, plan: Plan | None = None) -> Evaluation:
        """Scores the model under `plan`; None means the model as it is.

        Raises:
            PlanError: if the plan does not fit the model.
            ModelError: if the model has no MoE layers that a plan can act on.
            NonFiniteLossError: if a loss is NaN or infinite, with the first MoE layer whose output is not finite.
        """
        with _lock_of(self.model):
            return self._evaluate(plan)

    def _evaluate(self, plan: Plan | None) -> Evaluation:
        start = time.perf_counter()
        likelihood = np.zeros(len(self._requests))
        greedy = np.zeros(len(self._requests), dtype=np.int64)
        with (
            torch.inference_mode(),
            evaluation_mode(self.model),
            patched(self.model, plan, cache=self._cache) if plan is not None else nullcontext() as patch,
        ):
            for batch in self._batches:
                likelihoods, hits = score(self._logits(batch), batch)
                if not likelihoods.isfinite().all():
                    self._raise_non_finite(batch, patch.layers if patch else moe_layers(self.model))
                np.add.at(likelihood, batch.request.numpy(), likelihoods.double().numpy())
                np.add.at(greedy, batch.request.numpy(), hits.long().numpy())
        scores = self.task.reduce(self.split, self._requests, likelihood, greedy)
        return Evaluation(
            loss=float(np.average(scores.losses.astype(np.float64), weights=scores.weights)),
            accuracy=float(np.average(scores.correct.astype(np.float64), weights=scores.weights)),
            losses=scores.losses,
            weights=scores.weights,
            correct=scores.correct,
            tokens=self.tokens,
            layer_tokens=self.tokens * self._layers,
            seconds=time.perf_counter() - start,
        )

    def _logits(self, batch: Batch) -> Tensor:
        """Logits (rows, kept, vocabulary) of the last positions, from the first scored one on if the model can."""
        device = input_device(self.model)
        # An integer, not a tensor of positions: a tensor would have to be on the device of the last layer.
        keep = {"logits_to_keep": batch.ids.shape[1] - int(batch.position.min())} if self._keeps_logits else {}
        output = self.model(
            input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False, **keep
        )
        logits: Tensor = output.logits
        return logits

    def _raise_non_finite(self, batch: Batch, layers: Sequence[MoELayer]) -> NoReturn:
        """Runs the batch again, watching the MoE blocks, and raises."""
        bad: list[int] = []
        real = batch.mask.bool().flatten()

        def watch(index: int, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not hidden.reshape(len(real), -1)[real.to(hidden.device)].isfinite().all():
                bad.append(index)

        with ExitStack() as stack:
            for layer in layers:
                handle = layer.block.register_forward_hook(lambda _m, _i, out, index=layer.index: watch(index, out))
                stack.callback(handle.remove)
            self._logits(batch)
        if bad:
            raise NonFiniteLossError(f"the loss is not finite: the MoE output of layer {bad[0]} is not", layer=bad[0])
        raise NonFiniteLossError("the loss is not finite, though the output of every MoE layer is", layer=None)


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _lock_of(model: nn.Module) -> threading.RLock:
    """One lock a model: threads (`n_jobs=2`) take turns, since a plan is in force for the whole model."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go; for offloaded weights the CPU, from where accelerate moves them."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; on exit each is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
