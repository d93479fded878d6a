"""Walks along a front: steps against all that there are, and the scalar functions that slots minimise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt.plan import ModelShape
from moeopt.samplers.history import Observation
from moeopt.samplers.steps import Steps
from moeopt.samplers.tradeoffs import RHO, scalarisation, scalarised, weights
from moeopt.spaces import PruneSpace, Space
from moeopt.trials.front import nondominated

SHAPE = ModelShape(layers=5, experts=6, k=2)
GROUPED = ModelShape(layers=5, experts=6, k=2, router_groups=2)
SPACES: dict[str, Space] = {
    "fixed": PruneSpace(SHAPE, keep=3, groups=3),
    "range": PruneSpace(SHAPE, keep=(2, 5), groups=3),
    "total": PruneSpace(SHAPE, keep=(2, 5), total=17, groups=3),
    "grouped": PruneSpace(GROUPED, keep=(2, 6), total=18, groups=3),
}


def neighbours(space: Space, kept: np.ndarray) -> list[np.ndarray]:
    """All prunings a step away: one group has others, fewer, or more, or, if that has no room, fewer in another."""
    unit, (groups, n) = space.shape.router_groups, kept.shape
    blocks = np.arange(n) * unit // n
    toggled = []
    for g in range(groups):
        for out in [None, *np.flatnonzero(kept[g])]:
            for into in [None, *np.flatnonzero(~kept[g])]:
                if out is not None and into is not None and blocks[out] == blocks[into]:
                    child = kept.copy()
                    child[g, out], child[g, into] = False, True
                    toggled.append(child)
    if space.keep_range is None:
        return toggled
    fewer: list[Any] = []
    more: list[Any] = []
    for g in range(groups):
        for chosen, held in ((fewer, kept[g]), (more, ~kept[g])):
            options = [np.flatnonzero(held & (blocks == b)) for b in range(unit)]
            for each in np.stack(np.meshgrid(*options), -1).reshape(-1, unit) if all(map(len, options)) else ():
                child = kept.copy()
                child[g, each] = not kept[g, each[0]]
                chosen.append((g, child))
    room = space.keep_range.room(kept.sum(axis=1))
    changes = [child for _, child in (*fewer, *more)]
    changes += [np.where(a != kept, a, b) for g, a in fewer for h, b in more if g != h and not room[h]]
    layers = np.array([last - first + 1 for first, last in space.groups])
    low, high, total = space.keep_range.low, space.keep_range.high, space.keep_range.total or 1000

    def possible(child: np.ndarray) -> bool:
        counts = child.sum(axis=1)
        return bool((counts >= low).all() and (counts <= high).all() and counts @ layers <= total)

    return [*toggled, *filter(possible, changes)]


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_step_is_the_best_of_all(name: str, seed: int) -> None:
    space, rng = SPACES[name], np.random.default_rng(seed)
    kept, values = space.kept(space.sample(rng)), rng.standard_normal((3, 6))
    price = float(rng.uniform(-0.5, 0.5))
    layers = np.array([last - first + 1 for first, last in space.groups])

    def cost(child: np.ndarray) -> float:
        return float(values[child].sum() + price * (child.sum(axis=1) @ layers))

    walk = Steps(space, values).walk(kept, lambda loss, experts: loss + price * experts, 0, 1)
    best = min([cost(kept), *map(cost, neighbours(space, kept))])
    assert walk.gained == pytest.approx(cost(kept) - best, abs=1e-9)
    assert cost(walk.kept) == pytest.approx(best, abs=1e-9)
    assert walk.groups.tolist() == np.flatnonzero((walk.kept != kept).any(axis=1)).tolist()
    far = Steps(space, values).walk(kept, lambda loss, experts: loss + price * experts, 1, 50)
    assert np.array_equal(far.kept[0], kept[0])
    assert far.gained >= 0
    x = space.with_kept(space.sample(rng), far.kept, range(3))
    assert np.array_equal(space.kept(x), far.kept)


def observation(slot: int, values: tuple[float, ...], broken: float = 0.0) -> Observation:
    return Observation(
        number=slot, slot=slot, x=np.zeros(1, np.float32), loss=values[0], failed=False, fingerprint=str(slot),
        operator="", attrs={}, values=values, constraints={"c": broken},
    )  # fmt: skip


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=9, unique=True), st.integers(0, 99))
def test_every_slot_has_its_best_on_the_front(values: list[tuple[float, ...]], slot: int) -> None:
    history = [observation(i, each) for i, each in enumerate(values)]
    chosen = scalarisation(history, slot, seed=3)
    assert chosen is not None
    told = scalarised([*history, observation(99, (-9.0, -9.0, -9.0), broken=1.0)], chosen)
    best = min(told, key=lambda obs: obs.loss or 0.0)
    assert best.slot in nondominated(np.array(values, dtype=float))
    assert told[-1].loss == max(obs.loss or 0.0 for obs in told)
    z = chosen.weights * chosen.bounds.scaled(np.array(values, dtype=float))
    assert [obs.loss for obs in told[:-1]] == pytest.approx((z.max(axis=1) + RHO * z.sum(axis=1)).tolist())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_weights_are_spread_over_the_simplex(count: int) -> None:
    drawn = np.array([weights(slot, count, seed=1) for slot in range(400)])
    assert np.allclose(drawn.sum(axis=1), 1)
    assert (drawn > 0).all()
    assert np.allclose(drawn.mean(axis=0), 1 / count, atol=0.02)
    assert np.allclose(np.quantile(drawn[:, 0], 0.5), 1 - 0.5 ** (1 / (count - 1)), atol=0.03)  # uniform: its median
    assert not np.array_equal(weights(0, count, seed=1), weights(0, count, seed=2))
