"""Trials that a study tries first: plans, and what one-shot methods make of the objective's examples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from moeopt.errors import MoeoptError, SpaceError, got
from moeopt.plan import Plan
from moeopt.spaces import Space
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.genome import CALIBRATION, METHOD, WARM_START

if TYPE_CHECKING:
    from moeopt.methods import MethodPlan
    from moeopt.spaces.keep_range import KeepRange
    from moeopt.study.objective import Objective

WarmStarts = Literal["auto"] | Iterable["Plan | str"] | Mapping[str, "Plan | MethodPlan"]
"""Plans and names of one-shot methods, plans by name, or what the study takes by itself."""
AUTO = "auto"
CHOICE = ("naee", "loss_aware")
"""What ``"auto"`` stands for: the kept sets that change the layers' outputs least, and the loss."""
MOST_OF_NAEE = 64
"""Experts of a layer beyond which it stands for the last alone: NAEE's Gram matrices take 4 n (n + 1) bytes a token."""


STARTS = 4
"""Numbers of experts that a search of a range without a total starts from, the ends included."""


def automatic(space: Space) -> tuple[str, ...]:
    """Names of the methods that ``"auto"`` stands for; none where the space holds no prunings of its own."""
    if "prune" not in space.phases:
        return ()
    if space.keep_range is not None:
        return ("loss_aware_budgets",) if space.keep_range.total is None else ("loss_aware", "loss_aware_budgets")
    return CHOICE if space.shape.experts <= MOST_OF_NAEE else CHOICE[-1:]


def checked(given: WarmStarts, space: Space) -> list[tuple[str | None, Plan | MethodPlan | None]]:
    """Method and plan of every warm start, checked; a method that has yet to be run comes without a plan."""
    if given == AUTO and isinstance(given, str):
        given = automatic(space)
    if isinstance(given, (str, Plan)) or not isinstance(given, Iterable):
        raise SpaceError(
            f"warm_starts is 'auto', or a list of plans and names of methods, such as ['naee'], got {got(given)}"
        )
    if isinstance(given, Mapping):
        starts: list[tuple[str | None, Plan | MethodPlan | None]] = list(given.items())
    else:
        starts = [(start, None) if isinstance(start, str) else (None, start) for start in given]
    for name, start in starts:
        if start is not None:
            plan = start if isinstance(start, Plan) else getattr(start, "plan", None)
            if not isinstance(plan, Plan):
                raise SpaceError(f"a warm start is a plan or a method's name, got {got(start)}")
            space.encode(plan)
        else:
            assert name is not None
            check_expressible(name, space)
    return starts


def check_expressible(method: str, space: Space) -> None:
    """Raise MethodError for an unknown method, SpaceError for one whose plans the space does not hold."""
    from moeopt.methods.names import BUDGETED, PROGRESSIVE, parsed

    name = parsed(method)
    router = name.router
    if not name.sums_experts:
        raise SpaceError(
            f"{method} orders neurons, or merges by other means than sums, which no search space expresses"
        )
    if router == "alias":
        raise SpaceError(
            f"{method} aliases what the router picks, which no search space expresses; start from {method}_summed"
        )
    if router == "whole":
        raise SpaceError(f"{method} has novices, constants in place of experts, which no search space expresses")
    if router == "prob" and (space.router != "prob" or "merge" not in space.phases):
        raise SpaceError(f"{method} maps probabilities, which this space does not; search an EEPSpace(router='prob')")
    if name.method in BUDGETED and space.keep_range is None:
        raise SpaceError(f"{method} keeps of each layer a number of its own, which this space does not")
    if name.method in PROGRESSIVE and len(space.groups) < space.shape.layers:
        raise SpaceError(f"{method} goes layer by layer, but layers share a choice in this space's groups")


def calibrated(
    starts: list[tuple[str | None, Plan | MethodPlan | None]],
    objective: Objective,
    existing_attrs: list[dict[str, Any]],
    *,
    optional: bool,
) -> list[tuple[str | None, Plan | MethodPlan]]:
    """The warm starts with their plans; methods that the study already ran are left out.

    Args:
        optional: whether a method that cannot be run here is left out, with a warning, as nobody asked for it.
    """
    run = {attrs.get(METHOD) for attrs in existing_attrs}
    new = [name for name, start in starts if start is None and name is not None and name not in run]
    made: dict[str, list[MethodPlan]] = {}
    try:
        made = plans_of_methods(new, objective) if new else {}
    except MoeoptError:
        if not optional:
            raise
        for name in new:
            try:
                made |= plans_of_methods([name], objective)
            except MoeoptError as error:
                warnings.warn(f"the search does not start from {name}: {error}", stacklevel=3)
    planned: list[tuple[str | None, Plan | MethodPlan]] = []
    for named, start in starts:
        planned += [(named, each) for each in (made.get(named or "", []) if start is None else [start])]
    return planned


