"""Thresholds of dynamic skipping, from calibration (NAEE, arXiv 2402.14800, section 3.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import MethodError
from moeopt.methods.calibration import Calibration
from moeopt.methods.layer_activations import LayerActivations
from moeopt.plan import Plan


def skipping(plan: Plan, calibration: Calibration, *, quantile: float = 0.5) -> Plan:
    """The plan with dynamic skipping: per layer, beta is the median over calibration tokens of w_k / w_1.

    w_1 and w_k are the largest and the least weight of the k experts that run. With k = 2, half of the tokens then run
    one expert. Every layer is given what it is given under the plan without skipping.

    Args:
        plan: what to calibrate; its own skipping is ignored.
        calibration: model and token sequences.
        quantile: another one than the median.

    Raises:
        MethodError: when no layer of the plan runs two experts per token, or the quantile is not between 0 and 1.
    """
    if not 0 <= quantile <= 1:
        raise MethodError(f"quantile must be between 0 and 1, got {quantile!r}")
    if all(layer.k == 1 for layer in plan.layers):
        raise MethodError("there is nothing to skip: the plan runs one expert per token")
    ratios: list[list[NDArray[np.float32]]] = [[] for _ in plan.layers]

    def observe(acts: LayerActivations) -> None:
        gates = acts.gates.float()
        if acts.rule.ordered:  # a sum of mapped probabilities below 0 turns the signs of all
            first, last = gates[:, 0], gates[:, -1]
        else:
            first, last = gates.amax(-1), gates.amin(-1)
        ratio = last / first.where(first != 0, 1.0)
        ratios[acts.layer.index].append(ratio.clamp(0, 1).cpu().numpy())

    calibration.run(observe, plan=plan.with_skip(0))
    return plan.with_skip([float(np.quantile(np.concatenate(batches), quantile)) for batches in ratios])
