"""Apply a plan to a model reversibly: hooks on the routers, and an experts implementation that sees merged experts,
runs none that a token skips, and has novices in place of others."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeopt.errors import ModelError, PlanError
from moeopt.models.balancing import BalancedLoss
from moeopt.models.layers import MoELayer, is_offloaded, is_quantised, is_transposed, moe_layers
from moeopt.models.merging import DOWN, MergedCache, Scratch, merged_view
from moeopt.models.routing import MappedRouter, RoutingRule, learn_rule, probe_tokens
from moeopt.plan import LayerPlan, Plan

Storage = Literal["auto", "resident", "scratch"]
PREFIX = "moeopt-"

Forward = Callable[..., Tensor]
"""An experts module or a view of it, hidden states, expert numbers and weights -> hidden states."""
Run = Callable[[Forward, nn.Module, Tensor, Tensor, Tensor], Tensor]
"""What a plan makes of a forward: called with that forward and its arguments."""


@dataclass(frozen=True)
class Patched:
    """What `patched` yields.

    Args:
        plan: the plan in force.
        layers: the model's MoE layers.
    """

    plan: Plan
    layers: tuple[MoELayer, ...]
    _routers: Mapping[int, MappedRouter] = field(repr=False)

    @property
    def zero_tokens(self) -> tuple[int, ...]:
        """For each layer, the tokens so far whose k largest mapped probabilities were clamped to 0.

        Such a token gets nothing from the layer's experts. Padding counts like any token.
        """
        return tuple(self._routers[i].zero_tokens if i in self._routers else 0 for i in range(len(self.layers)))

    @property
    def active(self) -> tuple[float, ...]:
        """For each layer, the mean number of experts that a token has run so far: k, or less with skipping or novices.

        Padding counts like any token.
        """
        return tuple(self._routers[x.index].active if x.index in self._routers else float(x.k) for x in self.layers)


@contextmanager
def patched(
    model: nn.Module, plan: Plan, *, storage: Storage = "auto", cache: MergedCache | None = None
) -> Iterator[Patched]:
    """While the context is open, `model` computes what `plan` says; its parameters and state_dict stay as they are.

    The first use on a model checks, on random hidden states, that every router follows a known rule and that patching
    with the identity plan changes no bit. Contexts may be nested: the inner plan replaces the outer one, which is back
    afterwards. Works under accelerate's cpu and disk offload, with generation, padding and `output_router_logits`,
    whose width stays n; the auxiliary loss is that of the plan's experts (`BalancedLoss`).

    Args:
        model: a transformers model with MoE layers.
        plan: one layer plan for each of its MoE layers.
        storage: where merged experts live. ``"resident"``: computed when a layer first runs and kept until the context
            closes (or in `cache`). ``"scratch"``: computed at every forward in memory shared by all layers. ``"auto"``:
            scratch for layers whose experts are offloaded, resident for the others.
        cache: merged experts to reuse and to leave for a later `patched`.

    Raises:
        PlanError: when the plan does not fit the model.
        ModelError: when the model has no MoE layers, routes by an unknown rule, or cannot merge or skip its experts.
    """
    if storage not in ("auto", "resident", "scratch"):
        raise ModelError(f"storage must be 'auto', 'resident' or 'scratch', got {storage!r}")
    with _suspended(model) as stack:
        attachment = _attach(model)
        _check_plan(plan, attachment.layers)
        patch = _patch_for(model, plan, attachment, storage, MergedCache() if cache is None else cache)
        stack.append(patch)
        try:
            patch.attach()
            yield Patched(plan, attachment.layers, patch.routers)
        finally:
            patch.detach()
            stack.remove(patch)


def plan_in_force(model: nn.Module) -> Plan | None:
    """The plan of the innermost `patched` that is open on `model`, if any."""
    stack = _ACTIVE.get(model)
    return stack[-1].plan if stack else None


@contextmanager
def without_plan(model: nn.Module) -> Iterator[None]:
    """While the context is open, no plan is in force; afterwards the one that was is so again."""
    with _suspended(model) as stack:
        nothing = _Patch((), {}, {})
        stack.append(nothing)
        try:
            yield
        finally:
            stack.remove(nothing)


@contextmanager
def experts_run_by(model: nn.Module, run: Callable[[MoELayer], Run]) -> Iterator[bool]:
    """While the context is open, `run(layer)` computes what each layer's experts give, with no plan in force.

    Yields whether it does: where experts do not dispatch through transformers' experts interface, they run as ever.

    Raises:
        ModelError: as `patched`.
    """
    with _suspended(model) as stack:
        layers = _attach(model).layers
        if not all(_dispatches(layer) for layer in layers):
            yield False
            return
        patch = _Patch(layers, {}, {layer.index: run(layer) for layer in layers})
        stack.append(patch)
        try:
            patch.attach()
            yield True
        finally:
            patch.detach()
            stack.remove(patch)


def routing_rules(model: nn.Module) -> tuple[RoutingRule, ...]:
    """The routing rule of each MoE layer of `model`, learnt by probing.

    Raises:
        ModelError: as `patched`.
    """
    with _suspended(model):
        return _attach(model).rules


def check_makes(model: nn.Module) -> None:
    """Raise ModelError unless every layer of `model` takes experts with down projections of a plan's own."""
    with _suspended(model):
        attachment = _attach(model)
        for layer in attachment.layers:
            if is_quantised(model, layer):
                raise ModelError(
                    f"{layer.name}: the experts are quantised and cannot be refitted; load them unquantised"
                )
            _check_merging(model, attachment, layer)
            _down_of(layer)


