"""Makes a `moeopt.trials.guide.Guide`: what an expert taken out of a pruning, or back in, would change of its loss."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from moeopt.evaluation import Evaluator
from moeopt.methods.gradients import LossGradients
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.loss_aware import cost_of
from moeopt.methods.set_changes import Toggles, products_of
from moeopt.plan import Plan
from moeopt.trials.guide import Guide


class Guiding:
    """Takes the derivative of an evaluator's loss at prunings.

    Args:
        evaluator: model, task, examples and score.
        scores_name: names them (`moeopt.evaluation.store.scores_name`).

    Attributes:
        layer_tokens: what one guide costs.

    Raises:
        MethodError: when the score has no derivative.
        ModelError: when the model cannot be run layer by layer.
    """

    def __init__(self, evaluator: Evaluator, scores_name: str) -> None:
        self._gradients, self._scores_name = LossGradients(evaluator), scores_name
        self.layer_tokens = cost_of(self._gradients)

    def guide(self, plan: Plan) -> Guide:
        """The guide of a plan whose layers all keep experts as they are (`LayerPlan.kept`)."""
        toggles = [_LayerToggles(layer.kept or (), layer.k, layer.experts) for layer in plan.layers]

        def observe(acts: LayerActivations, gradient: Tensor) -> None:
            toggles[acts.layer.index].add(acts, products_of(acts, gradient))

        self._gradients.run(observe, plan)
        signed, squared = (np.stack([layer.scores(name) for layer in toggles]) for name in ("signed", "squared"))
        if self._gradients.evaluator.teacher is not None:
            signed[:] = 0.0  # of tokens that were drawn: its mean is 0, whatever the plan
        weight = self._gradients.weight
        return Guide(
            plan.fingerprint, self._scores_name, *((part / weight).astype(np.float32) for part in (signed, squared))
        )


class _LayerToggles:
    """Of one layer: the sums of the kept set without each of its experts, and with each of the others."""

    def __init__(self, kept: tuple[int, ...], k: int, n: int) -> None:
        others = tuple(e for e in range(n) if e not in kept)
        toggled = ([kept] if len(kept) > 1 else []) + ([others] if others else [])
        self._parts = [(experts, Toggles(kept, experts, k, kept, k, n)) for experts in toggled]
        self._n = n

    def add(self, acts: LayerActivations, products: Tensor) -> None:
        for _, sums in self._parts:
            sums.add(acts, products)

    def scores(self, name: str) -> np.ndarray:
        scores = np.zeros(self._n)
        for experts, sums in self._parts:
            scores[list(experts)] = getattr(sums, name)
        return scores
