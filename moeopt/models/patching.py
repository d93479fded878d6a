"""Apply a plan to a model reversibly."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from moeopt.errors import ModelError, got, without_storage
from moeopt.models.balancing import BalancedLoss
from moeopt.models.layers import MoELayer, is_offloaded
from moeopt.models.merging import MergedCache
from moeopt.models.patch import Patch, Run, as_they_are, dispatches, merging, skipping, with_novices
from moeopt.models.routing import MappedRouter, RoutingRule, read_at_once
from moeopt.models.self_checks import CheckedModel, check_merging, check_plan, checked_model, expert_form
from moeopt.models.use import lock_of
from moeopt.plan import Plan

MergedWeights = Literal["auto", "resident", "scratch"]
"""Merged experts of all layers in memory, of one layer at a time, or what fits."""

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()
"""The plans that are open on a model, innermost last."""


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
        zero = read_at_once({i: router.zero for i, router in self._routers.items()})
        return tuple(zero.get(layer.index, 0) for layer in self.layers)

    @property
    def active(self) -> tuple[float, ...]:
        """For each layer, the mean number of experts that a token has run so far: k, or less with skipping or novices.

        Padding counts like any token.
        """
        ran = read_at_once({i: router.ran for i, router in self._routers.items()})
        return tuple(
            ran[x.index] / self._routers[x.index].tokens if x.index in ran else float(part.k)
            for x, part in zip(self.layers, self.plan.layers)
        )


@without_storage
@contextmanager
def patched(
    model: nn.Module, plan: Plan, *, merged_weights: MergedWeights = "auto", cache: MergedCache | None = None
) -> Iterator[Patched]:
    """While the context is open, `model` computes what `plan` says; its parameters and state_dict stay as they are.

    The first use on a model checks, on random hidden states, that every router follows a known rule and that patching
    with the identity plan changes no bit. Contexts may be nested: the inner plan replaces the outer one, which is back
    afterwards. Works under accelerate's cpu and disk offload, with generation, padding and `output_router_logits`,
    whose width stays n; the auxiliary loss is that of the plan's experts (`BalancedLoss`). Not for training: gradients
    do not reach the router rows that a plan selects, nor experts through those it merges; train what `export` writes.

    Args:
        model: a transformers model with MoE layers.
        plan: one layer plan for each of its MoE layers.
        merged_weights: where they live. ``"resident"``: computed when a layer first runs and kept until the context
            closes (or in `cache`). ``"scratch"``: computed at every forward in memory shared by all layers. ``"auto"``:
            scratch for layers whose experts are offloaded, resident for the others.
        cache: merged experts to reuse and to leave for a later `patched`.

    Raises:
        PlanError: when the plan does not fit the model.
        ModelError: when the model has no MoE layers, routes by an unknown rule, or cannot merge or skip its experts.
    """
    check_merged_weights(merged_weights)
    with _suspended(model) as stack:
        checked = checked_model(model)
        check_plan(model, checked, plan)
        patch = _patch_for(checked, model, plan, merged_weights, MergedCache() if cache is None else cache)
        stack.append(patch)
        try:
            patch.attach()
            yield Patched(plan, checked.layers, patch.routers)
        finally:
            patch.detach()
            stack.remove(patch)


def check_merged_weights(value: object) -> None:
    """Raise ModelError unless this is one of `MergedWeights`."""
    if value not in get_args(MergedWeights):
        raise ModelError(f"merged_weights must be 'auto', 'resident' or 'scratch', got {got(value)}")


def plan_in_force(model: nn.Module) -> Plan | None:
    """The plan of the innermost `patched` that is open on `model`, if any."""
    stack = _ACTIVE.get(model)
    return stack[-1].plan if stack else None


@contextmanager
def without_plan(model: nn.Module) -> Iterator[None]:
    """While the context is open, no plan is in force; afterwards the one that was is so again."""
    with _suspended(model) as stack:
        nothing = Patch((), {}, {})
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
        layers = checked_model(model).layers
        if not all(dispatches(layer) for layer in layers):
            yield False
            return
        patch = Patch(layers, {}, {layer.index: run(layer) for layer in layers})
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
        return checked_model(model).rules


def check_takes(model: nn.Module, plan: Plan) -> None:
    """Raise, as `patched`, unless the model takes the plan; what is checked once for all plans is so now."""
    with lock_of(model), _suspended(model):
        check_plan(model, checked_model(model), plan)


def check_makes(model: nn.Module) -> None:
    """Raise ModelError unless every layer of `model` takes experts with down projections of a plan's own."""
    with _suspended(model):
        checked = checked_model(model)
        for layer in checked.layers:
            check_merging(model, checked, layer, "refitted")
            expert_form(layer)


@contextmanager
def _suspended(model: nn.Module) -> Iterator[list[Patch]]:
    """The stack of patches of a model; the top one is off inside, and whichever is the top afterwards is on."""
    stack = _ACTIVE.setdefault(model, [])
    if stack:
        stack[-1].detach()
    try:
        yield stack
    finally:
        if stack:
            stack[-1].attach()


def _patch_for(
    checked: CheckedModel, model: nn.Module, plan: Plan, merged_weights: MergedWeights, cache: MergedCache
) -> Patch:
    scratch = MergedCache(shared=True)
    routers: dict[int, MappedRouter] = {}
    experts: dict[int, Run] = {}
    for layer, rule, part in zip(checked.layers, checked.rules, plan.layers):
        if part.is_identity and part.k == layer.k:
            continue
        routers[layer.index] = MappedRouter(layer, rule, part)
        if part.makes_experts:
            resident = merged_weights == "resident" or (merged_weights == "auto" and not is_offloaded(layer.experts))
            experts[layer.index] = merging(cache if resident else scratch, part)
        if part.novices is not None:
            experts[layer.index] = with_novices(experts.get(layer.index, as_they_are), part)
        elif part.skip:
            experts[layer.index] = skipping(experts.get(layer.index, as_they_are))
    balancing = (model, BalancedLoss(model, plan, checked.rules)) if routers else None
    return Patch(checked.layers, routers, experts, plan, balancing)
