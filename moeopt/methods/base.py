"""What a one-shot method is: statistics of a layer in, a plan of that layer out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import MethodError
from moeopt.plan import LayerPlan, Plan, why_unequal

if TYPE_CHECKING:
    from moeopt.methods.calibration import Calibration
    from moeopt.methods.statistics import Statistic

Groups = Sequence[tuple[int, int]]
"""Inclusive ranges of MoE layers that share a choice."""


S = TypeVar("S", bound="Statistic")


def ranges_of(groups: Groups | None, layers: int) -> Groups:
    """Ranges that cover all layers; every layer its own where there are none.

    Raises:
        MethodError: when they do not cover each layer once, in order.
    """
    ranges = [(i, i) for i in range(layers)] if groups is None else [(int(a), int(b)) for a, b in groups]
    if [i for a, b in ranges for i in range(a, b + 1)] != list(range(layers)):
        raise MethodError(f"groups must be layer ranges that cover layers 0-{layers - 1} once, in order, got {ranges}")
    return ranges


@dataclass(frozen=True)
class Budget:
    """What is asked of a method.

    Args:
        experts, k: n and k of the full model.
        keep: r, experts kept per layer.
        active: experts that run per token in the plan, at most `keep`.
        seed: of methods that draw.
        router_groups: in how many groups of consecutive experts routers choose first (`ModelShape`); every method keeps
            as many experts of each.
    """

    experts: int
    k: int
    keep: int
    active: int
    seed: int = 0
    router_groups: int = 1

    def check(self, *, among_all: bool = False) -> None:
        """Raise MethodError when `keep` or `active` is out of range; `among_all`: of routers that pick among all n."""
        every = f"the {self.experts} experts each layer has"
        picks = (self.experts, every) if among_all else (self.keep, f"the {self.keep} experts kept")
        for name, value, high, why in (("keep", self.keep, self.experts, every), ("k", self.active, *picks)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= high:
                raise MethodError(f"{name} must be an integer between 1 and {why}, got {value!r}")
        unequal = why_unequal(self.keep, self.router_groups)
        if unequal is not None:
            raise MethodError(unequal)

    @property
    def parts(self) -> list[range]:
        """The experts of each group that routers choose first; one of all where there are none."""
        size = self.experts // self.router_groups
        return [range(first, first + size) for first in range(0, self.experts, size)]

    @property
    def share(self) -> int:
        """How many experts are kept of each of `parts`."""
        return self.keep // self.router_groups

    def best(self, scores: NDArray[Any]) -> list[int]:
        """The experts to keep by a score each, (n,), as many of each of `parts`, in order of number.

        Those of largest score are, the lower number first at a tie.
        """
        order = [part[0] + np.argsort(-scores[part], kind="stable")[: self.share] for part in map(list, self.parts)]
        return sorted(int(e) for e in np.concatenate(order))

    def spare(self, kept: Iterable[int]) -> list[int]:
        """Those of the experts kept that may go, as more than `share` of their part are kept."""
        members, size = sorted(kept), self.experts // self.router_groups
        counts = np.bincount([e // size for e in members], minlength=self.router_groups)
        return [e for e in members if counts[e // size] > self.share]

    @property
    def sets(self) -> int:
        """How many sets of experts there are that may be kept."""
        return int(comb(self.experts // self.router_groups, self.share) ** self.router_groups)

    def pruned(self, kept: tuple[int, ...] | list[int]) -> LayerPlan:
        """The layer that keeps these experts, in order of number."""
        return LayerPlan(self.experts, self.active, kept=tuple(sorted(int(e) for e in kept)))


@dataclass(frozen=True)
class CalibrationSize:
    """How much a calibration pass runs.

    Args:
        tokens: of all examples.
        batch_tokens: of a forward pass.
        layers: decoder layers.
        hidden: numbers of a hidden state.
        itemsize: bytes of one.
    """

    tokens: int
    batch_tokens: int
    layers: int
    hidden: int
    itemsize: int


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

    def bytes_held(self, budget: Budget, size: CalibrationSize) -> int:
        """Bytes that it takes beside a forward pass, about, as far as they grow with tokens or layers."""
        statistics = self.needs(budget).values()
        # Statistics by layer have all batches go through a layer before the next one.
        held = sum(each.bytes_held(size) for each in statistics)
        held += size.tokens * size.hidden * size.itemsize * any(each.by_layer for each in statistics)
        every = any(each.outputs == "all" for each in statistics)
        return held + budget.experts * size.batch_tokens * size.hidden * size.itemsize * every

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


class Scored(Method):
    """A method that keeps the experts of largest score, with the same score whatever number is kept."""

    @abstractmethod
    def scores(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> NDArray[Any]:
        """A number for every expert of a layer, (n,), the largest for what is kept first; arguments as of `layer`."""

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        return budget.pruned(budget.best(self.scores(statistics, budget, rng)))


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
