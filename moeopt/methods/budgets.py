"""How many experts each layer keeps, under a total: layers share a budget by what they would lose of the task's loss.

Our own. Of every layer, the experts are ranked by an elimination (`set_changes.Changes.order`): the one without which
the loss is predicted to change least goes first, then the next, what the others would change being taken anew. The
nested sets that this leaves give a curve of each layer, F_l(m), what keeping m experts is predicted to cost, all from
one pass forth and back (`loss_aware`). Counts are the minimum of sum_l F_l(m_l) under the total, exactly, by dynamic
programming: what a ranking of all experts of all layers by predicted loss per byte aims at, and is where the curves
are convex. Each layer's set is then improved by swaps, as `loss_aware` does.

F_l is one of the sums of `loss_aware`, of those that are curvature and may be held against another layer's: squared,
gauss_newton 3, or output, sum |g_t| |dy_t|^2, times the layer's mean |g_t|. (Hidden states grow along a model, and
derivatives shrink as much: without that factor late layers would count for more.) Which of them, the true loss on the
last quarter of the calibration examples tells, as for `loss_aware`, under the plans that each makes of the others.

What is gained grows with what is dropped: on FineMoE nothing at 24 of 32 experts, a fifth of the loss that pruning
costs at 16 and 8, a third at 6 (docs/tradeoffs.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import MethodError, ModelError
from moeopt.methods.base import Budget, Groups, MethodPlan, ranges_of
from moeopt.methods.kept_sets import KeptSet
from moeopt.methods.loss_aware import LossAware, Search
from moeopt.methods.set_changes import DEFAULT, RULES, Changes
from moeopt.methods.statistics import Array
from moeopt.models import Sizes
from moeopt.plan import Plan, why_unequal

if TYPE_CHECKING:
    from moeopt.methods.calibration import Calibration

COMPARABLE = (DEFAULT, "squared", "gauss_newton 3")
"""Ways of adding up whose sums of one layer may be held against another's."""
STEPS = 100_000
"""Where experts differ in size, a budget is counted in so many parts at least, sizes rounded up."""


class LossAwareBudgets(LossAware):
    """See the top of this file. A plan keeps `keep` experts a layer in the mean."""

    held = True

    def __init__(self) -> None:
        super().__init__("loss_aware, with as many experts in all, but of each layer as many as its loss asks for", 1)

    def planned(self, calibration: Calibration, budget: Budget, ranges: Groups) -> MethodPlan:
        layers = calibration.shape.layers
        return allocated(calibration, budget, ranges, total=budget.keep * layers, high=budget.experts)


def allocate(
    name: str,
    calibration: Calibration,
    *,
    total: int,
    low: int | None = None,
    high: int | None = None,
    k: int | None = None,
    groups: Groups | None = None,
    per_bytes: bool = True,
) -> Plan:
    """The plan that keeps `total` experts, of each layer as many as its predicted loss asks for.

    Args:
        name: ``"loss_aware"``: of the methods, the one whose predictions may be compared between layers.
        calibration: model and examples; two at least.
        total: experts of all layers together.
        low, high: fewest and most of a layer; None: as many as must be to run k, and all.
        k: experts that run per token in the plan; the model's by default.
        groups: inclusive ranges of MoE layers that share one choice; None: every layer has its own.
        per_bytes: whether the budget is the bytes of `total` experts of mean size, where layers' experts differ in
            size; else every expert counts alike.

    Raises:
        MethodError: for another method, for numbers that are out of range, and when the model cannot be run layer by
            layer.
    """
    if name not in ("loss_aware", "loss_aware_budgets"):
        raise MethodError(
            f"{name!r} does not say how layers compare; allocate by 'loss_aware', or search the counts under its "
            f"ranking: PruneSpace.of(model, keep=(low, high), total={total}, order={name!r})"
        )
    shape = calibration.shape
    active = shape.k if k is None else k
    most = shape.experts if high is None else high
    budget = Budget(shape.experts, shape.k, most, active, router_groups=shape.router_groups)
    budget.check()
    ranges = ranges_of(groups, shape.layers)
    return allocated(calibration, budget, ranges, total=total, low=low, high=most, per_bytes=per_bytes).plan


