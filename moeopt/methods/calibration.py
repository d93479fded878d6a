"""Calibration: a model run over token sequences, showing what each MoE layer sees of each batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeopt.errors import MethodError, ModelError
from moeopt.evaluation.batches import grouped
from moeopt.models import (
    MoELayer,
    RoutingRule,
    evaluation_mode,
    experts_run_by,
    layerwise,
    materialised,
    moe_layers,
    patched,
    routing_rules,
    without_plan,
)
from moeopt.models.layers import is_offloaded
from moeopt.models.layerwise import input_device
from moeopt.plan import ModelShape, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.tasks import Task


TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Seen:
    """What one MoE layer saw of one batch; padding is left out.

    Args:
        layer, rule: the layer and how it routes.
        hidden: hidden states that enter its experts, (tokens, hidden).
        logits: its router's, (tokens, n).
        gates, index: weights and numbers of the k experts it picks, (tokens, k).
        routed: what its experts gave, weighted and summed, (tokens, hidden).
        sequence: which sequence each token belongs to, int64 (tokens,).
        every: `outputs`, where they are known already.
        target: what the routed experts should have given, (tokens, hidden), where that is not `routed`.
    """

    layer: MoELayer
    rule: RoutingRule
    hidden: Tensor
    logits: Tensor
    gates: Tensor
    index: Tensor
    routed: Tensor
    sequence: Tensor
    every: Tensor | None = None
    target: Tensor | None = None

    @cached_property
    def probabilities(self) -> Tensor:
        """The router's scores of all n experts, float32 (tokens, n)."""
        return self.rule.scores(self.logits).float()

    @cached_property
    def picks(self) -> tuple[Tensor, Tensor]:
        """Gates g, float32, summing to 1 per token, largest first, and numbers of the experts picked: (tokens, k)."""
        top, order = self.probabilities.gather(1, self.index).sort(dim=-1, descending=True)
        return top / top.sum(-1, keepdim=True).clamp_min(TINY), self.index.gather(1, order)

    def chosen(self, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Which experts would run, and with what weights, if the layer had none but those kept, with their logits.

        Args:
            kept: sets of experts, bool (sets, n).
            k: how many of them run.

        Returns:
            Numbers, int64, and weights, float32, both (tokens, sets, k).
        """
        p = self.probabilities[:, None, :].masked_fill(~kept, 0.0)
        if self.rule.score != "sigmoid":
            p = p / p.sum(-1, keepdim=True).clamp_min(TINY)
        choice = p if self.correction is None else p + self.correction
        index = choice.masked_fill(~kept, -torch.inf).topk(k, dim=-1).indices
        return index, self.gated(p.gather(-1, index))

    def gated(self, scores: Tensor) -> Tensor:
        """The weights that the layer makes of the scores of the experts that run, (..., k)."""
        if self.rule.normalised:
            scores = scores / (scores.sum(-1, keepdim=True) + self.rule.epsilon).clamp_min(TINY)
        return scores * self.rule.scale

    @property
    def depends_on_set(self) -> bool:
        """Whether what is kept changes the weights, or the order of choice, of experts that run in any case."""
        return self.rule.score != "sigmoid" and (self.correction is not None or not self.rule.normalised)

    @cached_property
    def full_weights(self) -> Tensor:
        """Weights of the layer as it is, float32 (tokens, n), 0 for experts that do not run."""
        everything = torch.ones(1, self.layer.n, dtype=torch.bool, device=self.logits.device)
        index, weights = self.chosen(everything, self.layer.k)
        return torch.zeros_like(self.probabilities).scatter(-1, index[:, 0], weights[:, 0])

    @cached_property
    def correction(self) -> Tensor | None:
        """What the router adds to its scores for the choice of experts only, (n,)."""
        name = self.rule.correction
        return None if name is None else materialised(self.layer.router, name).reshape(-1).to(self.logits.device)

    @cached_property
    def outputs(self) -> Tensor:
        """Every expert's output without its gate, for every token: (n, tokens, hidden), in the model's dtype."""
        if self.every is not None:
            return self.every
        return torch.stack([self._output(j, slice(None)) for j in range(self.layer.n)])

    def without_states(self) -> Seen:
        """The same without hidden states: what routing needs."""
        nothing = self.hidden.new_empty(0, self.hidden.shape[1])  # not a view, which would hold the whole
        return replace(self, hidden=nothing, routed=nothing, every=None, target=None)

    def output(self, expert: int, tokens: Tensor | slice) -> Tensor:
        """One expert's output without its gate, (tokens, hidden)."""
        known = self.every is not None or "outputs" in self.__dict__
        return self.outputs[expert][tokens] if known else self._output(expert, tokens)

    def _output(self, expert: int, tokens: Tensor | slice) -> Tensor:
        hidden = self.hidden[tokens]
        number = torch.full((len(hidden), 1), expert, device=hidden.device)
        found: Tensor = self.layer.experts(hidden, number, torch.ones_like(number, dtype=torch.float32))
        return found


@dataclass(frozen=True, eq=False)
class _Batch:
    """Right-padded sequences: ids and mask int64 (rows, width), numbers of the sequences int64 (rows,)."""

    ids: Tensor
    mask: Tensor
    numbers: Tensor

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        return {"input_ids": self.ids.to(device), "attention_mask": self.mask.to(device)}

    @cached_property
    def sequence(self) -> Tensor:
        """The sequence of every token that is not padding, (tokens,)."""
        return self.numbers[:, None].expand_as(self.mask)[self.mask.bool()]


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
    ) -> None:
        if batch_tokens < 1:
            raise MethodError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if max_length is None:
            max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.model, self.task = model, task
        with evaluation_mode(model), without_plan(model), torch.inference_mode():
            self.layers, self.rules = moe_layers(model), routing_rules(model)
        first = self.layers[0]
        self.shape = ModelShape(len(self.layers), first.n, first.k)
        requests = task.solutions(split, task.requests(split, tokenizer, limit=limit, max_length=max_length))
        sequences = [request.ids for request in requests]
        self.sequences, self.tokens = len(sequences), sum(map(len, sequences))
        self.batches = _packed(sequences, batch_tokens)

    @property
    def decoder_layers(self) -> int:
        """Decoder layers of the model, MoE or not."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def run(
        self,
        see: Callable[[Seen], None],
        *,
        plan: Plan | None = None,
        layer_by_layer: bool = False,
        all_outputs: bool = False,
    ) -> None:
        """One pass: `see` is called with what every MoE layer sees of every batch, under a plan if there is one.

        Args:
            see: called under inference mode, the layer's weights being at hand.
            plan: what is in force; None: the model as it is.
            layer_by_layer: all batches through a layer before the next one, so that `see` is done with a layer before
                it meets the next. Holds the hidden states of all tokens. It is done in any case, where it can be, when
                experts are offloaded, so that they are moved once.
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
            watch = stack.enter_context(self.watching(see, all_outputs=all_outputs))
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
    def watching(self, see: Callable[[Seen], None], *, all_outputs: bool = False) -> Iterator[Callable[[_Batch], None]]:
        """While it is open, `see` is told of every MoE layer that runs; the callable yielded says which batch does."""
        current: list[_Batch] = []

        def watch(batch: _Batch) -> None:
            current[:] = [batch]

        hooks = [_Hook(layer, rule, see, current) for layer, rule in zip(self.layers, self.rules)]
        with ExitStack() as stack:
            if all_outputs:
                stack.enter_context(experts_run_by(self.model, lambda layer: hooks[layer.index].run))
            for hook in hooks:
                layer = hook.layer
                notes = ((layer.router, hook.router), (layer.experts, hook.experts), (layer.block, hook.block))
                for module, note in notes:
                    stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            yield watch


