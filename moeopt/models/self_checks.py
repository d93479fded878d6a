"""Self-checks before a plan is applied: on random hidden states, what moeopt puts in place must compute what was there.

They run once for each kind of layer (class of the block, number of experts, dtype) of a model, and are remembered. What
does not hold bit for bit must hold within rounding, which is said once for a model: see `rounding`.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.errors import ModelError, PlanError
from moeopt.models.layers import MoELayer, is_quantised, moe_layers
from moeopt.models.layerwise import input_device
from moeopt.models.merging import DOWN, MergedCache
from moeopt.models.mixing import ExpertForm
from moeopt.models.patch import Patch, merging, takes_picks
from moeopt.models.rounding import IN_BLOCK, agree
from moeopt.models.routing import MappedRouter, RoutingRule, learn_rule, probe_tokens
from moeopt.plan import LayerPlan, Plan

NEAR = {2: 5e-2, 4: 1e-3, 8: 1e-3}
"""By bytes of a number, how far an expert may be from itself with its neurons in another order, relative to what it
gives: sums over neurons round otherwise when they are taken in another order."""


@dataclass(frozen=True, eq=False)
class CheckedModel:
    """What is known of a model under one experts implementation once its self-checks passed.

    Attributes:
        layers: its MoE layers.
        rules: how each of them routes.
        merging, orders: kinds of layers whose merged experts, and whose reordered neurons, are checked already.
    """

    layers: tuple[MoELayer, ...]
    rules: tuple[RoutingRule, ...]
    merging: set[object] = field(default_factory=set)
    orders: set[object] = field(default_factory=set)


_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[object, CheckedModel]] = weakref.WeakKeyDictionary()


def checked_model(model: nn.Module) -> CheckedModel:
    """Learn and check a model; remembered for as long as it keeps its modules and experts implementation."""
    by_backends = _CHECKED.setdefault(model, {})
    for backends, checked in by_backends.items():
        modules = dict(model.named_modules())
        same = all(modules.get(layer.name) is layer.block for layer in checked.layers)
        if same and backends == _backends(checked.layers):
            return checked
    layers = moe_layers(model)
    rules: list[RoutingRule] = []
    for layer in layers:
        rules.append(learn_rule(layer, rules[-1] if rules else None, model))
    for layer in {_kind(layer): layer for layer in reversed(layers)}.values():
        _check_identity(model, layers, layer, rules[layer.index])
    by_backends[_backends(layers)] = checked = CheckedModel(layers, tuple(rules))
    return checked


def check_plan(model: nn.Module, checked: CheckedModel, plan: Plan) -> None:
    """Raise PlanError unless the plan fits the model, ModelError where the model cannot do what it asks for."""
    if len(plan.layers) != len(checked.layers):
        raise PlanError(f"the plan is for {len(plan.layers)} MoE layers, the model has {len(checked.layers)}")
    for layer, part in zip(checked.layers, plan.layers):
        where = f"layer {layer.index} of the plan"
        if part.experts != layer.n:
            raise PlanError(f"{where} is for {part.experts} experts, {layer.name} has {layer.n}")
        checked.rules[layer.index].check(part, layer.name)
        if part.makes_experts:
            check_merging(model, checked, layer)
        if part.down is not None:
            form = expert_form(layer)
            if part.down.shape[1:] != (form.hidden, form.inner):
                raise PlanError(
                    f"{where} has down projections of shape (hidden, inner) = {part.down.shape[1:]}, those of "
                    f"{layer.name} are {(form.hidden, form.inner)}"
                )
        if part.neurons is not None and part.neurons.shape[1] != (inner := expert_form(layer).inner):
            raise PlanError(f"{where} orders {part.neurons.shape[1]} neurons, experts of {layer.name} have {inner}")
        if not part.sums_experts:
            _check_orders(model, checked, layer)
        if part.novices is not None:
            _check_dispatch(layer, "replaced by novices")
            if part.novices.shape[1] != layer.hidden:
                raise PlanError(
                    f"{where} has novices of {part.novices.shape[1]} numbers, the hidden states of {layer.name} have "
                    f"{layer.hidden}"
                )
        elif part.skip:
            _check_dispatch(layer, "skipped")


def check_merging(model: nn.Module, checked: CheckedModel, layer: MoELayer, what: str = "merged") -> None:
    """One expert given by w_em must compute what the same expert computes when merely kept."""
    if is_quantised(layer):
        instead = "keep experts instead (a one-hot plan), or " if what == "merged" else ""
        raise ModelError(
            f"{layer.name}: the experts are quantised and cannot be {what}; {instead}load the model unquantised"
        )
    if not layer.weighs_inputs:
        _check_dispatch(layer, "merged")
    if _kind(layer) in checked.merging:
        return
    plan, rule = LayerPlan(layer.n, 1, kept=(layer.n - 1,)), _ungrouped(checked.rules[layer.index])
    picked = _run(model, layer, Patch(checked.layers, {layer.index: MappedRouter(layer, rule, plan)}, {}))
    merged = _merged_run(model, checked, layer, plan)
    if not agree(model, "a merged copy of an expert", picked, merged, _terms(layer), IN_BLOCK):
        raise ModelError(
            f"{layer.name}: {type(layer.experts).__name__} gives other results on a merged copy of an expert"
        )
    checked.merging.add(_kind(layer))


def expert_form(layer: MoELayer) -> ExpertForm:
    """The form of a layer's experts; ModelError where they have no down projections to be told by."""
    if getattr(layer.experts, DOWN, None) is None:
        raise ModelError(f"{layer.name}: {type(layer.experts).__name__} has no {DOWN}, so that none can be fitted")
    return ExpertForm.from_module(layer.experts)


