"""Batches through a model: layer by layer, starting where a plan parts from earlier ones, or whole, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.evaluation.batches import Batch
from moeopt.evaluation.prefixes import PrefixCache
from moeopt.models import Layerwise, moe_layers, plan_in_force
from moeopt.models.layerwise import Call, input_device
from moeopt.models.merging import identity
from moeopt.models.patch import PREFIX
from moeopt.plan import LayerPlan, Plan

LogitsOf = Callable[[slice], Tensor]
"""Logits (cells, vocabulary) of a slice of a batch's cells."""

Active = Callable[[], tuple[float, ...]]
"""Experts that a token has run in each MoE layer, the mean over what ran under the plan in force."""

TRAILS = 4
"""The states of so many plans shall fit into the prefix memory; where they do not, those of fewer layers are kept."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a model gave for the batches of one rung.

    Args:
        outputs: every batch with the logits of its cells; to be gone through once.
        layer_tokens: what it cost.
        keep: to be called when the outputs proved finite.
        active: experts run per token and MoE layer, a mean over padding, too; to be called after the outputs.
        trail: names the plan among those whose states are kept.
    """

    outputs: Generator[tuple[Batch, LogitsOf], None, None]
    layer_tokens: int
    keep: Callable[[], None]
    active: Callable[[], float]
    trail: bytes = b""


class Whole:
    """The model's own forward, batch after batch.

    Args:
        model: any causal language model.
        layers: how many decoder layers it has.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.model, self.layers = model, layers
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, rung: int, batches: Sequence[Batch], active: Active = tuple) -> Run:
        """The batches of a rung."""
        tokens = sum(batch.tokens for batch in batches)
        outputs = ((batch, self._logits_of(batch)) for batch in batches)
        return Run(outputs, tokens * self.layers, lambda: None, lambda: _mean(active()))

    def _logits_of(self, batch: Batch) -> LogitsOf:
        width = batch.ids.shape[1]
        # An integer, not a tensor of positions: a tensor would have to be on the device of the last layer.
        last = width - int((batch.cells % width).min())
        options = {"logits_to_keep": last} if self._keeps_logits else {}
        inputs = batch.inputs(input_device(self.model), hidden_dtype(self.model))
        logits: Tensor = self.model(**inputs, use_cache=False, **options).logits
        rows, columns = batch.cells // width, batch.cells % width - (width - logits.shape[1])
        return lambda part: logits[rows[part].to(logits.device), columns[part].to(logits.device)]

    def judge(self, trail: bytes, loss: float) -> None:
        """Nothing is kept that a loss could matter to."""

    def clear(self) -> None:
        """Nothing to free."""


class LayerMajor:
    """All batches through a layer, then the next; hidden states of earlier plans are reused.

    Args:
        parts: the model in parts.
        memory: bytes for the hidden states of earlier plans.
        device: where they are kept; None: where they were computed.
    """

    def __init__(self, parts: Layerwise, memory: int, device: str | None) -> None:
        self.parts, self.layers = parts, len(parts.layers)
        self.prefixes = PrefixCache(memory, device)
        self._begun: dict[int, list[tuple[Tensor, list[Call]]]] = {}
        self._salt: object = None
        # an exported checkpoint's router may pick more experts than the layer has
        picks = [(layer.n, min(layer.n, layer.k)) for layer in moe_layers(parts.model)]
        self._unpatched = Plan(tuple(LayerPlan(n, k, kept=tuple(range(n))) for n, k in picks))

    def run(self, rung: int, batches: Sequence[Batch], active: Active = tuple) -> Run:
        """The batches of a rung under the plan in force."""
        salt = state_of(self.parts.model)
        if salt != self._salt:
            self.clear()
            self._salt = salt
        digests = (plan_in_force(self.parts.model) or self._unpatched).prefixes()
        before = [sum(place < i for place in self.parts.moe) for i in range(self.layers)]
        keys = [(rung, i, digests[before[i]]) for i in range(self.layers)]
        trail = digests[-1]
        if rung not in self._begun:
            device, dtype = input_device(self.parts.model), hidden_dtype(self.parts.model)
            self._begun[rung] = [self.parts.begin(batch.inputs(device, dtype)) for batch in batches]
        begun = self._begun[rung]
        start, states, reused = self.prefixes.longest(reversed(keys[1:])) or (0, [hidden for hidden, _ in begun], ())
        states = list(states)
        # Where the states of TRAILS plans between all layers do not fit, those of every so many layers are kept.
        every = max(1, -(-TRAILS * self.layers * self._bytes_a_layer() // max(1, self.prefixes.budget)))
        passed: list[tuple[Any, list[Tensor]]] = []
        with closing(self.parts.in_turn(start)) as layers:
            for i, there in layers:
                if i > start and i % every == 0 and self.prefixes.budget:
                    passed.append((keys[i], self.prefixes.placed(states)))
                entering = self.prefixes.arriving(states, there) if i == start else iter(states)
                for b, ((_, calls), hidden) in enumerate(zip(begun, entering)):
                    states[b] = calls[i](self.parts.layers[i], hidden, there)
        active_by_layer = (*reused, *active()[len(reused) :])

        def keep() -> None:
            self.prefixes.share(trail, keys[: start + 1])
            for key, entering in passed:
                self.prefixes.keep(trail, key, entering, active_by_layer[: before[key[1]]])

        def outputs() -> Generator[tuple[Batch, LogitsOf], None, None]:
            with self.parts.head_loaded():
                for batch, hidden in zip(batches, states):
                    yield batch, self._logits_of(batch, hidden)

        layer_tokens = sum(batch.tokens for batch in batches) * (self.layers - start)
        return Run(outputs(), layer_tokens, keep, lambda: _mean(active_by_layer), trail)

    def _logits_of(self, batch: Batch, hidden: Tensor) -> LogitsOf:
        scored = hidden.flatten(0, 1)[batch.cells.to(hidden.device)]
        return lambda part: self.parts.head(scored[part])

    def _bytes_a_layer(self) -> int:
        return sum(hidden.nbytes for rung in self._begun.values() for hidden, _ in rung)

    def judge(self, trail: bytes, loss: float) -> None:
        """Say how good a plan turned out on all examples; the states of the best one are the last to go."""
        self.prefixes.judge(trail, loss)

    def clear(self) -> None:
        """Free all hidden states."""
        self.prefixes.clear()
        self._begun.clear()


def hidden_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the hidden states."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
    return dtype


def _mean(active: Sequence[float]) -> float:
    return sum(active) / len(active)


def state_of(model: nn.Module) -> object:
    """Compares unequal after weights were written or replaced, or attention or experts implemented otherwise."""
    config: Any = model.config
    backends = [str(getattr(config, f"_{kind}_implementation", None)) for kind in ("attn", "experts")]
    tensors = model.state_dict(keep_vars=True).values()
    return [name.removeprefix(PREFIX) for name in backends], model.dtype, [identity(t) for t in tensors]
