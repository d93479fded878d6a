"""What a front is, as numbers: its points on search and dev, what they are held against, and how it grew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moeopt.showing import Shown, line
from moeopt.statistics import Floats, Interval
from moeopt.study.guards import broken
from moeopt.trials.front import nondominated
from moeopt.trials.objectives import direction

if TYPE_CHECKING:
    from moeopt.plan import Plan
    from moeopt.results.optimiser_comparison.runs import Cost
    from moeopt.study.guards import Guarded
    from moeopt.trials.hypervolume import Bounds

Kind = Literal["search", "one-shot", "full"]
FULL = "full model"


@dataclass(frozen=True, eq=False)
class Point:
    """A plan with its numbers.

    Args:
        name: what to call it.
        kind: where it is from.
        search: its objectives, and the numbers that constraints are of, by name, on the examples that were searched; a
            number that is not known is missing.
        trial: its number, of a trial.
        plan: None for the full model, and where no model was there to tell.
        dev: as `search`, on dev; empty where it was not judged there, or its loss is not finite.
        against_full: on dev, its loss less the full model's, paired.
        constraints: of a trial, by name, at most 0 where they hold (`FrozenTrial.constraints`); guards are among them.
        guards: what it gives on the study's guards on dev.
        health: `Health.record` of its answers; None where it was not asked for.
    """

    name: str
    kind: Kind
    search: Mapping[str, float]
    trial: int | None = None
    plan: Plan | None = field(default=None, repr=False)
    dev: Mapping[str, float] = field(default_factory=dict)
    against_full: Interval | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)
    guards: tuple[Guarded, ...] = ()
    health: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def broken(self) -> list[str]:
        """The constraints that it breaks, guards on dev and the health report among them."""
        named = [name for name, value in self.constraints.items() if not value <= 0]
        named += [f"guard:{each.name} on dev" for each in broken(self.guards)]
        return named + ["its health report"] * (self.health is not None and self.health["verdict"] == "broken")

    @property
    def numbers(self) -> Mapping[str, float]:
        """Those of dev, or of search where it was not judged there."""
        return self.dev or self.search


@dataclass(frozen=True, eq=False)
class Front(Shown):
    """What `front_of` returns.

    Args:
        study: its name.
        description: its model, task, space and evaluation.
        objectives: their names, in the order of trials' values.
        points: trials that no other beats on search, by their first objective, the best first.
        not_judged: how many of these were not judged on dev, as they were more than `top`.
        one_shot: uniform plans of one-shot methods, by method and number of experts kept.
        full: the full model.
        cost: what `costs` are.
        costs: (trials,), what had been spent when a trial ended (`moeopt.results.optimiser_comparison.Run`).
        hypervolume: (trials,), of the front by then on search, a share of the box between `bounds`; NaN before the
            first complete trial.
        bounds: of the hypervolume, from this study's own front.
        examples: of dev; None where it was left out.
        left_out: methods that could not be run, and why.
        evaluated: evaluations that were made here; 0: all was on record.
        layer_tokens: what these cost.
    """

    study: str
    description: Mapping[str, Any]
    objectives: tuple[str, ...]
    points: tuple[Point, ...]
    not_judged: int
    one_shot: tuple[Point, ...]
    full: Point | None
    cost: Cost
    costs: Floats
    hypervolume: Floats
    bounds: Bounds
    examples: int | None = None
    left_out: tuple[str, ...] = ()
    evaluated: int = 0
    layer_tokens: int = 0

    @property
    def everything(self) -> list[Point]:
        """All points: the full model, those of one-shot methods, and those of the search."""
        return [*([] if self.full is None else [self.full]), *self.one_shot, *self.points]

    @property
    def at(self) -> Floats:
        """What the points of the search gave on search, less being better: (points, objectives)."""
        return signed((replace(point, dev={}) for point in self.points), self.objectives)

    @cached_property
    def judged(self) -> list[Point]:
        """Points of the search with numbers on dev."""
        return [point for point in self.points if point.dev]

    @cached_property
    def on_dev(self) -> list[Point]:
        """Those of `judged` that no other of them beats on dev; one that breaks a constraint is none."""
        return self._best([point for point in self.judged if not point.broken])

    @cached_property
    def best_one_shot(self) -> list[Point]:
        """Uniform one-shot plans that no other of them beats on dev; one that breaks a guard is none."""
        return self._best([point for point in self.one_shot if point.dev and not point.broken])

    @cached_property
    def beaten(self) -> dict[str, list[str]]:
        """By the name of a point of `on_dev`, the one-shot plans that beat it on dev in all objectives."""
        others = [point for point in self.one_shot if point.dev and not point.broken]
        at = signed(others, self.objectives)
        beaten = {}
        for point in self.on_dev:
            its = signed([point], self.objectives)
            better = np.flatnonzero((at <= its).all(axis=1) & (at < its).any(axis=1))
            if len(better):
                beaten[point.name] = [others[i].name for i in better]
        return beaten

    def smallest_within(self, loss: float) -> Point | None:
        """The smallest of `judged` whose loss on dev is surely at most so much above the full model's.

        That is where the upper end of its interval is. By bytes, or the first objective that is not of scores.
        """
        size = size_name(self.objectives)
        sure = [p for p in self.judged if p.against_full is not None and p.against_full.high <= loss and not p.broken]
        return None if size is None else min(sure, key=lambda p: (p.numbers[size], p.against_full.mean), default=None)  # type: ignore[union-attr]

    @property
    def sentences(self) -> list[str]:
        """What may be said of it."""
        said = [f"Trials that no other beats on the examples that were searched: {len(self.points)}."]
        if self.examples is None:
            return [*said, "On those examples all look better than they are: dev tells what is left of it."]
        if self.not_judged:
            said.append(f"{len(self.judged)} of them, spread along the front, were judged on dev.")
        said.append(f"On dev {len(self.on_dev)} of {len(self.judged)} are beaten by no other.")
        sure = self.smallest_within(0.01)
        if sure is not None:
            said.append(f"{sure.name} is the smallest that is surely within 0.01 of the full model's loss there.")
        if self.one_shot:
            names = self.beaten
            said.append(
                f"Uniform one-shot plans beat {len(names)} of the {len(self.on_dev)} on dev"
                + (f": {', '.join(f'{name} ({by[0]})' for name, by in names.items())}." if names else ".")
            )
        broken = {point.name: point.broken for point in self.points if point.broken}
        said += [f"{name} breaks {', '.join(line(each, 80) for each in which)}." for name, which in broken.items()]
        return said

    def _best(self, points: list[Point]) -> list[Point]:
        return [points[i] for i in nondominated(signed(points, self.objectives))] if points else []


def signed(points: Iterable[Point], names: tuple[str, ...]) -> Floats:
    """The numbers of points on dev, or on search where they were not judged there, less being better: (n, names)."""
    rows = [[-x if direction(n) == "maximize" else x for n, x in ((n, p.numbers[n]) for n in names)] for p in points]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def size_name(names: Iterable[str]) -> str | None:
    """What of some objectives says how small a plan is: bytes, or the first that is not of scores; None for none."""
    from moeopt.trials.objectives import OF_TASK

    sizes = [name for name in names if name.partition(":")[0] not in OF_TASK]
    return "bytes" if "bytes" in sizes else next(iter(sizes), None)
