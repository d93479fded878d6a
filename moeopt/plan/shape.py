"""The numbers of a model that a search space depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moeopt.errors import PlanError
from moeopt.plan.checks import MOST_EXPERTS, integer


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a search space depends on.

    Args:
        layers: number of MoE layers.
        experts: n, experts of each layer.
        k: experts activated per token.
        router_groups: in how many groups of equally many consecutive experts a token chooses first (`n_group` of
            DeepSeek-V3); a plan keeps as many experts of each. 1: there are none.
        router: where a dense W_RM acts unless somebody says otherwise: ``"prob"``, as in EEP, or ``"logit"``, which a
            stock checkpoint expresses, for routers that correct their choice by a bias or choose groups first, and for
            families that moeopt has no custom form for. No part of what is compared.
    """

    layers: int
    experts: int
    k: int
    router_groups: int = 1
    router: Literal["prob", "logit"] = field(default="prob", compare=False, repr=False)

    def __post_init__(self) -> None:
        integer("layers", self.layers, low=1)
        integer("experts", self.experts, low=1, high=MOST_EXPERTS)
        integer("k", self.k, low=1, high=self.experts, what=f"k must be between 1 and the {self.experts} experts")
        integer("router_groups", self.router_groups, low=1, high=self.experts)
        if self.experts % self.router_groups:
            raise PlanError(f"{self.experts} experts do not make {self.router_groups} groups of equally many")

    def same_group(self, expert: int) -> range:
        """The experts that a router chooses together with this one where it chooses groups first; else all."""
        size = self.experts // self.router_groups
        return range(expert // size * size, (expert // size + 1) * size)

    def describe(self) -> dict[str, Any]:
        """What is compared, JSON: the arguments that make an equal shape."""
        groups = {"router_groups": self.router_groups} if self.router_groups > 1 else {}
        return {"layers": self.layers, "experts": self.experts, "k": self.k, **groups}


def why_unequal(r: int, groups: int) -> str | None:
    """Why r experts cannot be kept where tokens choose among so many groups first, and what r could; None if so.

    >>> why_unequal(6, 4)
    'keep=6 experts cannot be as many of each of the 4 groups that a token chooses among first: keep 4 or 8'
    """
    if r % groups == 0:
        return None
    near = [str(m) for m in (r // groups * groups, (r // groups + 1) * groups) if m]
    return (
        f"keep={r} experts cannot be as many of each of the {groups} groups that a token chooses among first: "
        f"keep {' or '.join(near)}"
    )
