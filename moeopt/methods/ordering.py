"""Experts in the order in which a method would keep them, whatever number is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import MethodError
from moeopt.methods.aimer import Aimer, aimer
from moeopt.methods.base import Budget, Scored
from moeopt.methods.calibration import Calibration
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.loss_aware import LossAware, ranked
from moeopt.methods.names import check_ranks
from moeopt.methods.registry import get
from moeopt.methods.statistics import Array


def ranking(name: str, calibration: Calibration, *, seed: int = 0) -> NDArray[np.int64]:
    """The experts of every layer, best first: int64 (layers, n).

    A plan of the method that keeps r experts keeps the first r of each layer, where routers do not choose groups first.
    Of ``"loss_aware"``, which chooses sets, it is the order of an elimination: the last one is the expert whose absence
    changes the loss least, the one before it changes least without that, and so on; how changes are added up is its
    default way.

    Args:
        name: of `METHODS`, one that ranks.
        calibration: model and token sequences.
        seed: of ``"random"``.

    Raises:
        MethodError: for an unknown name, a method that does not rank (it chooses sets, merges, or goes layer by layer),
            or one that cannot do it on this model.
    """
    check_ranks(name)
    method, shape = get(name), calibration.shape
    budget = Budget(shape.experts, shape.k, shape.experts, shape.k, seed, shape.router_groups)
    if isinstance(method, LossAware):
        return ranked(calibration)
    if isinstance(method, Aimer):
        scores = np.stack([-aimer(layer) for layer in calibration.layers])
    elif isinstance(method, Scored) and not method.progressive:
        scores = _scores(method, calibration, budget)
    else:
        raise MethodError(f"{name} gives no score an expert that holds whatever number is kept, so that it ranks none")
    return np.argsort(-scores, axis=1, kind="stable")


def _scores(method: Scored, calibration: Calibration, budget: Budget) -> Array:
    """From one pass of the full model, float64 (layers, n)."""
    statistics = [method.needs(budget) for _ in range(calibration.shape.layers)]

    def observe(acts: LayerActivations) -> None:
        for statistic in statistics[acts.layer.index].values():
            statistic.add(acts)

    if statistics[0]:
        calibration.run(observe)
    rngs = [np.random.default_rng([budget.seed, layer]) for layer in range(len(statistics))]
    return np.stack([method.scores(kinds, budget, rng) for kinds, rng in zip(statistics, rngs)])