@dataclass(eq=False)
class _Patch:
    """Everything that a plan hangs on a model; can be attached and detached any number of times."""

    layers: tuple[MoELayer, ...]
    routers: Mapping[int, MappedRouter]
    experts: Mapping[int, Run]
    plan: Plan | None = None
    balancing: tuple[nn.Module, BalancedLoss] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    implementations: list[tuple[Any, str | None]] = field(default_factory=list)

    def attach(self) -> None:
        self.detach()
        for i, hook in self.routers.items():
            self.handles.append(self.layers[i].router.register_forward_hook(hook, with_kwargs=True))
        if self.balancing is not None:
            model, loss = self.balancing
            self.handles.append(model.register_forward_hook(loss, with_kwargs=True))
        for i, run in self.experts.items():
            experts = self.layers[i].experts
            _RUN[experts] = run
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


@dataclass(frozen=True, eq=False)
class _Attachment:
    """What is known of a model under one experts implementation once its self-checks passed."""

    layers: tuple[MoELayer, ...]
    rules: tuple[RoutingRule, ...]
    merging_checked: set[object] = field(default_factory=set)


_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[_Patch]] = weakref.WeakKeyDictionary()
_RUN: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[object, _Attachment]] = weakref.WeakKeyDictionary()


@contextmanager
def _suspended(model: nn.Module) -> Iterator[list[_Patch]]:
    """The stack of patches of a model; the top one is off inside, and whichever is the top afterwards is on."""
    stack = _ACTIVE.setdefault(model, [])
    if stack:
        stack[-1].detach()
    try:
        yield stack
    finally:
        if stack:
            stack[-1].attach()


def _implementation(backend: str | None) -> str:
    """Name of a registered experts implementation: `backend`, as the plan in force for a module wants it run."""
    name = f"{PREFIX}{backend}"

    def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if backend in (None, "eager"):
            return type(module).forward.__wrapped__(module, *args, **kwargs)  # type: ignore[attr-defined, no-any-return]
        return ALL_EXPERTS_FUNCTIONS[backend](module, *args, **kwargs)  # type: ignore[no-any-return]

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        run = _RUN.get(module)
        return stock(module, *args, **kwargs) if run is None else run(stock, module, *args, **kwargs)

    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, forward)
    return name


def _check_plan(plan: Plan, layers: tuple[MoELayer, ...]) -> None:
    if len(plan.layers) != len(layers):
        raise PlanError(f"the plan is for {len(plan.layers)} MoE layers, the model has {len(layers)}")
    for layer, part in zip(layers, plan.layers):
        if part.experts != layer.n:
            raise PlanError(
                f"layer {layer.index} of the plan is for {part.experts} experts, {layer.name} has {layer.n}"
            )


def _patch_for(model: nn.Module, plan: Plan, attachment: _Attachment, storage: Storage, cache: MergedCache) -> _Patch:
    scratch = Scratch()
    routers: dict[int, MappedRouter] = {}
    experts: dict[int, Run] = {}
    for layer, rule, part in zip(attachment.layers, attachment.rules, plan.layers):
        if part.is_identity and part.k == layer.k:
            continue
        routers[layer.index] = MappedRouter(layer, rule, part)
        if part.makes_experts:
            _check_merging(model, attachment, layer)
            _check_down(layer, part)
            if not part.sums_experts:
                _check_mixing(attachment, layer, part)
            keep = storage == "resident" or (storage == "auto" and not is_offloaded(layer.experts))
            experts[layer.index] = _merging(cache if keep else scratch, part)
        if part.novices is not None:
            _check_dispatch(layer, "replaced by novices")
            _check_novices(layer, part)
            experts[layer.index] = _with_novices(experts.get(layer.index), part)
        elif part.skip:
            _check_dispatch(layer, "skipped")
            experts[layer.index] = _skipping(experts.get(layer.index))
    balancing = (model, BalancedLoss(model, plan, attachment.rules)) if routers else None
    return _Patch(attachment.layers, routers, experts, plan, balancing)


