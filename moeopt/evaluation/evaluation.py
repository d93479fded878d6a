"""What evaluating one plan gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moeopt.showing import Shown


@dataclass(frozen=True, eq=False)
class Evaluation(Shown):
    """Scores of one plan on one split, examples in the task's fixed order; of the first examples, while it is raced.

    `loss` and `accuracy` are the means of `losses` and `correct`, weighted by `weights`; all three arrays are float32
    (examples,). `tokens` counts the non-padding tokens that were run, `layer_tokens` the decoder layers that each of
    them went through, summed: what the evaluation cost. `seconds` is wall time. `active` is the mean number of experts
    that a token ran in an MoE layer: k, or with dynamic skipping what was measured; padding counts like any token.
    `metrics` are the task's published numbers by name; empty where they were not computed here.
    """

    losses: NDArray[np.float32]
    weights: NDArray[np.float32]
    correct: NDArray[np.float32]
    tokens: int
    layer_tokens: int
    seconds: float
    active: float = float("nan")
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return float(np.average(self.losses.astype(np.float64), weights=self.weights))

    @property
    def accuracy(self) -> float:
        return float(np.average(self.correct.astype(np.float64), weights=self.weights))

    @property
    def scores(self) -> NDArray[np.float32]:
        """`losses`, `weights` and `correct`, stacked: float32 (3, examples)."""
        return np.stack([self.losses, self.weights, self.correct])

    def with_earlier(self, earlier: Evaluation | None) -> Evaluation:
        """These scores, those of the first examples as an earlier evaluation of the same plan found them.

        Metrics, which are of one evaluation, are then left out.
        """
        if earlier is None:
            return self
        columns, covered = self.scores, min(len(earlier.losses), len(self.losses))
        columns[:, :covered] = earlier.scores[:, :covered]
        return replace(self, losses=columns[0], weights=columns[1], correct=columns[2], metrics={})
