"""What `moeopt.report.figures` draws: which experts run, what an ensemble of them adds, what every kept set costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeopt import methods
from moeopt.errors import MethodError
from moeopt.evaluation import Evaluation, Evaluator
from moeopt.methods import Calibration, LayerActivations
from moeopt.methods.kept_sets import MOST_SETS, KeptSet
from moeopt.methods.naee import SetErrors
from moeopt.plan import LayerPlan, Plan


def activation_shares(calibration: Calibration, plan: Plan | None = None) -> NDArray[np.float64]:
    """The share of tokens for which each expert runs, (layers, n) (EEP, figure 4).

    A row sums to k, less with skipping or novices.

    Args:
        calibration: model and token sequences.
        plan: what is in force; None: the full model. Experts it drops are NaN; a merged expert stands under the number
            of the one that has most weight in it, and the others that are merged into it are NaN.
    """
    shape = calibration.shape
    counts = np.zeros((shape.layers, shape.experts))
    tokens = np.zeros(shape.layers)
    if plan is not None:
        counts[:] = np.nan
        for row, part in zip(counts, plan.layers):
            row[numbers(part)] = 0.0

    def observe(acts: LayerActivations) -> None:
        layer = acts.layer.index
        picks = acts.index[acts.gates != 0].cpu().numpy()
        part = None if plan is None else plan.layers[layer]
        if part is not None and part.makes_experts:
            picks = numbers(part)[picks[picks < part.kept_experts]]  # beyond are novices
        np.add.at(counts[layer], picks, 1.0)
        tokens[layer] += len(acts.index)

    calibration.run(observe, plan=plan)
    return counts / tokens[:, None]


def numbers(part: LayerPlan) -> NDArray[np.int64]:
    """For every expert of a planned layer, the original one that it is, or that has most weight in it: (r,)."""
    leads: NDArray[np.int64] = np.abs(part.expert_matrix).argmax(axis=1).astype(np.int64)
    return leads


def ensemble_losses(
    evaluator: Evaluator, calibration: Calibration, *, method: str = "soft_activation", layers: Sequence[int] = ()
) -> Mapping[str, list[Evaluation]]:
    """Scores as all layers, and each of `layers` alone, keep their 1, 2, ..., n best experts (EEP, figure 3).

    While fewer than k experts are kept, as many run.

    Args:
        evaluator: what to score on.
        calibration: from which `method` tells which experts are best.
        method: of `moeopt.methods`, one that prunes.
        layers: which MoE layers to reduce alone.

    Returns:
        ``"all layers"``, ``"layer 3"``, ...: n evaluations each.

    Raises:
        MethodError: when the method is unknown or merges, or there is no such layer.
    """
    shape = calibration.shape
    wrong = [layer for layer in layers if not 0 <= layer < shape.layers]
    if wrong:
        raise MethodError(f"layers must be between 0 and {shape.layers - 1}, got {wrong[0]}")
    if not methods.parsed(method).prunes:
        raise MethodError(f"{method} does more than prune; give a method that only prunes, such as soft_activation")
    full = Plan.identity(shape.layers, shape.experts, shape.k)
    groups = shape.router_groups
    sizes = range(groups, shape.experts, groups)
    best = [methods.plan(method, calibration, keep=m, k=min(m, shape.k)) for m in sizes]
    curves = {"all layers": [*best, full]}
    for layer in layers:
        before, after = full.layers[:layer], full.layers[layer + 1 :]
        curves[f"layer {layer}"] = [
            replace(full, layers=(*before, plan.layers[layer], *after)) for plan in [*best, full]
        ]
    return {name: [evaluator.evaluate(plan) for plan in plans] for name, plans in curves.items()}


def kept_set_errors(calibration: Calibration, *, keep: int, k: int | None = None) -> list[dict[KeptSet, float]]:
    """NAEE's layer output error of every kept set, for every layer (arXiv 2402.14800, section 3.2).

    Raises:
        MethodError: when there are more than 20,000 sets.
    """
    shape = calibration.shape
    active = shape.k if k is None else k
    budget = methods.Budget(shape.experts, shape.k, keep, active, router_groups=shape.router_groups)
    budget.check()
    if budget.sets > MOST_SETS:
        raise MethodError(
            f"C({shape.experts}, {keep}) = {budget.sets} kept sets are too many to show; at most {MOST_SETS}"
        )
    by_layer = [
        SetErrors(shape.experts, r=keep, active=active, groups=shape.router_groups) for _ in range(shape.layers)
    ]
    calibration.run(lambda acts: by_layer[acts.layer.index].add(acts), all_outputs=True)
    return [dict(zip(layer.sets, layer.errors.tolist())) for layer in by_layer]
