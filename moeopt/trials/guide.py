"""What a study's objective leaves for its samplers to know where to look: the loss's derivative, summed by expert.

A guide is of one pruning, the best that its study had when it was made. For every expert of every MoE layer it tells
what taking that expert out, or back in, would change of the loss, with the layer's routing as it would then be, all
else unchanged: the first-order change, and the curvature's part of it (`moeopt.methods.loss_aware`). It is kept with
the trial after which it was made, packed, as numbers: workers, resumed studies and samplers read it without a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import StorageError
from moeopt.trials import genome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

GUIDE = "moeopt:guide"
"""System attribute of a trial."""
COST = "guide_layer_tokens"
"""User attribute of such a trial: the part of its `layer_tokens` that the guide cost."""


@dataclass(frozen=True, eq=False)
class Guide:
    """What each expert taken out of a pruned model, or back in, would change of its loss.

    Args:
        plan: fingerprint of the pruning.
        of: names model, task, examples and score (`moeopt.evaluation.store.scores_name`).
        signed: sum over tokens of the first-order change d_t, over the examples' weights, float32 (layers, n).
        squared: the same of d_t^2, half of which is the change by curvature, Fisher-estimated.
    """

    plan: str
    of: str
    signed: NDArray[np.float32]
    squared: NDArray[np.float32]

    def packed(self) -> dict[str, Any]:
        """Attributes of a trial that hold it."""
        attrs = genome.pack(GUIDE, np.stack([self.signed, self.squared]).reshape(-1))
        attrs[GUIDE] |= {"plan": self.plan, "of": self.of}
        return attrs


def plan_of(trial: FrozenTrial) -> tuple[str, str] | None:
    """The plan that the guide a trial holds is of, and what it was scored on; None where it holds none."""
    head = trial.system_attrs.get(GUIDE)
    return (str(head.get("plan")), str(head.get("of"))) if isinstance(head, dict) else None


def read(trial: FrozenTrial, layers: int, n: int) -> Guide | None:
    """The guide that a trial holds, of a model with so many MoE layers and experts; None where it holds none.

    Raises:
        StorageError: when it is damaged.
    """
    numbers, named = genome.unpack(GUIDE, trial.system_attrs), plan_of(trial)
    if numbers is None or named is None:
        return None
    if numbers.size != 2 * layers * n or not np.isfinite(numbers).all():
        raise StorageError(f"attribute {GUIDE!r} of trial {trial.number} is damaged, or of another model")
    signed, squared = numbers.reshape(2, layers, n)
    return Guide(*named, signed, squared)


def cost(trials: Iterable[FrozenTrial]) -> int:
    """Layer-tokens that the guides of these trials cost."""
    costs = (trial.user_attrs.get(COST) for trial in trials)
    return sum(value for value in costs if isinstance(value, int))
