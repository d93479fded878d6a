"""What a plan hangs on a model: hooks on the routers, and an experts implementation that sees merged experts, runs none
that a token skips, and has novices in place of others."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeopt.models.balancing import BalancedLoss
from moeopt.models.devices import is_accelerator
from moeopt.models.layers import MoELayer
from moeopt.models.merging import MergedCache, merged_view
from moeopt.models.routing import MappedRouter
from moeopt.plan import LayerPlan, Plan

PREFIX = "moeopt-"

Forward = Callable[..., Tensor]
"""An experts module or a view of it, hidden states, expert numbers and weights -> hidden states."""
Run = Callable[[Forward, nn.Module, Tensor, Tensor, Tensor], Tensor]
"""What a plan makes of a forward: called with that forward and its arguments."""

_RUN: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
"""What the plan in force makes of each experts module."""


@dataclass(eq=False)
class Patch:
    """Everything that a plan hangs on a model; can be attached and detached any number of times."""

    layers: tuple[MoELayer, ...]
    routers: Mapping[int, MappedRouter]
    experts: Mapping[int, Run]
    plan: Plan | None = None
    balancing: tuple[nn.Module, BalancedLoss] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    implementations: list[tuple[Any, str | None]] = field(default_factory=list)
    forwards: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def attach(self) -> None:
        self.detach()
        for i, hook in self.routers.items():
            self.handles += hook.attach(self.layers[i].router)
        if self.balancing is not None:
            model, loss = self.balancing
            self.handles.append(model.register_forward_hook(loss, with_kwargs=True))
        for i, run in self.experts.items():
            experts = self.layers[i].experts
            _RUN[experts] = run
            if not dispatches(self.layers[i]):
                self._replace_forward(experts)
                continue
            # transformers looks the implementation up by the config's name at every call of an experts module, so that
            # another name there reaches it without a hook, under offload and generation too. All layers share the
            # config: it is set once, and `_RUN` tells the layers apart.
            config: Any = experts.config
            backend = config._experts_implementation
            if not str(backend).startswith(PREFIX):
                self.implementations.append((config, backend))
                config._experts_implementation = {"": _implementation(backend)}  # "": not its sub-configs

    def detach(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        for i in self.experts:
            _RUN.pop(self.layers[i].experts, None)
        while self.implementations:
            config, backend = self.implementations.pop()
            config._experts_implementation = {"": backend}
        while self.forwards:
            experts, place, before = self.forwards.pop()
            if before is None:
                delattr(experts, place)
            else:
                setattr(experts, place, before)

    def _replace_forward(self, experts: nn.Module) -> None:
        """Of a class that does not dispatch, on the instance; under accelerate the forward that its hook wraps."""
        place = "_old_forward" if "_old_forward" in vars(experts) else "forward"
        self.forwards.append((experts, place, vars(experts).get(place)))

        def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]

        setattr(experts, place, lambda *args, **kwargs: _RUN[experts](stock, experts, *args, **kwargs))


def _implementation(backend: str | None) -> str:
    """Name of a registered experts implementation: `backend`, as the plan in force for a module wants it run."""
    name = f"{PREFIX}{backend}"

    def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if backend in (None, "eager"):  # the class's forward is the dispatcher, what it wraps the loop over experts
            return type(module).forward.__wrapped__(module, *args, **kwargs)  # type: ignore[attr-defined, no-any-return]
        return ALL_EXPERTS_FUNCTIONS[backend](module, *args, **kwargs)  # type: ignore[no-any-return]

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        run = _RUN.get(module)
        return stock(module, *args, **kwargs) if run is None else run(stock, module, *args, **kwargs)

    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, forward)
    return name


def dispatches(layer: MoELayer) -> bool:
    """Whether the experts run by transformers' experts interface, which what a plan makes of them hooks into."""
    config = getattr(layer.experts, "config", None)
    return hasattr(config, "_experts_implementation") and hasattr(type(layer.experts).forward, "__wrapped__")


def takes_picks(layer: MoELayer) -> bool:
    """Whether the experts are called with hidden states, expert numbers and weights, and run by them alone."""
    return dispatches(layer) or len(inspect.signature(type(layer.experts).forward).parameters) == 4


def merging(store: MergedCache, part: LayerPlan) -> Run:
    """Run on the experts that the plan makes."""

    def run(forward: Forward, experts: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return forward(merged_view(experts, store.tensors(experts, part), part.experts), *args, **kwargs)

    return run


def as_they_are(forward: Forward, experts: nn.Module, *args: Tensor) -> Tensor:
    """Run the experts of the module."""
    return forward(experts, *args)


WITHOUT_WAITING = ("grouped_mm", "batched_mm")
"""Experts implementations of transformers that never ask the device for a number."""


def skipping(inner: Run = as_they_are) -> Run:
    """Run only the experts whose weight is not 0."""

    def run(
        forward: Forward, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        if is_accelerator(hidden_states.device) and _leaves_out(experts):
            # How many pairs of token and expert run is known to the device alone: asking would make it wait in every
            # layer. A number beyond the last expert's is left out by the kernels themselves.
            index = top_k_index.masked_fill(top_k_weights == 0, experts.num_experts)  # type: ignore[arg-type]
            return inner(partial(_leaving_out, forward), experts, hidden_states, index, top_k_weights)
        active = top_k_weights != 0
        token, place = active.nonzero(as_tuple=True)
        if len(token) == active.numel():
            return inner(forward, experts, hidden_states, top_k_index, top_k_weights)
        # every pair of a token and an expert that it runs as a token of its own that runs one expert
        outputs = hidden_states.new_zeros(*active.shape, hidden_states.shape[-1])
        if len(token):
            pairs = top_k_index[token, place][:, None], top_k_weights[token, place][:, None]
            outputs[token, place] = inner(forward, experts, hidden_states[token], *pairs)
        return outputs.sum(1)

    return run


def _leaves_out(experts: nn.Module) -> bool:
    config: Any = getattr(experts, "config", None)
    backend = str(getattr(config, "_experts_implementation", None)).removeprefix(PREFIX)
    by_interface = hasattr(type(experts).forward, "__wrapped__")  # else the config's word is not theirs
    return by_interface and backend in WITHOUT_WAITING and hasattr(experts, "_is_expert_parallel")


def _leaving_out(forward: Forward, experts: nn.Module, *args: Tensor) -> Tensor:
    """Run as one of several devices that share the experts does, where numbers beyond its last are another one's."""
    view = object.__new__(type(experts))
    vars(view).update({**vars(experts), "_is_expert_parallel": True})
    vars(view).pop("forward", None)  # accelerate's, bound to the original
    return forward(view, *args)


def with_novices(inner: Run, part: LayerPlan) -> Run:
    """Run only the experts that the plan keeps and whose weight is not 0; novices are added, weighted, in float32."""
    assert part.places is not None
    # experts that are made have the numbers of their places already
    places = torch.arange(part.experts) if part.makes_experts else torch.tensor(part.places)
    novices = torch.from_numpy(np.array(part.novices))
    tensors = {"places": places, "novices": novices}
    kept_alone = skipping(inner)

    def run(
        forward: Forward, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        device = hidden_states.device
        tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})
        place = tensors["places"][top_k_index]
        kept = top_k_weights.masked_fill(place >= part.kept_experts, 0.0)
        given = kept_alone(forward, experts, hidden_states, top_k_index, kept)
        weights = torch.zeros(len(place), part.experts, dtype=torch.float32, device=device)
        weights = weights.scatter_(1, place, top_k_weights.float())
        return (given.float() + weights[:, part.kept_experts :] @ tensors["novices"]).to(given.dtype)

    return run
