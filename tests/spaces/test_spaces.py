from __future__ import annotations

import json
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt import genome
from moeopt.errors import SpaceError
from moeopt.plan import LayerPlan, ModelShape, Plan
from moeopt.samplers import RandomSampler
from moeopt.spaces import EEPSpace, MergeSpace, PruneSpace, Space, from_description, layer_groups

SHAPE = ModelShape(layers=5, experts=6, k=2)
PRUNING = Plan.one_hot([[0, 2, 4]] * 2 + [[1, 2, 5]] * 3, experts=6, k=2)
MERGING = Plan(
    tuple(
        LayerPlan(6, 2, w_em=np.full((3, 6), 0.1 * (1 + i // 2)), w_rm=np.eye(6)[:3] - 0.2, router="prob")
        for i in (0, 0, 2, 2, 2)
    )
)

SPACES: dict[str, Space] = {
    **{e: PruneSpace(SHAPE, keep=3, groups=2, encoding=e) for e in ("scores", "rows", "subset")},  # type: ignore[arg-type]
    "merge": MergeSpace(SHAPE, around=MERGING, groups=2),
    "merge one-hot": MergeSpace(SHAPE, around=PRUNING, groups=2, router="logit"),
    "eep": EEPSpace(SHAPE, keep=3, groups=2),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


@each_space
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_encode_inverts_decode(space: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for x in (space.sample(rng), rng.uniform(space.low, space.high)):
        plan = space.decode(x)
        again = space.encode(plan)
        assert space.decode(again).fingerprint == plan.fingerprint
        assert np.array_equal(space.encode(space.decode(again)), again)
        assert np.array_equal(space.snap(again), again)


@each_space
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_vector_is_a_plan_of_the_space(space: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(space.low - 5, space.high + 5)
    plan = space.decode(x)
    assert len(plan.layers) == 5
    assert {(layer.experts, layer.kept_experts, layer.k) for layer in plan.layers} == {(6, 3, 2)}
    for first, last in space.groups:
        assert len({plan.layers[i] for i in range(first, last + 1)}) == 1
    snapped = space.snap(x)
    assert snapped.dtype == np.float32
    assert ((snapped >= space.low) & (snapped <= space.high)).all()
    assert space.decode(snapped) == plan
    assert not np.signbit(snapped[snapped == 0]).any()


@each_space
def test_start_sample_names_and_description(space: Space) -> None:
    assert (
        space.size == len(space.names) == len(set(space.names)) == space.low.size == space.high.size == space.step.size
    )
    assert np.array_equal(space.snap(space.start()), space.start())
    rng = np.random.default_rng(0)
    draws = {space.decode(space.sample(rng)).fingerprint for _ in range(20)}
    assert len(draws) > 15
    description = space.describe()
    assert json.loads(json.dumps(description)) == description
    others = [other.describe() for other in SPACES.values() if other is not space]
    assert description not in others
    assert space.drift(space.start()) == 0.0
    assert all(space.drift(space.snap(corner)) <= space.drift_limit for corner in (space.low, space.high))


@each_space
def test_wrong_vectors(space: Space) -> None:
    with pytest.raises(SpaceError, match=f"has {space.size} numbers, got {space.size + 1}"):
        space.decode(np.zeros(space.size + 1))
    bad = space.start().copy()
    bad[1] = np.nan
    with pytest.raises(SpaceError, match=f"number '{space.names[1]}' is NaN"):
        space.snap(bad)


@pytest.mark.parametrize(("n", "r"), [(1, 1), (4, 1), (4, 4), (6, 3), (8, 4)])
def test_subsets_are_in_lexicographic_order(n: int, r: int) -> None:
    space = PruneSpace(ModelShape(layers=2, experts=n, k=1), keep=r, groups=1, encoding="subset")
    subsets = [space.decode([i]).layers[0].kept for i in range(comb(n, r))]
    assert subsets == list(combinations(range(n), r))
    for i, subset in enumerate(subsets):
        assert space.from_rows(np.array([subset])).tolist() == [i]


def test_scores_keep_the_largest() -> None:
    space = PruneSpace(ModelShape(layers=1, experts=4, k=1), keep=2)
    assert space.decode([0.1, 0.9, 0.3, 0.8]).layers[0].kept == (1, 3)
    assert space.decode([0.5, 0.5, 0.5, 0.5]).layers[0].kept == (0, 1)
    assert space.decode(space.start()).layers[0].kept == (0, 1)


def test_rows_make_way_for_each_other() -> None:
    space = PruneSpace(ModelShape(layers=1, experts=4, k=1), keep=3, encoding="rows")
    assert space.decode([3, 3, 3]).layers[0].kept == (0, 1, 3)
    assert space.decode([2.4, 0.2, 9.0]).layers[0].kept == (0, 2, 3)


def test_merge_space_moves_around_its_plan() -> None:
    space = MergeSpace(SHAPE, around=MERGING, groups=2, scale=0.1)
    assert space.decode(space.start()).fingerprint == MERGING.fingerprint
    assert np.allclose(space.high - space.start(), 0.3)
    assert np.allclose(space.start() - space.low, 0.3)
    rng = np.random.default_rng(0)
    steps = np.concatenate([space.sample(rng) - space.start() for _ in range(50)])
    assert steps.std() == pytest.approx(0.1, rel=0.05)
    layer = space.decode(space.sample(rng)).layers[0]
    assert (layer.router, layer.negative) == ("prob", "clamp")
    logit = SPACES["merge one-hot"]
    assert logit.decode(logit.sample(rng)).layers[0].router == "logit"


def test_eep_space_holds_prunings_and_mergings() -> None:
    space = EEPSpace(SHAPE, keep=3, groups=2)
    assert space.decode(space.encode(PRUNING)).fingerprint == PRUNING.fingerprint
    assert space.decode(space.encode(MERGING)) == MERGING
    assert all(space.decode(space.sample(np.random.default_rng(i))).is_one_hot for i in range(10))


@pytest.mark.parametrize(
    ("space", "plan", "message"),
    [
        ("eep", Plan.one_hot([[0, 1, 2]] * 4, experts=6, k=2), "the plan has 4 layers, the space 5"),
        ("scores", Plan.one_hot([[0, 1, 2]] * 4 + [[1, 2, 3]], experts=6, k=2), "layers 2-4 share one choice"),
        ("rows", Plan.one_hot([[0, 1]] * 5, experts=6, k=2), r"\(n, r, k\) = \(6, 2, 2\), the space \(6, 3, 2\)"),
        ("eep", PRUNING.with_k(1), r"\(6, 3, 1\), the space \(6, 3, 2\)"),
        ("scores", MERGING, "only distinct one-hot rows with the router following; this plan merges"),
        ("merge one-hot", MERGING, "the plan maps 'prob', the space 'logit'"),
        ("merge", PRUNING, "lies outside what MergeSpace can express: entries within its bounds"),
    ],
)  # fmt: skip
def test_plans_of_other_spaces(space: str, plan: Plan, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SPACES[space].encode(plan)


@pytest.mark.parametrize(
    ("groups", "layers", "expected"),
    [
        (1, 4, ((0, 3),)),
        (4, 4, ((0, 0), (1, 1), (2, 2), (3, 3))),
        (3, 8, ((0, 1), (2, 3), (4, 7))),
        (4, 32, ((0, 7), (8, 15), (16, 23), (24, 31))),
        ([(0, 2), (3, 3)], 4, ((0, 2), (3, 3))),
        ([[0, 3]], 4, ((0, 3),)),
    ],
)
def test_groups(groups: Any, layers: int, expected: tuple) -> None:
    assert layer_groups(groups, layers) == expected


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (0, "groups must be between 1 and the model's 5 MoE layers, got 0"),
        (6, "got 6"),
        ([(0, 2), (2, 4)], "layer range 2-4 overlaps the one before"),
        ([(0, 1), (3, 4)], "layer range 3-4 leaves out layer 2"),
        ([(1, 4)], "layer range 1-4 leaves out layer 0"),
        ([(0, 3)], "leave out layers from 4"),
        ([(0, 5)], "go beyond layer 4"),
        ([(0, 2), (4, 3)], "layer range 4-3 ends before it begins"),
        ([], "leave out layers from 0"),
        ("two", "groups must be an integer or"),
        (2.5, "groups must be an integer or"),
        (True, "groups must be an integer or"),
    ],
)
def test_bad_groups(groups: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        PruneSpace(SHAPE, keep=3, groups=groups)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneSpace(SHAPE, keep=7), "keep=7 asks for more experts than the 6 each layer has"),
        (lambda: EEPSpace(SHAPE, keep=1), "keep=1 is fewer than the k=2 experts each token activates"),
        (lambda: EEPSpace(SHAPE, keep=3, k=0), "k must be at least 1, got 0"),
        (lambda: PruneSpace(SHAPE, keep=2.5), "keep must be an integer, got 2.5"),  # type: ignore[arg-type]
        (lambda: PruneSpace(SHAPE, keep=True), "keep must be an integer, got True"),
        (lambda: EEPSpace(SHAPE, keep=3, router="rows"), "router must be 'prob' or 'logit', got 'rows'"),  # type: ignore[arg-type]
        (lambda: PruneSpace(SHAPE, keep=3, encoding="bits"), "encoding must be one of rows, scores, subset, got"),  # type: ignore[arg-type]
        (lambda: PruneSpace(ModelShape(1, 64, 2), keep=32, encoding="subset"), "too many for encoding='subset'"),
        (lambda: MergeSpace(SHAPE, around=MERGING, groups=2, scale=0.0), "scale must be a positive number, got 0.0"),
        (lambda: MergeSpace(SHAPE, around=MERGING, groups=1), "layers 0-4 share one choice in this space, but differ"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_fewer_active_experts() -> None:
    space = PruneSpace(SHAPE, keep=3, k=1)
    assert {layer.k for layer in space.decode(space.start()).layers} == {1}
    assert space.group_names() == ["L0", "L1", "L2", "L3", "L4"]
    assert PruneSpace(ModelShape(32, 8, 2), keep=4, groups=4).group_names() == ["L00-07", "L08-15", "L16-23", "L24-31"]


@each_space
def test_live_and_frozen_trials_hold_the_same_plan(space: Space) -> None:
    study = optuna.create_study(sampler=RandomSampler(space, seed=0))
    live = []

    def objective(trial: optuna.Trial) -> float:
        live.append(space.plan(trial))
        assert space.plan(trial) == live[-1]
        return 0.0

    study.optimize(objective, n_trials=3)
    assert [space.plan(trial) for trial in study.trials] == live
    assert len({plan.fingerprint for plan in live}) == 3
    assert all(len(trial.params) == (space.size if space.size <= 48 else 1) for trial in study.trials)


@pytest.mark.parametrize("encoding", ["scores", "rows", "subset"])
def test_small_spaces_work_with_a_plain_optuna_sampler(encoding: Any) -> None:
    space = PruneSpace(SHAPE, keep=3, groups=2, encoding=encoding)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    live = []
    study.optimize(lambda trial: live.append(space.plan(trial)) or 0.0, n_trials=4)  # type: ignore[func-returns-value]
    assert [space.plan(trial) for trial in study.trials] == live
    assert all(genome.read(trial) is None for trial in study.trials)


def test_large_spaces_refuse_a_plain_optuna_sampler() -> None:
    space = EEPSpace(SHAPE, keep=3, groups=2)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler()).ask()
    with pytest.raises(SpaceError, match=r"a space of 72 numbers needs a sampler .*ShadowSampler\(space, sampler\)"):
        space.plan(trial)


def test_trials_of_other_studies() -> None:
    space = PruneSpace(SHAPE, keep=3, groups=2)
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(SpaceError, match=r"no genotype of this space: parameter 'score.L0-1.E0' is missing"):
        space.plan(study.trials[0])
    other = PruneSpace(SHAPE, keep=3, groups=3)
    study = optuna.create_study(sampler=RandomSampler(other, seed=0))
    with pytest.raises(SpaceError, match="holds 18 numbers, this space has 12"):
        space.plan(study.ask())


def test_a_released_solution_keeps_its_treatment_of_negative_probabilities() -> None:
    shape = ModelShape(2, 4, 2)
    w_rm = np.array([[0.9, -0.2, 0.1, 0.0], [0.1, 0.8, 0.0, -0.1]], dtype=np.float32)
    layer = LayerPlan(4, 2, w_em=w_rm + 0.05, w_rm=w_rm, router="prob", negative="eep")
    solution = Plan((layer, layer))
    with pytest.raises(SpaceError, match="negative='eep'"):
        EEPSpace(shape, keep=2).encode(solution)
    for space in (EEPSpace(shape, keep=2, negative="eep"), MergeSpace(shape, around=solution)):
        assert space.decode(space.encode(solution)) == solution
        assert from_description(space.describe()).decode(space.encode(solution)) == solution
