"""One-shot methods by name, and the passes that fill what they need."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from moeopt.errors import MethodError, ModelError
from moeopt.methods import clustering, matching, rankings
from moeopt.methods.aimer import Aimer
from moeopt.methods.base import Budget, Groups, Method, MethodPlan, Planner, ranges_of
from moeopt.methods.budgets import LossAwareBudgets
from moeopt.methods.calibration import Calibration, Stream
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.loss_aware import ROUNDS, LossAware
from moeopt.methods.mone import Mone
from moeopt.methods.naee import Naee, NaeeProgressive
from moeopt.methods.names import parsed
from moeopt.methods.output_fit import OutputFit
from moeopt.methods.ream import Ream
from moeopt.methods.statistics import MeanOutputs, Statistic
from moeopt.models import MoELayer
from moeopt.plan import AMONG_ALL, LayerPlan, Plan

METHODS: dict[str, Method] = {
    "random": rankings.Random(),
    **rankings.RANKINGS,
    "aimer": Aimer(),
    "mone": Mone(),
    "naee": Naee(),
    "naee_progressive": NaeeProgressive(),
    "hc_smoe": clustering.Clustering(
        "clusters of mean outputs merged, picks aliased", clustering.by_outputs, (MeanOutputs,), "alias"
    ),
    "hc_smoe_summed": clustering.Clustering(
        "clusters of mean outputs merged, probabilities summed", clustering.by_outputs, (MeanOutputs,), "prob"
    ),
    "m_smoe": clustering.Clustering(
        "frequent experts merged with those routed alike, picks aliased", clustering.by_logits, (), "alias"
    ),
    "m_smoe_summed": clustering.Clustering(
        "frequent experts merged with those routed alike, probabilities summed", clustering.by_logits, (), "prob"
    ),
    "ream": Ream(),
    "output_fit": OutputFit(),
    "loss_aware": LossAware("the kept set that changes the loss least, by its derivative", 1),
    "loss_aware_rounds": LossAware("loss_aware, with derivatives taken again on the way", ROUNDS),
    "loss_aware_budgets": LossAwareBudgets(),
}
"""The one-shot methods, by name."""


def get(name: str) -> Method:
    """The method of that name, whose options, if it has any, say how its plans merge.

    Raises:
        MethodError: when there is none; the nearest name is suggested.
    """
    return METHODS[parsed(name).method]


def _mixed(part: LayerPlan, name: str, layer: MoELayer) -> LayerPlan:
    """A layer's plan with the options of a name."""
    options = parsed(name)
    if options.aligned and part.w_em is not None:
        part = replace(part, neurons=matching.by_weights(part, layer))
    return part if options.merge == "linear" else replace(part, merge=options.merge)


def plan(
    name: str, calibration: Calibration, *, keep: int, k: int | None = None, groups: Groups | None = None, seed: int = 0
) -> Plan:
    """The plan of one method; see `plans`."""
    return plans([name], calibration, keep=keep, k=k, groups=groups, seed=seed)[name].plan


def plans(
    names: Iterable[str],
    calibration: Calibration,
    *,
    keep: int,
    k: int | None = None,
    groups: Groups | None = None,
    seed: int = 0,
) -> dict[str, MethodPlan]:
    """The plans of several methods, by name; those that need the same statistics share a pass.

    Args:
        names: of `METHODS`; those that merge take options, as in ``"hc_smoe:aligned+ties"``: neurons put in order by
            their weights first (`matching.by_weights`), and a mean that is no weighted sum (`moeopt.models.mixing`).
        calibration: model and token sequences.
        keep: r, experts kept per layer.
        k: experts that run per token in the plans; the model's by default.
        groups: inclusive ranges of MoE layers that share one choice, as `Space.groups`, whose statistics are added up;
            None: every layer has its own.
        seed: of `random`.

    Raises:
        MethodError: for an unknown name, or a method that cannot do it on this model; when keep, k or groups is out of
            range.
    """
    if isinstance(names, str):
        raise MethodError(f"names must be a list of methods, such as [{names!r}], got {names!r}")
    chosen = {name: get(name) for name in names}
    shape = calibration.shape
    budget = Budget(shape.experts, shape.k, keep, shape.k if k is None else k, seed, shape.router_groups)
    for name in chosen:
        budget.check(among_all=parsed(name).router in AMONG_ALL)
    layers = {layer.index: layer for layer in calibration.layers}
    if any((layer.n, layer.k) != (shape.experts, shape.k) for layer in layers.values()):
        raise MethodError("the MoE layers of the model differ in n or k; one-shot methods need equal layers")
    ranges = ranges_of(groups, shape.layers)
    at_once = {name: method for name, method in chosen.items() if not method.alone}
    made = _at_once(at_once, calibration, budget, ranges) if at_once else {}
    for name, method in chosen.items():
        if isinstance(method, Planner):
            made[name] = method.planned(calibration, budget, ranges)
        elif method.progressive:
            if len(ranges) < shape.layers:
                raise MethodError(f"{name} goes layer by layer: layers cannot share a choice, got {len(ranges)} groups")
            made[name] = _progressively(name, method, calibration, budget)
    return {name: made[name] for name in chosen}


