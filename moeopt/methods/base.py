"""What a one-shot method is: statistics of a layer in, a plan of that layer out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeopt.errors import MethodError
from moeopt.plan import LayerPlan

if TYPE_CHECKING:
    from moeopt.methods.statistics import Statistic


@dataclass(frozen=True)
class Wanted:
    """What is asked of a method.

    Args:
        experts, k: n and k of the full model.
        keep: r, experts kept per layer.
        active: experts that run per token in the plan, at most `keep`.
        seed: of methods that draw.
    """

    experts: int
    k: int
    keep: int
    active: int
    seed: int = 0

    def check(self) -> None:
        """Raise MethodError when `keep` or `active` is out of range."""
        for name, value, most, why in (
            ("keep", self.keep, self.experts, f"the {self.experts} experts each layer has"),
            ("k", self.active, self.keep, f"the {self.keep} experts kept"),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
                raise MethodError(f"{name} must be an integer between 1 and {why}, got {value!r}")

    def pruned(self, kept: tuple[int, ...] | list[int]) -> LayerPlan:
        """The layer that keeps these experts, in order of number."""
        return LayerPlan(self.experts, self.active, kept=tuple(sorted(int(e) for e in kept)))


class Method(ABC):
    """A rule that makes the plan of a layer from statistics of it; one object a name, used for every layer.

    Attributes:
        summary: what it does, in a few words.
        progressive: whether a layer's statistics are taken with the earlier layers as planned, `Seen.target` being what
            the full model gives.
    """

    summary: str
    progressive: bool = False

    alone: bool = False
    """Whether it takes passes of its own, which it shares with no other method, as progressive ones do."""

    def needs(self, wanted: Wanted) -> dict[str, Statistic]:
        """New statistics to fill for one layer, by name; methods that name one alike share it."""
        return {}

    @abstractmethod
    def layer(self, statistics: Mapping[str, Statistic], wanted: Wanted, rng: np.random.Generator) -> LayerPlan:
        """The plan of a layer; called when its statistics are complete.

        Args:
            statistics: those of `needs`.
            wanted: what is asked.
            rng: the layer's own.
        """
