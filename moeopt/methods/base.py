"""What a one-shot method is: statistics of a layer in, a plan of that layer out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from moeopt.errors import MethodError
from moeopt.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from moeopt.methods.calibration import Calibration
    from moeopt.methods.statistics import Statistic

Groups = Sequence[tuple[int, int]]
"""Inclusive ranges of MoE layers that share a choice."""


S = TypeVar("S", bound="Statistic")


@dataclass(frozen=True)
class Budget:
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

    def check(self, *, among_all: bool = False) -> None:
        """Raise MethodError when `keep` or `active` is out of range; `among_all`: of routers that pick among all n."""
        every = f"the {self.experts} experts each layer has"
        picks = (self.experts, every) if among_all else (self.keep, f"the {self.keep} experts kept")
        for name, value, high, why in (("keep", self.keep, self.experts, every), ("k", self.active, *picks)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= high:
                raise MethodError(f"{name} must be an integer between 1 and {why}, got {value!r}")

    def pruned(self, kept: tuple[int, ...] | list[int]) -> LayerPlan:
        """The layer that keeps these experts, in order of number."""
        return LayerPlan(self.experts, self.active, kept=tuple(sorted(int(e) for e in kept)))


def statistic(statistics: Mapping[str, Statistic], kind: type[S]) -> S:
    """The statistic of a class among those of `Method.needs`."""
    value = statistics[kind.__name__]
    assert isinstance(value, kind)
    return value


class Method(ABC):
    """A rule that makes the plan of a layer from statistics of it; one object a name, used for every layer.

    Attributes:
        summary: what it does, in a few words.
        progressive: whether a layer's statistics are taken with the earlier layers as planned.
        targets: whether `LayerActivations.target` is then wanted, what the full model gives.
        alone: whether it takes passes of its own, which it shares with no other method, as progressive ones do.
        kinds: classes of the statistics that it needs.
    """

    summary: str
    progressive: bool = False
    targets: bool = False
    alone: bool = False
    kinds: tuple[Callable[[int], Statistic], ...] = ()

    def needs(self, budget: Budget) -> dict[str, Statistic]:
        """New statistics to fill for one layer, by name; methods that name one alike share it."""
        return {kind.__name__: kind(budget.experts) for kind in self.kinds}

    @abstractmethod
    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        """The plan of a layer; called when its statistics are complete.

        Args:
            statistics: those of `needs`.
            budget: what is asked.
            rng: the layer's own.
        """

    def layers(
        self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator, group: Sequence[int]
    ) -> list[LayerPlan]:
        """The plans of a group of layers, whose numbers are `group`: one for all, unless a method says otherwise."""
        return [self.layer(statistics, budget, rng)] * len(group)


@dataclass(frozen=True)
class MethodPlan:
    """What a method gives.

    Args:
        plan: the plan.
        layer_tokens: what it would cost alone: tokens times decoder layers, a layer whose n experts all run counting as
            n / k layers, one whose experts run again for the tokens routed to them as 2.
        seconds: wall time of the passes it shared with others, and of its own.
        how: what it chose on the way, in words.
    """

    plan: Plan
    layer_tokens: int
    seconds: float
    how: str = ""


class Planner(Method):
    """A method that makes the plan of all layers at once, with passes of its own or none."""

    alone = True

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        raise MethodError(f"{type(self).__name__} makes the plan of all layers at once: use moeopt.methods.plans")

    @abstractmethod
    def planned(self, calibration: Calibration, budget: Budget, ranges: Groups) -> MethodPlan:
        """The plan, and how it came about.

        Args:
            calibration: model, examples and loss.
            budget: what is asked.
            ranges: inclusive ranges of MoE layers that share a choice.

        Raises:
            MethodError: if it cannot be done on this model.
        """