def plans_of_methods(names: Iterable[str], objective: Objective) -> dict[str, list[MethodPlan]]:
    """What one-shot methods make of an objective's examples, for its space, with k and skip as at its start.

    One plan of each; where the space searches a range of numbers of experts, one that uses up its total, or without a
    total `STARTS` of them, from the fewest to the most.

    Raises:
        MethodError: as `moeopt.methods.plans`.
    """
    from moeopt import methods
    from moeopt.methods.base import Budget
    from moeopt.methods.budgets import allocated
    from moeopt.methods.names import BUDGETED, parsed

    names = list(names)
    options = {name: objective.settings[name] for name in ("split", "limit", "max_length", "score")}
    options["batch_tokens"] = objective.evaluator.batch_tokens  # fewer than in the settings where memory ran out
    calibration = methods.Calibration(objective.model, objective.tokenizer, objective.task, **options)
    space, start = objective.space, objective.space.decode(objective.space.start()).layers
    k, kept = max(layer.k for layer in start), space.keep_range
    uniform = [name for name in names if parsed(name).method not in BUDGETED]
    made: dict[str, list[MethodPlan]] = {name: [] for name in names}
    for keep in [space.keep] if kept is None else _starts(kept):
        for name, plan in methods.plans(uniform, calibration, keep=keep, k=k, groups=space.groups).items():
            made[name].append(plan)
    if kept is not None:
        budget = Budget(space.shape.experts, space.shape.k, kept.high, k, router_groups=space.shape.router_groups)
        for name in made.keys() - set(uniform):
            totals = [kept.total] if kept.total is not None else [r * space.shape.layers for r in _starts(kept)]
            made[name] = [
                allocated(calibration, budget, space.groups, total=total, low=kept.low, high=kept.high)
                for total in totals
            ]

    def started(plan: Plan) -> Plan:
        return Plan(tuple(replace(a, k=b.k, skip=b.skip) for a, b in zip(plan.layers, start)))

    return {name: [replace(each, plan=started(each.plan)) for each in plans] for name, plans in made.items()}


def _starts(kept: KeepRange) -> list[int]:
    """Numbers of experts, the same for all layers, that a search of a range starts from."""
    if kept.total is not None:
        alike = min(kept.high, kept.total // sum(kept.layers)) // kept.unit * kept.unit
        return [alike]
    return sorted({round(r / kept.unit) * kept.unit for r in np.linspace(kept.low, kept.high, STARTS)})


def enqueue_new(
    study: optuna.Study,
    space: Space,
    starts: list[tuple[str | None, Plan | MethodPlan]],
    existing_attrs: list[dict[str, Any]],
) -> None:
    """Queue the warm starts that the study does not hold yet, each once however many workers do so at the same time."""
    team = attributes.team(study)
    for name, start in starts:
        plan = start if isinstance(start, Plan) else start.plan
        attrs: dict[str, Any] = {WARM_START: plan.fingerprint}
        if name is not None:
            attrs[METHOD] = name
        if any(attrs.items() <= attrs_there.items() for attrs_there in existing_attrs):
            continue
        cost = {} if isinstance(start, Plan) else {CALIBRATION: start.layer_tokens}
        if team is None:
            enqueue(study, space, plan, **attrs, **cost)
        else:
            team.storage.create_once(team.study_id, _waiting(space, plan, {**attrs, **cost}), attrs)


def enqueue(study: optuna.Study, space: Space, plan: Plan, **user_attrs: Any) -> None:
    """Queue a plan as the study's next trial.

    Raises:
        SpaceError: when the plan is not one of the space.
    """
    study.add_trial(_waiting(space, plan, user_attrs))


def _waiting(space: Space, plan: Plan, user_attrs: dict[str, Any]) -> FrozenTrial:
    return genome.waiting(genome.pack(genome.GENOME, space.encode(plan)), user_attrs)
