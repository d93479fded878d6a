"""How large the model of a plan is: as a stock checkpoint with so many experts."""

from __future__ import annotations

from torch import nn

from moeopt.models import moe_layers
from moeopt.plan import Plan


class Sizes:
    """Parameters and bytes of a model, and of each of its MoE layers for one expert with its part of the router.

    Args:
        model: the full model; offloaded parameters count as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        every = list(model.parameters())
        self.total = sum(p.numel() for p in every), sum(p.numel() * p.element_size() for p in every)
        self.expert: list[tuple[int, int]] = []
        for layer in moe_layers(model):
            own = [*layer.experts.parameters(), *(p for p in layer.router.parameters() if p.shape[:1] == (layer.n,))]
            count, size = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
            self.expert.append((count // layer.n, size // layer.n))

    def of(self, plan: Plan | None) -> tuple[int, int]:
        """Parameters and bytes of the model that keeps as many experts as the plan; None: the full model."""
        gone = [] if plan is None else [layer.experts - layer.kept_experts for layer in plan.layers]
        count = self.total[0] - sum(n * one for n, (one, _) in zip(gone, self.expert))
        return count, self.total[1] - sum(n * one for n, (_, one) in zip(gone, self.expert))
