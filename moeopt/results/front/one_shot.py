"""Uniform plans of one-shot methods, which a front is held against; a study keeps them, so that none is made twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import MethodError, StorageError
from moeopt.evaluation.store import digest
from moeopt.plan import Plan
from moeopt.study.storage.attributes import study_attributes, write_study
from moeopt.trials import genome

if TYPE_CHECKING:
    import optuna

    from moeopt.methods import Calibration
    from moeopt.spaces import Space

ONE_SHOT = "moeopt:one_shot:"
"""System attributes of a study: kept experts of a method's uniform plan, packed, by digest of model and examples."""
MOST = 7
"""Numbers of experts kept, unless they are given."""


def one_shot_name(method: str, keep: int, experts: int) -> str:
    """What to call a method's uniform plan."""
    return f"{method}, {keep} of {experts}"


def uniform_keeps(space: Space, most: int | None = MOST) -> list[int]:
    """Numbers of experts, the same in all layers, among which a space searches, but all n: `most` of them, or all.

    They are multiples of the groups that routers choose first, and at least k.
    """
    shape = space.shape
    low = space.keep if space.keep_range is None else space.keep_range.low
    step = shape.router_groups
    possible = [r for r in range(step, shape.experts, step) if max(low, space.k) <= r <= space.keep]
    count = len(possible) if most is None else min(most, len(possible))
    at = np.unique(np.linspace(0, len(possible) - 1, count).round().astype(int))
    return [possible[i] for i in at]


def uniform_plans(
    study: optuna.Study,
    space: Space,
    names: Sequence[str],
    keeps: Sequence[int],
    scored: str,
    calibration: Callable[[], Calibration],
) -> tuple[dict[tuple[str, int], Plan], list[str]]:
    """By method and number of experts kept, the plans, from the study where it holds them; and what could not be made.

    Args:
        study: keeps them.
        space: whose shape and k they have.
        names: of methods.
        keeps: numbers of experts.
        scored: names model, examples and score that methods look at (`moeopt.evaluation.store.scores_name`).
        calibration: makes what methods look at, where something is missing.
    """
    held = study_attributes(study)
    plans: dict[tuple[str, int], Plan] = {}
    left_out: list[str] = []
    looked: Calibration | None = None
    for keep in keeps:
        keys = {name: f"{ONE_SHOT}{digest(scored, name, keep, space.k)}" for name in names}
        missing = [name for name in names if keys[name] not in held]
        if missing:
            looked = looked or calibration()
            made = _made(missing, looked, keep, space.k, left_out)
            for name, plan in made.items():
                kept = np.array([layer.kept for layer in plan.layers], dtype=np.float32)
                write_study(study, genome.pack(keys[name], kept.reshape(-1)))
        for name in names:
            if name not in missing:
                plans[name, keep] = _unpacked(keys[name], held, space, keep)
            elif name in made:
                plans[name, keep] = made[name]
    return plans, left_out


def _made(names: Sequence[str], looked: Calibration, keep: int, k: int, left_out: list[str]) -> dict[str, Plan]:
    """The plans of methods by name, in as few passes as that takes; those that cannot be made are noted."""
    from moeopt import methods

    try:
        return {name: made.plan for name, made in methods.plans(names, looked, keep=keep, k=k).items()}
    except MethodError as error:
        if len(names) == 1:
            left_out.append(f"{names[0]}, {keep} experts: {error}")
            return {}
        return {key: plan for name in names for key, plan in _made([name], looked, keep, k, left_out).items()}


def _unpacked(key: str, attributes: Mapping[str, Any], space: Space, keep: int) -> Plan:
    numbers = genome.unpack(key, attributes)
    shape = space.shape
    if numbers is None or numbers.size != shape.layers * keep or not np.isin(numbers, np.arange(shape.experts)).all():
        raise StorageError(f"attribute {key!r} is damaged: it holds no {keep} experts for {shape.layers} layers")
    return Plan.one_hot(numbers.astype(int).reshape(shape.layers, keep).tolist(), experts=shape.experts, k=space.k)
