"""AIMER: a score of the weights alone, without calibration (arXiv 2603.18492).

The mean absolute weight of an expert over its root mean square, all matrices of it taken together:

    AIMER = ||w||_1 / (sqrt(m) ||w||_2),   w of m numbers,

between 1 / sqrt(m) and 1, high where weights are alike in size. Experts of *low* score are kept, the lower number first
at a tie; biases and the router do not count. Layers that share a choice add up their scores.

A baseline: where experts differ it is behind `naee` wherever it was tried (`benchmarks/refit.py`).
"""

from __future__ import annotations

import time

import numpy as np

from moeopt.errors import MethodError
from moeopt.methods.base import Budget, Groups, MethodPlan, Planner
from moeopt.methods.calibration import Calibration
from moeopt.methods.statistics import Array
from moeopt.models import MoELayer, materialised
from moeopt.models.layers import FLOATS, stacked
from moeopt.plan import Plan


class Aimer(Planner):
    """See the top of this file."""

    summary = "lowest mean absolute weight over root mean square; no calibration"

    def planned(self, calibration: Calibration, budget: Budget, ranges: Groups) -> MethodPlan:
        started, layers = time.perf_counter(), []
        for first, last in ranges:
            scores = np.sum([aimer(layer) for layer in calibration.layers[first : last + 1]], axis=0)
            part = budget.pruned(budget.best(-scores))
            layers += [part] * (last - first + 1)
        return MethodPlan(Plan(tuple(layers)), 0, time.perf_counter() - started)


def aimer(layer: MoELayer) -> Array:
    """The score of every expert, (n,).

    Raises:
        MethodError: when weights are quantised.
    """
    absolute, squares, numbers = np.zeros(layer.n), np.zeros(layer.n), 0
    for name, tensor in stacked(layer.experts, layer.n).items():
        if tensor.ndim < 3:
            continue
        if tensor.dtype not in FLOATS:
            raise MethodError(f"{layer.name}: {name} is stored as {tensor.dtype}; aimer needs weights that are numbers")
        weights = materialised(layer.experts, name)
        numbers += weights[0].numel()
        for j, matrix in enumerate(weights):
            absolute[j] += float(matrix.float().abs().sum().double())
            squares[j] += float(matrix.float().square().sum().double())
    return absolute / np.sqrt(np.maximum(squares * numbers, np.finfo(float).tiny))