def _check_identity(model: nn.Module, layers: tuple[MoELayer, ...], layer: MoELayer, rule: RoutingRule) -> None:
    """The block, with its router recomputed by the rule, must give the same as without."""
    hook = MappedRouter(layer, rule, LayerPlan(layer.n, layer.k, kept=tuple(range(layer.n))))
    stock, recomputed = _run(model, layer), _run(model, layer, Patch(layers, {layer.index: hook}, {}))
    if not hook.calls:
        raise ModelError(f"{layer.name}: {type(layer.block).__name__} does not call its router as a module")
    if not agree(model, "a block under the identity plan", stock, recomputed, _terms(layer), IN_BLOCK):
        raise ModelError(
            f"{layer.name}: patching {type(layer.block).__name__} with the identity plan changes its output"
        )


def _check_orders(model: nn.Module, checked: CheckedModel, layer: MoELayer) -> None:
    """An expert with its neurons in another order must give the same but for rounding."""
    form = expert_form(layer)
    if _kind(layer) in checked.orders:
        return
    # 2, not 1: a one-hot w_em would be stored as `kept`, which has no order. A mean other than the sum takes the share
    # of the row's sum, which is the whole either way.
    w_em = np.zeros((1, layer.n), dtype=np.float32)
    w_em[0, -1] = 2
    w_rm = (w_em > 0).astype(np.float32)
    reverse = np.tile(np.arange(form.inner, dtype=np.int32)[::-1], (layer.n, 1))
    straight, reordered = (
        _merged_run(model, checked, layer, LayerPlan(layer.n, 1, w_em=w_em, w_rm=w_rm, merge="slerp", neurons=orders))
        for orders in (None, reverse)
    )
    for a, b in zip(straight, reordered):
        if float((a - b).float().norm()) > NEAR[a.dtype.itemsize] * float(a.float().norm()):
            raise ModelError(
                f"{layer.name}: {type(layer.experts).__name__} gives other results with its neurons in another order"
            )
    checked.orders.add(_kind(layer))


def _check_dispatch(layer: MoELayer, what: str) -> None:
    if not takes_picks(layer):
        raise ModelError(
            f"{layer.name}: {type(layer.experts).__name__} is not called with expert numbers and weights, "
            f"so its experts cannot be {what}; keep experts instead (a one-hot plan)"
        )


def _backends(layers: tuple[MoELayer, ...]) -> object:
    return tuple(getattr(getattr(x.experts, "config", None), "_experts_implementation", None) for x in layers)


def _kind(layer: MoELayer) -> tuple[object, ...]:
    return type(layer.block), layer.n, layer.dtype


def _merged_run(model: nn.Module, checked: CheckedModel, layer: MoELayer, plan: LayerPlan) -> list[Tensor]:
    """What the block gives when the layer's one expert is made anew, and so has number 0."""
    rule = _ungrouped(checked.rules[layer.index])
    routers = {layer.index: MappedRouter(layer, rule, plan, renumber=False)}
    return _run(model, layer, Patch(checked.layers, routers, {layer.index: merging(MergedCache(), plan)}))


def _ungrouped(rule: RoutingRule) -> RoutingRule:
    """The rule for a single expert, which no groups are made of."""
    return replace(rule, groups=1)


def _run(model: nn.Module, layer: MoELayer, patch: Patch | None = None) -> list[Tensor]:
    """The tensors that a layer's block returns for a few random hidden states, (1, 8, hidden).

    Where the block is a whole decoder layer (Gemma 4), which takes more than these, the model's logits of a few tokens.
    """
    try:
        if patch is not None:
            patch.attach()
        with torch.no_grad():
            if "attention_mask" in inspect.signature(type(layer.block).forward).parameters:
                output = model(torch.arange(8, device=input_device(model))[None], use_cache=False).logits
            else:
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


def _terms(layer: MoELayer) -> int:
    """The most terms of a sum in the block: its hidden states' numbers, or an expert's neurons."""
    return max([layer.hidden, *(size for t in layer.experts.parameters() for size in t.shape[1:])])