def _merging(store: MergedCache | Scratch, part: LayerPlan) -> Run:
    """Run on the experts that the plan makes."""

    def run(forward: Forward, experts: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return forward(merged_view(experts, store.tensors(experts, part), part.experts), *args, **kwargs)

    return run


def _skipping(inner: Run | None) -> Run:
    """Run only the experts whose weight is not 0."""

    def run(
        forward: Forward, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        def stock(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if inner is None:
                return forward(experts, hidden, index, weights)
            return inner(forward, experts, hidden, index, weights)

        active = top_k_weights != 0
        token, place = active.nonzero(as_tuple=True)
        if len(token) == active.numel():
            return stock(hidden_states, top_k_index, top_k_weights)
        outputs = hidden_states.new_zeros(*active.shape, hidden_states.shape[-1])
        if len(token):
            pairs = top_k_index[token, place][:, None], top_k_weights[token, place][:, None]
            outputs[token, place] = stock(hidden_states[token], *pairs)
        return outputs.sum(1)

    return run


def _with_novices(inner: Run | None, part: LayerPlan) -> Run:
    """Run only the experts that the plan keeps and whose weight is not 0; novices are added, weighted, in float32."""
    assert part.places is not None
    # experts that are made have the numbers of their places already
    places = torch.arange(part.experts) if part.makes_experts else torch.tensor(part.places)
    novices = torch.from_numpy(np.array(part.novices))
    tensors = {"places": places, "novices": novices}
    kept_alone = _skipping(inner)

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


def _attach(model: nn.Module) -> _Attachment:
    """Learn and check a model; remembered for as long as it keeps its modules and experts implementation."""
    known = _ATTACHED.setdefault(model, {})
    for backends, attachment in known.items():
        modules = dict(model.named_modules())
        same = all(modules.get(layer.name) is layer.block for layer in attachment.layers)
        if same and backends == _backends(attachment.layers):
            return attachment
    layers = moe_layers(model)
    rules: list[RoutingRule] = []
    for layer in layers:
        rules.append(learn_rule(layer, rules[-1] if rules else None))
    for layer in {_kind(layer): layer for layer in reversed(layers)}.values():
        _check_identity(layers, layer, rules[layer.index])
    known[_backends(layers)] = attachment = _Attachment(layers, tuple(rules))
    return attachment


def _backends(layers: tuple[MoELayer, ...]) -> object:
    return tuple(getattr(getattr(x.experts, "config", None), "_experts_implementation", None) for x in layers)


def _kind(layer: MoELayer) -> tuple[object, ...]:
    return type(layer.block), layer.n, layer.dtype


def _check_identity(layers: tuple[MoELayer, ...], layer: MoELayer, rule: RoutingRule) -> None:
    """The block, with its router recomputed by the rule, must give the same bits as without."""
    everything = LayerPlan(layer.n, layer.k, kept=tuple(range(layer.n)))
    hook = MappedRouter(layer, rule, everything)
    expected, got = _run(layer), _run(layer, _Patch(layers, {layer.index: hook}, {}))
    if not hook.calls:
        raise ModelError(f"{layer.name}: {type(layer.block).__name__} does not call its router as a module")
    if not _same(expected, got):
        raise ModelError(
            f"{layer.name}: patching {type(layer.block).__name__} with the identity plan changes its output"
        )


def _check_merging(model: nn.Module, attachment: _Attachment, layer: MoELayer) -> None:
    """One expert given by w_em must compute, bit for bit, what the same expert computes when merely kept."""
    if is_quantised(model, layer):
        raise ModelError(
            f"{layer.name}: the experts are quantised and cannot be merged; keep experts instead (a one-hot plan), "
            "or load the model unquantised"
        )
    _check_dispatch(layer, "merged")
    if _kind(layer) in attachment.merging_checked:
        return
    last = (layer.n - 1,)
    plan, rule = LayerPlan(layer.n, 1, kept=last), attachment.rules[layer.index]
    kept = _Patch(attachment.layers, {layer.index: MappedRouter(layer, rule, plan)}, {})
    merging = _merging(Scratch(), plan)
    routers = {layer.index: MappedRouter(layer, rule, plan, renumber=False)}
    merged = _Patch(attachment.layers, routers, {layer.index: merging})
    if not _same(_run(layer, kept), _run(layer, merged)):
        raise ModelError(
            f"{layer.name}: {type(layer.experts).__name__} gives other results on a merged copy of an expert"
        )
    attachment.merging_checked.add(_kind(layer))


def _check_down(layer: MoELayer, part: LayerPlan) -> None:
    """Down projections of a plan must be of the layer's form."""
    if part.down is None:
        return
    tensor = _down_of(layer)
    sizes = tuple(tensor.shape[:0:-1] if is_transposed(layer.experts) else tensor.shape[1:])
    if part.down.shape[1:] != sizes:
        raise PlanError(
            f"layer {layer.index} of the plan has down projections of shape (hidden, inner) = {part.down.shape[1:]}, "
            f"those of {layer.name} are {sizes}"
        )


def _check_mixing(attachment: _Attachment, layer: MoELayer, part: LayerPlan) -> None:
    """Orders of neurons must be of the layer's form, and an expert in another order must give the same but rounding."""
    sizes = _down_of(layer).shape
    inner = sizes[1 if is_transposed(layer.experts) else 2]
    if part.neurons is not None and part.neurons.shape[1] != inner:
        raise PlanError(
            f"layer {layer.index} of the plan orders {part.neurons.shape[1]} neurons, experts of {layer.name} "
            f"have {inner}"
        )
    if ("orders", _kind(layer)) in attachment.merging_checked:
        return
    twice = np.zeros((1, layer.n), dtype=np.float32)
    twice[0, -1] = 2  # not one-hot, as one that is kept has no order; of the sum's weight it is the whole
    reverse = np.tile(np.arange(inner, dtype=np.int32)[::-1], (layer.n, 1))
    rule, w_rm = attachment.rules[layer.index], (twice > 0).astype(np.float32)
    results = []
    for orders in (None, reverse):
        plan = LayerPlan(layer.n, 1, w_em=twice, w_rm=w_rm, merge="slerp", neurons=orders)
        routers = {layer.index: MappedRouter(layer, rule, plan, renumber=False)}
        results.append(_run(layer, _Patch(attachment.layers, routers, {layer.index: _merging(Scratch(), plan)})))
    for straight, reversed_ in zip(*results):
        near = 5e-2 if straight.dtype.itemsize == 2 else 1e-3
        if float((straight - reversed_).float().norm()) > near * float(straight.float().norm()):
            raise ModelError(
                f"{layer.name}: {type(layer.experts).__name__} gives other results with its neurons in another order"
            )
    attachment.merging_checked.add(("orders", _kind(layer)))


def _check_novices(layer: MoELayer, part: LayerPlan) -> None:
    """Novices of a plan must be as wide as what the layer's experts give."""
    assert part.novices is not None
    if part.novices.shape[1] != layer.hidden:
        raise PlanError(
            f"layer {layer.index} of the plan has novices of {part.novices.shape[1]} numbers, the hidden states of "
            f"{layer.name} have {layer.hidden}"
        )


def _down_of(layer: MoELayer) -> Tensor:
    tensor: Tensor | None = getattr(layer.experts, DOWN, None)
    if tensor is None:
        raise ModelError(f"{layer.name}: {type(layer.experts).__name__} has no {DOWN}, so that none can be fitted")
    return tensor


def _dispatches(layer: MoELayer) -> bool:
    config = getattr(layer.experts, "config", None)
    return hasattr(config, "_experts_implementation") and hasattr(type(layer.experts).forward, "__wrapped__")


def _check_dispatch(layer: MoELayer, what: str) -> None:
    if not _dispatches(layer):
        raise ModelError(
            f"{layer.name}: {type(layer.experts).__name__} does not dispatch through transformers' experts interface, "
            f"so its experts cannot be {what}; keep experts instead (a one-hot plan)"
        )


def _run(layer: MoELayer, patch: _Patch | None = None) -> list[Tensor]:
    """The tensors that a layer's block returns for a few random hidden states, (1, 8, hidden)."""
    try:
        if patch is not None:
            patch.attach()
        with torch.no_grad():
            output = layer.block(probe_tokens(layer, 8)[None])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{layer.name}: {type(layer.block).__name__} fails on random hidden states ({reason})"
        ) from error
    finally:
        if patch is not None:
            patch.detach()
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))
