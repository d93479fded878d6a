from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt.errors import SpaceError
from moeopt.plan import LayerPlan, ModelShape, Plan
from moeopt.samplers import RandomSampler
from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace, Space, from_description, layer_groups
from moeopt.spaces.keep_range import KeepRange
from moeopt.spaces.rows import router_rows
from moeopt.trials import genome

SHAPE = ModelShape(layers=5, experts=6, k=2)
GROUPED = ModelShape(layers=5, experts=6, k=2, router_groups=2)
PRUNING = Plan.one_hot([[0, 2, 4]] * 2 + [[1, 2, 5]] * 3, experts=6, k=2)
MERGING = Plan(
    tuple(
        LayerPlan(6, 2, w_em=np.full((3, 6), 0.1 * (1 + i // 2)), w_rm=np.eye(6)[:3] - 0.2, router="prob")
        for i in (0, 0, 2, 2, 2)
    )
)
ALIASES = np.repeat(np.eye(3, dtype=np.float32), 2, axis=1)
MIXED = Plan(
    (
        LayerPlan(6, 2, kept=(0, 2, 4)),
        LayerPlan(6, 1, w_em=ALIASES / 2, w_rm=ALIASES, router="alias"),
        LayerPlan(6, 2, kept=(0, 1, 3), router="logit", w_rm=np.full((3, 6), 0.5)),
        *MERGING.layers[3:],
    )
)

SPACES: dict[str, Space] = {
    **{e: PruneSpace(SHAPE, keep=3, groups=2, encoding=e) for e in ("scores", "rows", "subset")},  # type: ignore[arg-type]
    "merge": MergeSpace(SHAPE, around=MERGING, groups=2),
    "merge one-hot": MergeSpace(SHAPE, around=PRUNING, groups=2, router="logit"),
    "eep": EEPSpace(SHAPE, keep=3, groups=2),
    "active scores": ActiveSpace(PruneSpace(SHAPE, keep=3, groups=2), k=(1, 3), skip=True, groups=3),
    "active subset": ActiveSpace(PruneSpace(SHAPE, keep=3, groups=2, encoding="subset"), k=(1, 2)),
    "active merge": ActiveSpace(MergeSpace(SHAPE, around=MERGING, groups=2), skip=(0.1, 0.6), groups=1),
    "active eep": ActiveSpace(EEPSpace(SHAPE, keep=3, groups=2), k=(1, 2), skip=True),
    "active alone": ActiveSpace(SHAPE, k=(1, 4), skip=True),
    "active around": ActiveSpace(SHAPE, around=MIXED, k=(1, 3)),
}
SPACES |= {
    **{f"grouped {e}": PruneSpace(GROUPED, keep=4, encoding=e) for e in ("scores", "rows", "subset")},  # type: ignore[arg-type]
    "grouped eep": EEPSpace(GROUPED, keep=4, router="logit"),
    "grouped eep rows": EEPSpace(GROUPED, keep=4, router="rows"),
    "eep rows": EEPSpace(SHAPE, keep=3, groups=2, router="rows"),
    "merge rows": MergeSpace(SHAPE, around=PRUNING, groups=2, router="rows"),
}
UNEVEN = Plan.one_hot([[0, 2]] * 2 + [[1, 2, 4, 5]] * 3, experts=6, k=2)
ORDER = [[3, 1, 0, 5, 4, 2]] * 2 + [[0, 1, 2, 3, 4, 5]] * 3
SPACES |= {
    **{
        f"range {e}": PruneSpace(SHAPE, keep=(2, 5), total=16, groups=2, encoding=e)  # type: ignore[arg-type]
        for e in ("scores", "rows")
    },
    "range": PruneSpace(SHAPE, keep=(2, 5)),
    "order": PruneSpace(SHAPE, keep=(2, 6), total=20, order=ORDER),
    "range eep": EEPSpace(SHAPE, keep=(2, 4), total=15, groups=2),
    "range eep rows": EEPSpace(SHAPE, keep=(2, 4), router="rows"),
    "range merge": MergeSpace(SHAPE, around=UNEVEN, keep=(2, 5), total=20, groups=2),
    "merge uneven": MergeSpace(SHAPE, around=UNEVEN, groups=2),
    "grouped range": PruneSpace(GROUPED, keep=(2, 4), total=18),
    "grouped order": PruneSpace(GROUPED, keep=(2, 6), total=20, order=ORDER),
    "grouped range eep": EEPSpace(GROUPED, keep=(2, 4), total=16, router="logit"),
    "active range": ActiveSpace(PruneSpace(SHAPE, keep=(2, 5), total=16, groups=2), k=(1, 2), skip=True),
    "active range eep": ActiveSpace(EEPSpace(SHAPE, keep=(2, 4), groups=2), k=(1, 2)),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


@pytest.mark.slow
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
    low, high = getattr(space, "k_range", None) or (2, 2)
    fewest = space.keep_range.low if space.keep_range else int(space.fixed_counts.min())
    assert {layer.experts for layer in plan.layers} == {6}
    assert all(fewest <= layer.kept_experts <= space.keep for layer in plan.layers)
    if space.keep_range is not None and space.keep_range.total is not None:
        assert sum(layer.kept_experts for layer in plan.layers) <= space.keep_range.total
    assert all(low <= layer.k <= high for layer in plan.layers)
    if space.router == "rows" or space.shape.router_groups > 1:
        rows = [layer.router_rows for layer in plan.layers if layer.router_rows is not None]
        assert all(len(set(row)) == len(row) for row in rows)
        for row in rows:
            blocks = np.arange(len(row)) // (len(row) // space.shape.router_groups)
            assert (np.array(row) // (6 // space.shape.router_groups) == blocks).all()
        assert space.router != "rows" or len(rows) == 5
    for first, last in space.groups:
        assert len({replace(plan.layers[i], k=1) for i in range(first, last + 1)}) == 1
    for first, last in space.extra_groups:
        assert len({(plan.layers[i].k, plan.layers[i].skip) for i in range(first, last + 1)}) == 1
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
    assert len(draws) > 12
    description = space.describe()
    assert json.loads(json.dumps(description)) == description
    others = [other.describe() for other in SPACES.values() if other is not space]
    assert description not in others
    same = from_description(json.loads(json.dumps(description)))
    assert same.describe() == description
    assert [same.decode(x) for x in (space.low, space.high)] == [space.decode(x) for x in (space.low, space.high)]
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


RANGES = st.builds(
    lambda low, more, layers, unit, share: (low, low + more, layers, unit, share),
    st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 2),
    st.floats(0, 1),
)  # fmt: skip


@given(RANGES, st.lists(st.floats(-3, 12), min_size=4, max_size=4))
def test_counts_hold_the_total_and_change_as_little_as_that_takes(shape: tuple, wished: list[float]) -> None:
    low, high, layers, unit, share = shape
    low, high, layers = low * unit, high * unit, tuple(layers)
    least, most = low * sum(layers), high * sum(layers)
    keep = KeepRange(low, high, least + round(share * (most - least)), layers, unit)
    wishes = np.array(wished[: len(layers)])
    possible = [c for c in product(range(low, high + 1, unit), repeat=len(layers)) if np.dot(c, layers) <= keep.total]
    rounded = np.clip(np.rint(wishes / unit) * unit, low, high)
    for counts in (keep.cap(wishes), keep.fill(wishes)):
        assert tuple(counts.tolist()) in possible
    capped, filled = keep.cap(wishes), keep.fill(wishes)
    assert np.array_equal(capped, rounded) == (np.dot(rounded, layers) <= keep.total)
    assert not keep.room(filled).any()
    assert all(tuple(filled + unit * (np.arange(len(layers)) == g)) not in possible for g in range(len(layers)))
    shifted = keep.shift(np.random.default_rng(0), wishes, [0])
    assert tuple(shifted.tolist()) in possible
    assert np.array_equal(keep.cap(capped), capped)


def test_a_range_spares_what_it_does_not_keep() -> None:
    space = PruneSpace(SHAPE, keep=(2, 5), groups=2)
    x = space.encode(UNEVEN)
    assert space.counts(x).tolist() == [2, 4]
    assert [np.flatnonzero(kept).tolist() for kept in space.kept(x)] == [[0, 2], [1, 2, 4, 5]]
    more = space.decode(space.with_counts(x, [3, 3]))
    assert set(more.layers[0].kept or ()) > {0, 2}
    assert set(more.layers[2].kept or ()) < {1, 2, 4, 5}
    with pytest.raises(SpaceError, match=r"the space \(6, '3 to 5', 2\)"):
        PruneSpace(SHAPE, keep=(3, 5), groups=2).encode(UNEVEN)
    with pytest.raises(SpaceError, match="15 experts at most"):
        PruneSpace(SHAPE, keep=(2, 5), total=15, groups=2).encode(UNEVEN)


def test_an_order_keeps_the_first() -> None:
    space = PruneSpace(SHAPE, keep=(2, 6), order=ORDER)
    plan = space.decode(space.with_counts(space.start(), [2, 3, 4, 5, 6]))
    assert [set(layer.kept or ()) for layer in plan.layers] == [set(o[:r]) for o, r in zip(ORDER, (2, 3, 4, 5, 6))]
    assert space.names == tuple(f"keep.L{i}" for i in range(5))
    with pytest.raises(SpaceError, match="outside what PruneSpace can express"):
        space.encode(Plan.one_hot([[0, 1]] * 5, experts=6, k=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": (2, 7)}, r"a range \(low, high\) with 1 <= low < high <= 6, got \(2, 7\)"),
        ({"keep": (3, 3)}, "1 <= low < high"),
        ({"keep": (2, 3, 4)}, "1 <= low < high"),
        ({"keep": (1, 3)}, "keep=1 is fewer than the k=2"),
        ({"keep": 3, "total": 12}, "total=12 needs keep as a range"),
        ({"keep": (2, 4), "total": 9}, "total must be from 10 to 20 experts, 2 to 4 in each of 5 layers, got 9"),
        ({"keep": (2, 4), "encoding": "subset"}, "numbers sets of one size"),
        ({"keep": 3, "order": ORDER}, "order needs keep as a range"),
        ({"keep": (2, 4), "order": ORDER[:4]}, "order must rank all 6 experts of each of 5 layers"),
        ({"keep": (2, 4), "order": [[0, 0, 1, 2, 3, 4]] * 5}, "order must rank all 6 experts"),
        ({"keep": (2, 4), "order": ORDER, "groups": 1}, "layers 0-4 share one choice in this space, but not one order"),
    ],
)
def test_ranges_that_are_none(arguments: dict, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        PruneSpace(SHAPE, **arguments)


def test_merging_around_layers_that_keep_different_numbers_holds_to_the_groups_of_routers() -> None:
    unequal = Plan.one_hot([[0, 1, 3, 4]] * 4 + [[0, 1, 3]], experts=6, k=2)
    with pytest.raises(SpaceError, match="keep=3 experts cannot be as many of each of the 2 groups"):
        MergeSpace(GROUPED, around=unequal, router="logit")
    equal = Plan.one_hot([[0, 1, 3, 4]] * 4 + [[1, 5]], experts=6, k=2)
    space = MergeSpace(GROUPED, around=equal, router="logit")
    assert space.decode(space.start()) == equal
    described = space.describe()
    assert described["counts"] == [4, 4, 4, 4, 2]
    for counts in (4, [4, 2], [4, 4, 4, 4, 3], [4, 4, 4, 4, 6], [4, 4, 4, 4, 0], [4, 4, 4, 4, True], [4, 4, 4, 4, "2"]):
        with pytest.raises(SpaceError, match="counts must be"):
            from_description(described | {"counts": counts})


def test_k_and_counts_vary_in_the_same_groups() -> None:
    inner = PruneSpace(SHAPE, keep=(2, 5), groups=2)
    with pytest.raises(SpaceError, match="groups of layers that keep is"):
        ActiveSpace(inner, k=(1, 2), groups=1)
    with pytest.raises(SpaceError, match="asks for 3 active experts of the 2"):
        ActiveSpace(inner, k=(1, 3))


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
        (lambda: EEPSpace(SHAPE, keep=3, router="top"), "router must be 'prob', 'logit' or 'rows', got 'top'"),  # type: ignore[arg-type]
        (lambda: EEPSpace(GROUPED, keep=3), "as many of each of the 2 groups .*: keep 2 or 4"),
        (lambda: PruneSpace(GROUPED, keep=5), "keep 4 or 6"),
        (lambda: MergeSpace(GROUPED, around=Plan.one_hot([[0, 1, 3]] * 5, experts=6, k=2)), "keep 2 or 4"),
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


@pytest.mark.parametrize("name", ["scores", "rows", "subset", "active scores", "active alone"])
def test_small_spaces_work_with_a_plain_optuna_sampler(name: str) -> None:
    space, live = SPACES[name], []
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: live.append(space.plan(trial)) or 0.0, n_trials=6)  # type: ignore[func-returns-value]
    assert [space.plan(trial) for trial in study.trials] == live
    assert all(genome.read(trial) is None for trial in study.trials)
    if name.startswith("active"):
        assert {type(trial.params["k.L0"]) for trial in study.trials} == {int}
        assert len({trial.params["k.L0"] for trial in study.trials}) > 1


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


# Active experts -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_active_plans_are_encoded_number_by_number(data: Any) -> None:
    """Any k and beta of the ranges over any pruning, against a plan made layer by layer."""
    layers = data.draw(st.integers(1, 6))
    shape = ModelShape(layers, experts=5, k=data.draw(st.integers(1, 3)))
    inner = PruneSpace(shape, keep=3, groups=data.draw(st.integers(1, layers)))
    groups = layer_groups(data.draw(st.integers(1, layers)), layers)
    high = data.draw(st.integers(2, 3))
    space = ActiveSpace(inner, k=(1, high), skip=(0.0, 0.75), groups=groups)
    pruning = inner.decode(inner.sample(np.random.default_rng(data.draw(st.integers(0, 99)))))
    parts, expected = list(pruning.layers), []
    for first, last in groups:
        k, beta = data.draw(st.integers(1, high)), data.draw(st.floats(0, 0.75, width=32))
        expected.append((k, beta if k > 1 else 0.0))
        for i in range(first, last + 1):
            parts[i] = LayerPlan(5, k, kept=parts[i].kept, skip=beta)
    x = space.encode(Plan(tuple(parts)))
    assert space.decode(x) == Plan(tuple(parts))
    assert np.array_equal(x[: inner.size], inner.encode(pruning))
    assert x[space.extras].tolist() == [k for k, _ in expected] + [beta for _, beta in expected]


def test_an_active_space_begins_where_its_inner_space_does() -> None:
    space = SPACES["active scores"]
    assert space.decode(space.start()) == PruneSpace(SHAPE, keep=3, groups=2).decode(np.full(12, 0.5))
    assert space.names[12:] == ("k.L0", "k.L1", "k.L2-4", "skip.L0", "skip.L1", "skip.L2-4")
    assert space.start()[space.extras].tolist() == [2, 2, 2, 0, 0, 0]
    assert space.step[space.extras].tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    alone = SPACES["active alone"]
    assert alone.decode(alone.start()) == Plan.identity(5, 6, 2)
    assert ActiveSpace.of(SHAPE, k=(1, 2)).describe() == ActiveSpace(SHAPE, k=(1, 2)).describe()
    around = SPACES["active around"]
    assert around.decode(around.start()) == MIXED
    assert ActiveSpace(SHAPE, k=(3, 4)).decode(np.full(5, 3)) == Plan.identity(5, 6, 3)
    assert [layer.skip for layer in SPACES["active merge"].decode(SPACES["active merge"].start()).layers] == [
        pytest.approx(0.1)
    ] * 5


def test_numbers_of_an_active_space_are_rounded_where_they_are_stored() -> None:
    space = SPACES["active scores"]
    assert not space.integer
    x = space.start()
    x[12], x[15] = 2.6, 0.3
    assert space.snap(x)[12] == space.decode(x).layers[0].k == 3
    assert space.snap(x)[15] == np.float32(0.3) == np.float32(space.decode(x).layers[0].skip)
    kinds = [type(kind).__name__ for kind in space.distributions().values()]
    assert kinds == ["FloatDistribution"] * 12 + ["IntDistribution"] * 3 + ["FloatDistribution"] * 3
    assert [type(value) for value in space.values(space.snap(x))] == [float] * 12 + [int] * 3 + [float] * 3
    assert SPACES["active subset"].integer


@pytest.mark.parametrize("name", SPACES)
def test_matrices_are_replaced_and_the_rest_stays(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    x, other = space.sample(rng), space.sample(rng)
    mixed = space.with_matrices(x, space.matrices(other))
    assert np.array_equal(space.matrices(mixed), space.matrices(other))
    assert np.array_equal(mixed[space.extras], x[space.extras])
    assert space.matrices(x).shape[0] == len(space.groups)
    if not name.startswith("active"):
        first = space.extras.start
        assert np.array_equal(mixed[:first], space.from_matrices(space.matrices(other))[:first])
        assert x[space.extras].size == (0 if space.keep_range is None else len(space.groups))


@pytest.mark.parametrize(
    ("space", "plan", "message"),
    [
        ("active scores", PRUNING.with_k(3).with_skip([0.5, 0.5, 0.5, 0.25, 0.5]), "layers 2-4 share one skip in this"),
        ("active subset", PRUNING.with_k(3), "layer 0 of the plan has k=3, the space 1 to 2"),
        ("active subset", PRUNING.with_skip(0.5), r"skips experts \(skip=0.5\), this space does not"),
        ("active merge", MERGING.with_skip(0.75), "layer 0 of the plan has skip=0.75, the space 0.1 to 0.6"),
        ("active merge", MERGING.with_k(1), r"\(n, r, k\) = \(6, 3, 1\), the space \(6, 3, 2\)"),
        ("active eep", Plan.one_hot([[0, 1]] * 5, experts=6, k=1), r"\(n, r, k\) = \(6, 2, 2\), the space"),
        ("active alone", PRUNING, "layer 0 of the plan is another than that of the plan this space is around"),
        ("active alone", Plan.identity(4, 6, 2), "the plan has 4 layers, the space 5"),
        ("active around", MIXED.with_skip(0.5), "layer 0 of the plan has another k or skip than the plan"),
    ],
)  # fmt: skip
def test_plans_that_an_active_space_has_not(space: str, plan: Plan, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SPACES[space].encode(plan)


PRUNE = PruneSpace(SHAPE, keep=3, groups=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActiveSpace(PRUNE), "searches k, a range such as .*, or skip, or both; neither was given"),
        (lambda: ActiveSpace(PRUNE, k=(1, 4)), r"k=\(1, 4\) asks for 4 active experts of the 3 that are kept"),
        (lambda: ActiveSpace(SHAPE, k=(1, 7)), r"k=\(1, 7\) asks for 7 active experts of the 6"),
        (lambda: ActiveSpace(SHAPE, around=PRUNING, k=(1, 4)), r"asks for 4 active experts of the 3 that are kept"),
        (lambda: ActiveSpace(PRUNE, k=(0, 2)), r"k must be a range \(low, high\) .* got \(0, 2\)"),
        (lambda: ActiveSpace(PRUNE, k=(2, 2)), r"1 <= low < high, .* got \(2, 2\)"),
        (lambda: ActiveSpace(PRUNE, k=2), "k must be a range .* got 2"),  # type: ignore[arg-type]
        (lambda: ActiveSpace(PRUNE, k=(1.0, 2.5)), r"got \(1.0, 2.5\)"),  # type: ignore[arg-type]
        (lambda: ActiveSpace(PRUNE, skip=(0.5, 1.5)), r"0 <= low < high <= 1, got \(0.5, 1.5\)"),
        (lambda: ActiveSpace(PRUNE, skip=0.5), "skip must be True or a range .* got 0.5"),  # type: ignore[arg-type]
        (lambda: ActiveSpace(PruneSpace(SHAPE, keep=3, k=1), skip=True), "at least 2 active experts .* have k=1"),
        (lambda: ActiveSpace(PRUNE, k=(1, 2), groups=9), "groups must be between 1 and the model's 5"),
        (lambda: ActiveSpace(ActiveSpace(SHAPE, k=(1, 2)), skip=True), "got another ActiveSpace"),
        (lambda: ActiveSpace(PRUNE, around=PRUNING, k=(1, 2)), "got both a space and a plan"),
        (lambda: ActiveSpace(SHAPE, around=Plan.identity(4, 6, 2), k=(1, 2)), "has 4 layers, the model 5"),
        (lambda: ActiveSpace(SHAPE, around=Plan.identity(5, 8, 2), k=(1, 2)), "for 8 experts, the model has 6"),
    ],
)  # fmt: skip
def test_bad_active_spaces(make: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_what_is_no_description_of_an_active_space() -> None:
    description = SPACES["active around"].describe()
    for key in ("inner", "k_range", "active_groups"):
        with pytest.raises(SpaceError, match="not the description of a space"):
            from_description({name: value for name, value in description.items() if name != key})
    broken = {**description, "inner": {**description["inner"], "plan": {"layers": []}}}
    with pytest.raises(SpaceError, match="not the description of a space"):
        from_description(broken)


def test_router_rows_are_those_of_the_experts_that_weigh_most() -> None:
    w_em = np.array([[0.9, -2.0, 0, 0.1, 0, 0], [0.2, 0, 0, 0, 0, 0.1], [0, -1.5, 0.3, 0, 0, 0]], dtype=np.float32)
    assert router_rows(w_em) == [1, 0, 2]  # -2.0 + 0.2 + 0.3 is the largest sum of three that differ
    twice = np.array([[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=np.float32)
    assert len(set(router_rows(twice))) == 2
    assert router_rows(np.eye(6, dtype=np.float32)[[5, 1, 4]]) == [5, 1, 4]
    grouped = np.full((4, 6), 0.1, dtype=np.float32)
    grouped[0, 5], grouped[1, 1], grouped[2, 0], grouped[3, 3] = 9, 1, 9, 1  # those of the other group are no choice
    assert router_rows(grouped, 2)[1::2] == [1, 3]
    space = EEPSpace(SHAPE, keep=3, groups=1, router="rows")
    assert space.size == 3 * 6
    assert space.decode(w_em / 2).layers[0] == LayerPlan(6, 2, w_em=w_em / 2, w_rm=np.eye(6)[[1, 0, 2]])


@each_space
def test_a_model_that_takes_the_extremes_takes_what_a_space_has(space: Space) -> None:
    start, *others = space.extremes()
    assert start == space.decode(space.start())
    assert any(layer.makes_experts for plan in others for layer in plan.layers) or "merge" not in space.phases
    if space.extra_groups:
        assert [layer.k for layer in others[-1].layers] == [layer.k for layer in space.decode(space.high).layers]


def test_where_routers_are_mapped_is_the_shapes_unless_it_is_said() -> None:
    shape = replace(SHAPE, router="logit")
    assert shape == SHAPE
    assert EEPSpace(shape, keep=3).router == "logit"
    assert EEPSpace(shape, keep=3, router="prob").describe() == EEPSpace(SHAPE, keep=3).describe()
    assert PruneSpace(shape, keep=3).describe() == PruneSpace(SHAPE, keep=3).describe()


@pytest.mark.parametrize("router", ["prob", "logit", "rows"])
def test_one_hot_matrices_of_any_rows_keep_to_the_groups_of_routers(router: Any) -> None:
    space, rng = EEPSpace(GROUPED, keep=4, router=router), np.random.default_rng(0)
    for _ in range(40):
        matrices = np.eye(6, dtype=np.float32)[rng.integers(6, size=(5, 2, 4))]
        matrices[0, 1] = matrices[0, 0]
        for layer in space.decode_matrices(matrices).layers:
            assert layer.router_rows is not None
            assert [row // 3 for row in layer.router_rows] == [0, 0, 1, 1]