def _at_once(
    chosen: Mapping[str, Method], calibration: Calibration, budget: Budget, ranges: Groups
) -> dict[str, MethodPlan]:
    """One pass of the full model for all."""
    started = time.perf_counter()
    group_of = [group for group, (first, last) in enumerate(ranges) for _ in range(first, last + 1)]
    needs = {name: method.needs(budget) for name, method in chosen.items()}
    kinds = {key: statistic for need in needs.values() for key, statistic in need.items()}
    by_layer = any(statistic.by_layer for statistic in kinds.values())
    parts: dict[str, list[LayerPlan]] = {name: [] for name in chosen}
    spent = dict.fromkeys(chosen, 0.0)
    open_groups: dict[int, dict[str, Statistic]] = {}

    def close(group: int) -> None:
        shared = open_groups.pop(group, {})
        first, last = ranges[group]
        for name, method in chosen.items():
            begun = time.perf_counter()
            statistics = {key: shared[key] for key in needs[name]}
            rng = np.random.default_rng([budget.seed, group])
            planned = method.layers(statistics, budget, rng, range(first, last + 1))
            parts[name] += [_mixed(part, name, calibration.layers[i]) for i, part in enumerate(planned, first)]
            spent[name] += time.perf_counter() - begun

    def observe(acts: LayerActivations) -> None:
        group = group_of[acts.layer.index]
        if group not in open_groups:
            if by_layer and group:  # layers come in order, so that the last group has all that it will
                close(group - 1)
            fresh = {key: value for method in chosen.values() for key, value in method.needs(budget).items()}
            # those that take all outputs first: they are computed once, and the others then take theirs from them
            open_groups[group] = dict(sorted(fresh.items(), key=lambda item: item[1].outputs != "all"))
        for statistic in open_groups[group].values():
            statistic.add(acts)

    if kinds:
        try:
            all_outputs = any(statistic.outputs == "all" for statistic in kinds.values())
            calibration.run(observe, layer_by_layer=by_layer, all_outputs=all_outputs)
        except ModelError as error:
            raise MethodError(f"{', '.join(chosen)}: {error}") from error
    for group in sorted(open_groups) if kinds else range(len(ranges)):
        close(group)
    seconds = time.perf_counter() - started - sum(spent.values())
    return {
        name: MethodPlan(Plan(tuple(parts[name])), _cost(needs[name], calibration), seconds + spent[name])
        for name in chosen
    }


def _progressively(name: str, method: Method, calibration: Calibration, budget: Budget) -> MethodPlan:
    """Two streams: what the full model gives, if that is wanted, and the tokens through the layers planned so far."""
    started = time.perf_counter()
    shape = calibration.shape
    full = Plan.identity(shape.layers, shape.experts, shape.k)
    planned: list[LayerPlan] = []
    targets: list[torch.Tensor] = []
    statistics: dict[str, Statistic] = {}
    looking = False

    def observe(acts: LayerActivations) -> None:
        if not looking:
            targets.append(acts.routed)
            return
        aimed = replace(acts, target=targets.pop(0)) if method.targets else acts
        for statistic in statistics.values():
            statistic.add(aimed)

    with calibration.ready():
        try:
            reference, pruned = Stream(calibration) if method.targets else None, Stream(calibration)
        except ModelError as error:
            raise MethodError(f"{name} goes layer by layer, which this model does not allow: {error}") from error
        for index in range(pruned.depth):
            if reference is not None:
                with calibration.watching(observe) as watch:
                    reference.advance(index, watch)
            if index in pruned.moe:
                statistics, looking = method.needs(budget), True
                every = any(statistic.outputs == "all" for statistic in statistics.values())
                with calibration.watching(observe, all_outputs=every) as watch:
                    pruned.look(index, watch)
                looking = False
                rng = np.random.default_rng([budget.seed, len(planned)])
                part = method.layer(statistics, budget, rng)
                planned.append(_mixed(part, name, calibration.layers[len(planned)]))
            # the layers to come as they are: only layer `index` runs, but a plan is of the whole model
            pruned.advance(index, lambda batch: None, Plan((*planned, *full.layers[len(planned) :])))
    passes = calibration.tokens * pruned.depth
    cost = (1 + method.targets) * passes + _cost(statistics, calibration)
    return MethodPlan(Plan(tuple(planned)), cost, time.perf_counter() - started)


def _cost(needs: Mapping[str, Statistic], calibration: Calibration) -> int:
    if not needs:
        return 0
    shape = calibration.shape
    extra = {"none": 0.0, "routed": 1.0, "all": shape.experts / shape.k - 1}
    most = max(extra[statistic.outputs] for statistic in needs.values())
    depth = calibration.decoder_layers
    return round(calibration.tokens * (depth + most * shape.layers))