class Stream:
    """The batches of a calibration on their way through a model, layer by layer.

    Attributes:
        depth: decoder layers.
        moe: for every MoE layer, the index of its decoder layer.

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
        self._states = [hidden for hidden, _ in begun]
        self._calls = [calls for _, calls in begun]

    def advance(self, index: int, watch: Callable[[_Batch], None], plan: Plan | None = None) -> None:
        """All batches through decoder layer `index`, under a plan if there is one; `watch` is told each batch."""
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(patched(self._model, plan))
            there = stack.enter_context(self._parts.loaded(index))
            for b, batch in enumerate(self._batches):
                watch(batch)
                self._states[b] = self._calls[b][index](self._parts.layers[index], self._states[b], there)

    def look(self, index: int, watch: Callable[[_Batch], None]) -> None:
        """As `advance` without a plan, but the batches stay where they are."""
        before = list(self._states)
        self.advance(index, watch)
        self._states = before


class _Hook:
    """Forward hooks of one MoE layer's router, experts and block that put together a `Seen`."""

    def __init__(self, layer: MoELayer, rule: RoutingRule, see: Callable[[Seen], None], current: list[_Batch]) -> None:
        self.layer, self.rule, self.see, self.current = layer, rule, see, current
        self.found: dict[str, Tensor] = {}
        self.busy = False

    def router(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        self.found |= {
            "hidden": hidden.reshape(-1, hidden.shape[-1]),
            "logits": output[0],
            "gates": output[1],
            "index": output[2],
        }

    def experts(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.busy:
            entered: Tensor = args[0] if args else kwargs["hidden_states"]
            self.found |= {
                "hidden": entered.reshape(-1, entered.shape[-1]),
                "routed": output.reshape(-1, output.shape[-1]),
            }

    def run(
        self, forward: Any, experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """What the experts give, made of every expert's output, which is kept."""
        if self.busy:
            given: Tensor = forward(experts, hidden_states, top_k_index, top_k_weights)
            return given
        ones = torch.ones(len(hidden_states), 1, device=hidden_states.device, dtype=top_k_weights.dtype)
        every = torch.stack(
            [forward(experts, hidden_states, torch.full_like(top_k_index[:, :1], j), ones) for j in range(self.layer.n)]
        )
        self.found["every"] = every
        tokens = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
        weighted = every[top_k_index, tokens].float() * top_k_weights[..., None].float()
        return weighted.sum(1).to(hidden_states.dtype)

    def block(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = self.current[0]
        found, self.found = self.found, {}
        every, real = found.pop("every", None), batch.mask.bool().flatten()
        if not real.all():
            found = {name: t[real.to(t.device)] for name, t in found.items()}
            every = None if every is None else every[:, real.to(every.device)]
        if not (found["routed"] if every is None else every).isfinite().all():
            raise MethodError(
                f"{self.layer.name}: what its experts give is not finite in {found['routed'].dtype}; load the model in "
                "another dtype, such as bfloat16 or float32"
            )
        self.busy = True
        try:
            self.see(Seen(self.layer, self.rule, sequence=batch.sequence, every=every, **found))
        finally:
            self.busy = False


def _packed(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[_Batch]:
    """Sequences of like lengths together, longest first."""
    batches = []
    for group in grouped(range(len(sequences)), lambda number: len(sequences[number]), batch_tokens):
        ids = torch.zeros(len(group), len(sequences[group[0]]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(group):
            ids[row, : len(sequences[number])] = torch.tensor(sequences[number])
            mask[row, : len(sequences[number])] = 1
        batches.append(_Batch(ids, mask, torch.tensor(group)))
    return batches
