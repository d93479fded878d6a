"""Apply a plan to a model reversibly: hooks on the routers, and an experts implementation that sees merged experts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeopt.errors import ModelError, PlanError
from moeopt.models.layers import MoELayer, is_offloaded, is_quantised, moe_layers
from moeopt.models.merging import MergedCache, Scratch, merged_view
from moeopt.models.routing import MappedRouter, RoutingRule, learn_rule, probe_tokens
from moeopt.plan import LayerPlan, Matrix, Plan, one_hot

Storage = Literal["auto", "resident", "scratch"]
PREFIX = "moeopt-"


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


@contextmanager
def patched(
    model: nn.Module, plan: Plan, *, storage: Storage = "auto", cache: MergedCache | None = None
) -> Iterator[Patched]:
    """While the context is open, `model` computes what `plan` says; its parameters and state_dict stay as they are.

    The first use on a model checks, on random hidden states, that every router follows a known rule and that patching
    with the identity plan changes no bit. Contexts may be nested: the inner plan replaces the outer one, which is back
    afterwards. Works under accelerate's cpu and disk offload, with generation, padding and `output_router_logits`,
    whose width stays n.

    Args:
        model: a transformers model with MoE layers.
        plan: one layer plan for each of its MoE layers.
        storage: where merged experts live. ``"resident"``: computed when a layer first runs and kept until the context
            closes (or in `cache`). ``"scratch"``: computed at every forward in memory shared by all layers. ``"auto"``:
            scratch for layers whose experts are offloaded, resident for the others.
        cache: merged experts to reuse and to leave for a later `patched`.

    Raises:
        PlanError: when the plan does not fit the model.
        ModelError: when the model has no MoE layers, routes by an unknown rule, or cannot merge its experts.
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
    with _suspended(model):
        yield


def routing_rules(model: nn.Module) -> tuple[RoutingRule, ...]:
    """The routing rule of each MoE layer of `model`, learnt by probing.

    Raises:
        ModelError: as `patched`.
    """
    with _suspended(model):
        return _attach(model).rules


@dataclass(eq=False)
class _Patch:
    """Everything that a plan hangs on a model; can be attached and detached any number of times."""

    layers: tuple[MoELayer, ...]
    routers: Mapping[int, MappedRouter]
    merged: Mapping[int, Callable[[nn.Module], Any]]
    plan: Plan | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    implementations: list[tuple[Any, str | None]] = field(default_factory=list)

    def attach(self) -> None:
        self.detach()
        for i, hook in self.routers.items():
            self.handles.append(self.layers[i].router.register_forward_hook(hook, with_kwargs=True))
        for i, view in self.merged.items():
            experts = self.layers[i].experts
            _MERGED[experts] = view
            config: Any = experts.config
            backend = config._experts_implementation
            if not str(backend).startswith(PREFIX):
                self.implementations.append((config, backend))
                config._experts_implementation = {"": _implementation(backend)}  # "": not its sub-configs

    def detach(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        for i in self.merged:
            _MERGED.pop(self.layers[i].experts, None)
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
_MERGED: weakref.WeakKeyDictionary[nn.Module, Callable[[nn.Module], Any]] = weakref.WeakKeyDictionary()
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
    """Name of a registered experts implementation: `backend`, on the merged view of the modules that have one."""
    name = f"{PREFIX}{backend}"

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        view = _MERGED.get(module)
        target = module if view is None else view(module)
        if backend in (None, "eager"):
            return type(module).forward.__wrapped__(target, *args, **kwargs)  # type: ignore[attr-defined, no-any-return]
        return ALL_EXPERTS_FUNCTIONS[backend](target, *args, **kwargs)  # type: ignore[no-any-return]

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
    merged: dict[int, Callable[[nn.Module], Any]] = {}
    for layer, rule, part in zip(attachment.layers, attachment.rules, plan.layers):
        if part.is_identity and part.k == layer.k:
            continue
        routers[layer.index] = MappedRouter(layer, rule, part)
        if part.w_em is not None:
            _check_merging(model, attachment, layer)
            keep = storage == "resident" or (storage == "auto" and not is_offloaded(layer.experts))
            merged[layer.index] = _viewer(cache if keep else scratch, part.w_em)
    return _Patch(attachment.layers, routers, merged, plan)


def _viewer(store: MergedCache | Scratch, w_em: Matrix) -> Callable[[nn.Module], Any]:
    return lambda experts: merged_view(experts, store.tensors(experts, w_em), w_em.shape[1])


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
    dispatches = hasattr(getattr(layer.experts, "config", None), "_experts_implementation")
    if not dispatches or not hasattr(type(layer.experts).forward, "__wrapped__"):
        raise ModelError(
            f"{layer.name}: {type(layer.experts).__name__} does not dispatch through transformers' experts interface, "
            "so its experts cannot be merged; keep experts instead (a one-hot plan)"
        )
    if _kind(layer) in attachment.merging_checked:
        return
    last = (layer.n - 1,)
    plan, rule = LayerPlan(layer.n, 1, kept=last), attachment.rules[layer.index]
    kept = _Patch(attachment.layers, {layer.index: MappedRouter(layer, rule, plan)}, {})
    viewer = _viewer(Scratch(), one_hot(last, layer.n))
    routers = {layer.index: MappedRouter(layer, rule, plan, renumber=False)}
    merged = _Patch(attachment.layers, routers, {layer.index: viewer})
    if not _same(_run(layer, kept), _run(layer, merged)):
        raise ModelError(
            f"{layer.name}: {type(layer.experts).__name__} gives other results on a merged copy of an expert"
        )
    attachment.merging_checked.add(_kind(layer))


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
