"""Calibration: a model run over token sequences, showing what each MoE layer sees of each batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moeopt.errors import MethodError, ModelError
from moeopt.methods.layer_activations import Hook, Observe
from moeopt.methods.sequences import Batch, packed
from moeopt.models import evaluation_mode, experts_run_by, layerwise, moe_layers, patched, routing_rules, without_plan
from moeopt.models.layers import is_offloaded
from moeopt.models.layerwise import input_device
from moeopt.plan import ModelShape, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluator import Score
    from moeopt.tasks import Task


class Calibration:
    """Token sequences for one-shot methods, and passes of a model over them.

    The task decides what a method is good at: any text makes it task-agnostic, the task that counts makes it
    task-specific. Of a multiple-choice question the prompt with its right answer is taken.

    Args:
        model, tokenizer: the full model, as `moeopt.load` returns them. It is left as it was found.
        task: whose examples are looked at.
        split: "search", unless you know better.
        limit: how many examples (text: windows); None for all.
        batch_tokens: padded tokens a forward pass; a longer sequence runs alone.
        max_length: most tokens a sequence; None for the model's `max_position_embeddings`.
        score: the loss of methods that look at one, as for `Evaluator`. ``"metric"``, which has no derivative, stands
            for "choice" where the task chooses among options, else for "likelihood".

    Attributes:
        shape: layers, n and k of the model.
        sequences: how many sequences there are.
        tokens: how many tokens they have.

    Raises:
        TaskError: as for `Evaluator`.
        ModelError: when the model has no MoE layers, or routes by an unknown rule.
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
        score: Score = "likelihood",
    ) -> None:
        if batch_tokens < 1:
            raise MethodError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if max_length is None:
            max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.split, self.batch_tokens = split, batch_tokens
        self.loss: Score = score if score != "metric" else "choice" if task.chooses else "likelihood"
        with evaluation_mode(model), without_plan(model), torch.inference_mode():
            self.layers, self.rules = moe_layers(model), routing_rules(model)
        first = self.layers[0]
        if first.weighs_inputs:
            raise MethodError(
                f"{type(model).__name__} multiplies what enters its experts by their weights, not what they give, "
                "which is what one-shot methods look at; search instead (samplers eep, local), or keep experts by hand"
            )
        self.shape = ModelShape(len(self.layers), first.n, first.k, first.groups)
        self.requests = task.requests(split, tokenizer, limit=limit, max_length=max_length)
        sequences = [request.ids for request in task.solutions(split, self.requests)]
        self.sequences, self.tokens = len(sequences), sum(map(len, sequences))
        self.batches = packed(sequences, batch_tokens)

    @property
    def decoder_layers(self) -> int:
        """Decoder layers of the model, MoE or not."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def run(
        self, observe: Observe, *, plan: Plan | None = None, layer_by_layer: bool = False, all_outputs: bool = False
    ) -> None:
        """One pass: `observe` is called with what every MoE layer sees of every batch, under a plan if there is one.

        Args:
            observe: called under inference mode, the layer's weights being at hand.
            plan: what is in force; None: the model as it is.
            layer_by_layer: all batches through a layer before the next one, so that `observe` is done with a layer
                before it meets the next. Holds the hidden states of all tokens. It is done in any case, where it can
                be, when experts are offloaded, so that they are moved once.
            all_outputs: whether every expert's output will be asked for. Then experts run once, and what the layer
                gives is made of their outputs, which differs from what it gives by rounding; without a plan only.

        Raises:
            ModelError: when it cannot be done `layer_by_layer`, because the model keeps state across layers.
            MethodError: for a plan with `all_outputs`, and when what experts give is not finite.
            PlanError: when the plan does not fit the model.
        """
        offloaded = any(is_offloaded(layer.experts) for layer in self.layers)
        if plan is not None and all_outputs:
            raise MethodError("the outputs of all experts are those of the full model: give no plan, or no all_outputs")
        with self.ready(), ExitStack() as stack:
            stream = self._stream(needed=layer_by_layer) if layer_by_layer or offloaded else None
            if plan is not None:
                stack.enter_context(patched(self.model, plan))
            watch = stack.enter_context(self.watching(observe, all_outputs=all_outputs))
            if stream is not None:
                for layer in range(stream.depth):
                    stream.advance(layer, watch)
                return
            device, options = input_device(self.model), dict[str, Any](use_cache=False)
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
                options["logits_to_keep"] = 1
            for batch in self.batches:
                watch(batch)
                self.model(**batch.inputs(device), **options)

    def _stream(self, *, needed: bool) -> Stream | None:
        try:
            return Stream(self)
        except ModelError:
            if needed:
                raise
            return None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in inference mode, in eval mode and without a plan."""
        with torch.inference_mode(), evaluation_mode(self.model), without_plan(self.model):
            yield

    @contextmanager
    def watching(self, observe: Observe, *, all_outputs: bool = False) -> Iterator[Callable[[Batch], None]]:
        """While open, `observe` is told of every MoE layer that runs; the callable yielded says which batch does."""
        current: list[Batch] = []

        def watch(batch: Batch) -> None:
            current[:] = [batch]

        hooks = [Hook(layer, rule, observe, current) for layer, rule in zip(self.layers, self.rules)]
        with ExitStack() as stack:
            if all_outputs:
                stack.enter_context(experts_run_by(self.model, lambda layer: hooks[layer.index].run))
            for hook in hooks:
                parent = self.model.get_submodule(hook.layer.name.rpartition(".")[0])
                hook.attach(stack, (module for module in parent.children() if module is not hook.layer.block))
            yield watch


class Stream:
    """The batches of a calibration on their way through a model, layer by layer.

    Attributes:
        depth: decoder layers.
        moe: for every MoE layer, the index of its decoder layer.
        states: for each batch, the hidden states where it is now, (rows, width, hidden).

    Raises:
        ModelError: when the model cannot be run layer by layer.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._parts = layerwise(calibration.model)
        self._batches = calibration.batches
        self._model = calibration.model
        self.depth, self.moe = len(self._parts.layers), self._parts.moe
        device = input_device(calibration.model)
        begun = [self._parts.begin(batch.inputs(device)) for batch in self._batches]
        self.states = [hidden for hidden, _ in begun]
        self._calls = [calls for _, calls in begun]

    def advance(self, index: int, watch: Callable[[Batch], None], plan: Plan | None = None) -> None:
        """All batches through decoder layer `index`, under a plan if there is one; `watch` is told each batch."""
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(patched(self._model, plan))
            there = stack.enter_context(self._parts.loaded(index))
            for b, batch in enumerate(self._batches):
                watch(batch)
                self.states[b] = self._through(index, b, self.states[b], there)

    def first(self, index: int, entering: torch.Tensor) -> torch.Tensor:
        """What leaves decoder layer `index` where hidden states like the first batch's enter it."""
        with self._parts.loaded(index) as there:
            return self._through(index, 0, entering, there)

    def _through(self, index: int, b: int, entering: torch.Tensor, there: torch.device | None) -> torch.Tensor:
        return self._calls[b][index](self._parts.layers[index], entering, there)

    def loaded(self, index: int) -> AbstractContextManager[torch.device | None]:
        """Decoder layer `index` with its weights in place, also under offload."""
        return self._parts.loaded(index)

    def look(self, index: int, watch: Callable[[Batch], None]) -> None:
        """As `advance` without a plan, but the batches stay where they are."""
        before = list(self.states)
        self.advance(index, watch)
        self.states = before
