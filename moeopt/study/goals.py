"""What the trials of an objective are told by: the values of its objectives, and its constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import StudyError, nearest
from moeopt.study.latency import Latency
from moeopt.study.quantities import QUANTITIES, Quantity
from moeopt.study.scores import penalty
from moeopt.trials.objectives import LOSS, OF_TASK, PREFIX, Direction, check_constraints, check_names, direction

if TYPE_CHECKING:
    from moeopt.evaluation import Evaluation, Evaluator
    from moeopt.plan import Plan


class Goals:
    """The objectives and constraints of an `Objective`.

    Args:
        evaluator: what gives the scores.
        objectives: their names (`moeopt.trials.objectives`).
        constraints: texts such as ``"bytes <= 24GB"``.
        active_weight: what an active expert adds to the loss.

    Raises:
        StudyError: naming an objective or a constraint that is none, or that the task does not have.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        objectives: Sequence[str] = (LOSS,),
        constraints: Sequence[str] = (),
        active_weight: float = 0.0,
    ) -> None:
        self.objectives, self.constraints = check_names(objectives), check_constraints(constraints)
        self._evaluator, self._active_weight = evaluator, active_weight
        names = dict.fromkeys((*self.objectives, *(each.name for each in self.constraints)))
        for name in names:
            self._check_has(name)
        self.names = tuple(names)
        self.quantities: dict[str, Quantity] = {
            name: QUANTITIES[name](evaluator.model) for name in names if name in QUANTITIES
        }
        self.latency = Latency(evaluator) if "latency" in names else None
        if self.latency is not None:
            self.quantities["latency"] = self.latency

    def _check_has(self, name: str) -> None:
        members, (_, _, member) = self._evaluator.task.members, name.partition(":")
        if name == "worst" and not members:
            raise StudyError("objective 'worst' is that of the members of a mixture, and the task is none")
        if member and member not in members:
            have = f"it has {', '.join(members)}" if members else "it is no mixture"
            raise StudyError(
                f"objective {name!r}: the task has no member {member!r}{nearest(member, list(members))}; {have}"
            )

    @property
    def directions(self) -> list[Direction]:
        """What Optuna makes a study of these objectives with."""
        return [direction(name) for name in self.objectives]

    @property
    def needs_reference(self) -> bool:
        """Whether the full model's scores are needed."""
        return "worst" in self.names

    @property
    def races(self) -> bool:
        """Whether a trial can be raced by its loss: all other objectives are known before it is evaluated."""
        others = [name for name in self.objectives if name != LOSS]
        return LOSS in self.objectives and all(
            name in self.quantities and not self.quantities[name].needs_evaluation for name in others
        )

    def early(self, plan: Plan) -> dict[str, float]:
        """The numbers of a plan that need no evaluation, by name."""
        return {
            name: quantity(plan, None) for name, quantity in self.quantities.items() if not quantity.needs_evaluation
        }

    def numbers(
        self, plan: Plan, evaluation: Evaluation, reference: NDArray[np.float32] | None = None
    ) -> dict[str, float]:
        """All numbers that objectives and constraints are of, by name.

        Args:
            plan: it.
            evaluation: of it, on all examples.
            reference: the full model's scores, (3, examples), where they are needed.
        """
        return {
            name: self.quantities[name](plan, evaluation)
            if name in self.quantities
            else self._score(name, evaluation, reference)
            for name in self.names
        }

    def values(self, numbers: Mapping[str, float]) -> float | tuple[float, ...]:
        """What a trial is told: a number, or one for each objective where there are several."""
        values = tuple(numbers[name] for name in self.objectives)
        return values if len(values) > 1 else values[0]

    def constraint_attributes(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Attributes of a trial that hold its constraints, as far as their numbers are there."""
        return {PREFIX + str(each): each.value(numbers[each.name]) for each in self.constraints if each.name in numbers}

    def describe(self) -> dict[str, Any]:
        """What a study must agree on, JSON; empty for the loss alone."""
        about: dict[str, Any] = {}
        if self.objectives != (LOSS,):
            about["objectives"] = list(self.objectives)
        if self.constraints:
            about["constraints"] = [str(each) for each in self.constraints]
        described = {name: quantity.describe() for name, quantity in self.quantities.items()}
        described = {name: value for name, value in described.items() if value is not None}
        return about | ({"quantities": described} if described else {})

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a recipe holds."""
        return {key: value for key, value in self.describe().items() if key != "quantities"}

    @cached_property
    def _places(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        return self._evaluator.task.places(self._evaluator.requests)

    def _score(self, name: str, evaluation: Evaluation, reference: NDArray[np.float32] | None) -> float:
        kind, _, member = name.partition(":")
        if kind == "worst":
            assert reference is not None
            differences = evaluation.losses.astype(np.float64) - reference[0]
            return max(self._of_member(each, differences, evaluation) for each in self._places)
        if member:
            return self._of_member(member, evaluation.losses if kind == LOSS else evaluation.correct, evaluation)
        assert kind in OF_TASK
        return evaluation.loss + penalty(self._active_weight, evaluation) if kind == LOSS else evaluation.accuracy

    def _of_member(self, member: str, values: NDArray[np.floating[Any]], evaluation: Evaluation) -> float:
        """A mean over the examples of a mixture's member, weighted as in its own task."""
        if member not in self._places:
            raise StudyError(f"member {member!r} of the mixture has no example among those in use; set a larger limit")
        at, scale = self._places[member]
        return float(np.average(values[at].astype(np.float64), weights=evaluation.weights[at] / scale))
