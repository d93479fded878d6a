"""The numbers of a model that a search space depends on."""

from __future__ import annotations

from dataclasses import dataclass

from moeopt.plan.checks import MOST_EXPERTS, integer


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a search space depends on.

    Args:
        layers: number of MoE layers.
        experts: n, experts of each layer.
        k: experts activated per token.
    """

    layers: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        integer("layers", self.layers, low=1)
        integer("experts", self.experts, low=1, high=MOST_EXPERTS)
        integer("k", self.k, low=1, high=self.experts, what=f"k must be between 1 and the {self.experts} experts")