def allocated(
    calibration: Calibration,
    budget: Budget,
    ranges: Groups,
    *,
    total: int,
    low: int | None = None,
    high: int,
    per_bytes: bool = True,
) -> MethodPlan:
    """As `allocate`, with what it cost; `budget` says how many experts run, and which router groups there are."""
    unit = budget.router_groups
    fewest = max(rule.fewest(budget.active) for rule in calibration.rules)
    least = -(-fewest // unit) * unit if low is None else low
    _check(total, least, high, budget, calibration.shape.layers)
    options = np.arange(least, high + 1, unit)
    sizes = Sizes(calibration.model, calibration.layers).expert_bytes if per_bytes else [1] * calibration.shape.layers
    weights = [options * sum(sizes[first : last + 1]) for first, last in ranges]
    capacity = total * sum(sizes) // len(sizes)
    try:
        search = Search(calibration, budget, ranges, held=True)
    except ModelError as error:
        raise MethodError(f"derivatives need a model that runs layer by layer: {error}") from error
    everything = [tuple(range(budget.experts))] * len(ranges)
    fit, whole = search.changes(None, everything, budget.k)
    made = {
        name: _Layers(name, fit, options, unit).fitting(weights, capacity)
        for name in search.rules
        if name in COMPARABLE
    }
    name = search.chosen({name: search.judged(search.plan(kept)) for name, kept in made.items()})
    kept = [
        changes.swapped(members, RULES[name])
        for changes, members in zip(whole, _Layers(name, whole, options, unit).fitting(weights, capacity))
    ]
    thinned = f", of every {search.every}th token" if search.every > 1 else ""
    counts = ", ".join(str(len(members)) for members in kept)
    return search.result(search.plan(kept), f"{name}, keeps {counts}{thinned}")


def _check(total: int, low: int, high: int, budget: Budget, layers: int) -> None:
    """Raise MethodError unless so many experts may be kept."""
    if not budget.active <= low <= high <= budget.experts:
        raise MethodError(
            f"low and high must hold k={budget.active} <= low <= high <= {budget.experts}, got {low} and {high}"
        )
    for count in (low, high):
        if (why := why_unequal(count, budget.router_groups)) is not None:
            raise MethodError(why)
    if (
        isinstance(total, bool)
        or not isinstance(total, (int, np.integer))
        or not low * layers <= total <= high * layers
    ):
        raise MethodError(
            f"total must be from {low * layers} to {high * layers} experts, {low} to {high} in each of {layers} "
            f"layers, got {total!r}"
        )


class _Layers:
    """Nested sets of every group of layers, and what they are predicted to cost.

    Args:
        name: the way of adding up.
        changes: of every group.
        options: how many experts may be kept.
        unit: of each of so many router groups as many are.

    Attributes:
        sets: of every group, a set of each of the `options`.
        costs: of these, (options,) a group.
    """

    def __init__(self, name: str, changes: Sequence[Changes], options: NDArray[np.int64], unit: int) -> None:
        self.sets: list[list[KeptSet]] = []
        self.costs: list[Array] = []
        for group in changes:
            order = group.order(RULES[name])
            size = len(order) // unit
            parts = [[e for e in order if e // size == part] for part in range(unit)]
            sets = [tuple(sorted(e for part in parts for e in part[: m // unit])) for m in options.tolist()]
            self.sets.append(sets)
            self.costs.append(RULES[name](group.of_sets(sets)) * (group.slope if name == DEFAULT else 1.0))

    def fitting(self, weights: Sequence[NDArray[np.int64]], capacity: int) -> list[KeptSet]:
        """The sets of least cost in all that fit."""
        return [sets[i] for sets, i in zip(self.sets, cheapest(self.costs, weights, capacity))]


def cheapest(costs: Sequence[Array], weights: Sequence[NDArray[np.int64]], capacity: int) -> list[int]:
    """Of every group the number of an option, so that the sum of costs is least and less than one step is left over.

    A step is the most that any group's weight grows by from one option to the next. Exact, but that weights beyond the
    least are rounded up where they are of more than `STEPS` parts in all.

    Args:
        costs, weights: of every group, its options' costs and their weights, ascending; (options,).
        capacity: most that the chosen weights may sum up to; at least the sum of the first options'.
    """
    more = [each - each[0] for each in weights]
    left = capacity - sum(int(each[0]) for each in weights)
    part = max(reduce(gcd, (int(w) for each in more for w in each)), left // STEPS, 1)
    whole, room = [-(-each // part) for each in more], left // part
    least = np.full(room + 1, np.inf)  # of the groups so far, by what they weigh
    least[0] = 0.0
    chosen: list[NDArray[np.int64]] = []
    for group_costs, group_weights in zip(costs, whole):
        after, option = np.full(room + 1, np.inf), np.zeros(room + 1, np.int64)
        for i, (cost, weight) in enumerate(zip(group_costs.tolist(), group_weights.tolist())):
            if weight > room:
                break
            through = np.full(room + 1, np.inf)
            through[weight:] = least[: room + 1 - weight] + cost
            better = through < after
            after[better], option[better] = through[better], i
        least = after
        chosen.append(option)
    step = max(int(np.diff(each).max(initial=1)) for each in whole)
    full = int(np.isfinite(least).nonzero()[0][-1])
    first = max(0, full - step + 1)
    at = first + int(least[first : full + 1].argmin())
    picks = []
    for option, group_weights in zip(reversed(chosen), reversed(whole)):
        picks.append(int(option[at]))
        at -= int(group_weights[picks[-1]])
    return picks[::-1]
