"""EEP's strategy against a slow and obvious reference, and its operators one by one."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeopt
from moeopt.errors import SamplerError
from moeopt.plan import ModelShape, Plan
from moeopt.samplers import EEPSampler, Observation
from moeopt.samplers.eep import scaled
from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace
from moeopt.trials import genome

SHAPE = ModelShape(layers=6, experts=8, k=2)
SPACE = EEPSpace(SHAPE, keep=4, groups=3)
EYE = np.eye(8, dtype=np.float32)
DRAWS = 2500


def obs(number: int, matrices: np.ndarray, loss: float, accuracy: float = 0.5) -> Observation:
    x = SPACE.from_matrices(matrices)
    return Observation(number, number, x, loss, False, str(number), "initial", {"accuracy": accuracy})


def random_pruning(rng: np.random.Generator) -> np.ndarray:
    return SPACE.matrices(SPACE.sample(rng))


def population(losses: Sequence[float]) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [obs(i, random_pruning(rng), loss) for i, loss in enumerate(losses)]


def reference_child(rng: np.random.Generator, solutions: list[Observation], phase: str) -> tuple[np.ndarray, int, bool]:
    """DESIGN's words, in loops: the child, its first parent, and whether it was crossed."""
    changed = [[False]]
    while not any(map(any, changed)):
        changed = [[rng.random() < 0.25 for _ in range(2)] for _ in range(3)]
    best = min(solution.loss for solution in solutions)
    spread = np.std([solution.loss for solution in solutions[:30]])
    crossed = phase == "merge" and rng.random() < 0.3
    if not crossed:
        pool = [solution for solution in solutions if solution.loss <= best + 0.3 * spread]
    else:
        pool = [solution for solution in solutions if solution.loss <= best + 0.1 * spread]
        if len(pool) < 6:
            pool = sorted(solutions, key=lambda solution: solution.loss)[:6]
    first = pool[rng.integers(len(pool))]
    child = SPACE.matrices(first.x).copy()
    if crossed:
        second = SPACE.matrices(pool[rng.choice([i for i in range(len(pool)) if pool[i] is not first])].x)
        for g in range(3):
            for m in range(2):
                whole = rng.random() < 0.6
                for i in range(4):
                    if (rng.random() >= 0.6) if changed[g][m] else not whole:
                        child[g, m, i] = second[g, m, i]
    for g in range(3):
        for m in range(2):
            if phase == "prune" and changed[g][m] and m == 0:
                for i in range(4):
                    if rng.random() < 0.15:
                        others = {int(child[g, 0, j].argmax()) for j in range(4) if j != i}
                        child[g, 0, i] = EYE[rng.choice([e for e in range(8) if e not in others])]
                child[g, 1] = child[g, 0]
            if phase == "merge" and changed[g][m]:
                for i in range(4):
                    for e in range(8):
                        if rng.random() < 0.25:
                            child[g, m, i, e] += 0.065 * rng.standard_normal()
    if phase == "merge" and rng.random() < 0.1:
        child[:, 0] /= child[:, 0].sum(axis=2, keepdims=True)
    return child, first.number, crossed


def statistics(children: list[tuple[np.ndarray, int, bool]], solutions: list[Observation]) -> dict[str, np.ndarray]:
    by_number = {solution.number: SPACE.matrices(solution.x) for solution in solutions}
    rows: dict[str, list[float]] = {key: [] for key in ("crossed", "parent 0", "matrices", "entries", "noise", "sums")}
    for child, parent, crossed in children:
        difference = child - by_number[parent]
        rows["crossed"].append(crossed)
        rows["parent 0"].append(parent == 0)
        rows["matrices"].append(np.abs(difference).max(axis=(2, 3)).astype(bool).sum())
        rows["entries"].append((difference != 0).mean())
        rows["noise"].append(np.sqrt((difference**2).mean()))
        rows["sums"].append(np.abs(child[:, 0].sum(axis=2) - 1).max() < 1e-5)
    return {key: np.array(values, dtype=float) for key, values in rows.items()}


@pytest.mark.parametrize(("phase", "size"), [("prune", 40), ("merge", 120)])
def test_proposals_are_distributed_as_the_reference(phase: str, size: int) -> None:
    solutions = population(np.random.default_rng(3).normal(2.0, 0.1, size).tolist())
    best = min(range(size), key=lambda i: solutions[i].loss or 0)
    solutions[0], solutions[best] = (
        obs(0, SPACE.matrices(solutions[best].x), solutions[best].loss or 0),
        obs(best, SPACE.matrices(solutions[0].x), solutions[0].loss or 0),
    )
    sampler = EEPSampler(SPACE, seed=1)
    proposals = [sampler.propose(solutions, slot, 0) for slot in range(1000, 1000 + DRAWS)]
    assert {proposal.phase for proposal in proposals} == {phase}
    mine = [(SPACE.matrices(SPACE.snap(p.x)), p.parents[0], "crossover" in p.operator) for p in proposals]
    rng = np.random.default_rng(2)
    theirs = [reference_child(rng, solutions, phase) for _ in range(DRAWS)]
    a, b = statistics(mine, solutions), statistics(theirs, solutions)
    for key in a:
        error = np.sqrt((a[key].var() + b[key].var()) / DRAWS)
        assert abs(a[key].mean() - b[key].mean()) <= 4 * error + 1e-9, (key, a[key].mean(), b[key].mean())


def test_prune_mutation() -> None:
    sampler, rng = EEPSampler(SPACE, seed=0), np.random.default_rng(0)
    parent = random_pruning(rng)
    changed = np.array([[True, False], [False, True], [False, False]])
    targets: Counter[int] = Counter()
    moved = 0
    for _ in range(DRAWS):
        child = sampler.repoint(rng, parent.copy(), changed)
        assert np.array_equal(child[1:], parent[1:])
        assert np.array_equal(child[0, 0], child[0, 1])
        rows = child[0, 0].argmax(axis=1)
        assert len(set(rows)) == 4
        assert np.array_equal(child[0, 0], EYE[rows])
        different = rows != parent[0, 0].argmax(axis=1)
        moved += int(different.sum())
        if different.sum() == 1:
            targets[int(rows[different][0])] += 1
    assert moved / (4 * DRAWS) == pytest.approx(0.15 * 4 / 5, abs=0.01)
    free = set(range(8)) - set(parent[0, 0].argmax(axis=1).tolist())
    for expert in free:
        assert targets[expert] / sum(targets[e] for e in free) == pytest.approx(0.25, abs=0.04)


def test_crossover_of_prunings_is_a_pruning() -> None:
    sampler, rng = EEPSampler(SPACE, seed=0, prune_crossover=True), np.random.default_rng(0)
    for _ in range(200):
        changed = rng.random((3, 2)) < 0.5
        child = sampler.crossover(rng, random_pruning(rng), random_pruning(rng), changed, "prune")
        kept = child[:, 0].argmax(axis=2)
        assert all(len(set(group)) == 4 for group in kept.tolist())
        assert np.array_equal(child[:, 0], EYE[kept])
        assert np.array_equal(child[:, 0], child[:, 1])
    operators = {sampler.propose(population([1.0] * 40), slot, 0).operator for slot in range(50)}
    assert operators == {"prune", "crossover+prune"}


def test_parents_are_within_the_bands() -> None:
    losses = [2.0, 2.02, 2.04, 2.2] + [3.0 if i % 2 else 2.6 for i in range(26)]
    spread = np.std(losses)
    sampler = EEPSampler(SPACE, seed=0)
    solutions = population(losses)
    prune = {solution.number for solution in sampler.parents(solutions, 0.3)}
    assert prune == {i for i, loss in enumerate(losses) if loss <= 2.0 + 0.3 * spread} == {0, 1, 2}
    merge = sampler.parents(solutions, 0.1, 6)
    assert [solution.number for solution in merge[:4]] == [0, 1, 2, 3]
    assert len(merge) == 6
    wide = sampler.parents(solutions, 5.0, 6)
    assert len(wide) == 30


def test_accuracy_bands_are_in_points() -> None:
    rng = np.random.default_rng(0)
    accuracies = [0.80, 0.79, 0.771, 0.769] + [0.5] * 30
    solutions = [obs(i, random_pruning(rng), 9.0 - i, accuracy) for i, accuracy in enumerate(accuracies)]
    sampler = EEPSampler(SPACE, seed=0, score="accuracy")
    assert [s.number for s in sampler.parents(solutions, sampler.band)] == [0, 1, 2]
    assert len(sampler.parents(solutions, sampler.crossover_band, sampler.crossover_pool)) == 6
    nothing = [Observation(0, 0, solutions[0].x, 1.0, False, "", "initial", {})]
    with pytest.raises(SamplerError, match="needs trials with an 'accuracy' attribute; trial 0 has none"):
        sampler.parents(nothing, 1.0)


def test_merged_solutions_are_no_parents_in_the_prune_phase() -> None:
    solutions = population([2.0, 2.1, 2.2])
    solutions.append(obs(3, SPACE.matrices(solutions[0].x) * 0.9, 1.0))
    sampler = EEPSampler(SPACE, seed=0, initial=4, prune_until=100, band=10.0)
    parents = {sampler.propose(solutions, slot, 0).parents for slot in range(4, 60)}
    assert parents == {(0,), (1,), (2,)}


def test_a_single_parent_comes_from_the_wider_band_in_the_merge_phase_too() -> None:
    solutions = population([2.0 + 0.01 * i for i in range(20)])
    sampler = EEPSampler(SPACE, seed=0, initial=4, prune_until=10, band=1.0, crossover_band=0.0, crossover_pool=2)
    spread = np.std([s.loss for s in solutions[:4]])
    single, crossed = set(), set()
    for slot in range(20, 400):
        proposal = sampler.propose(solutions, slot, 0)
        (crossed if len(proposal.parents) == 2 else single).update(proposal.parents)
    assert crossed == {0, 1}
    assert single == {s.number for s in solutions if s.loss is not None and s.loss <= 2.0 + spread}


def run(space: EEPSpace | PruneSpace | MergeSpace, n: int, **options: int) -> optuna.Study:
    study = optuna.create_study(sampler=EEPSampler(space, seed=0, **options))
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, float(np.square(space.vector(trial) - 0.2).sum()))
    return study


def test_phases_follow_the_population() -> None:
    study = run(SPACE, 112)
    phases = [genome.origin(trial)["phase"] for trial in study.trials]
    operators = [genome.origin(trial)["operator"] for trial in study.trials]
    assert phases == ["prune"] * 100 + ["merge"] * 12
    assert operators[:31] == ["initial"] * 30 + ["prune"]
    assert set(operators[100:]) <= {"merge", "crossover+merge"}
    one_hot = [SPACE.plan(trial).is_one_hot for trial in study.trials]
    assert all(one_hot[:100])
    assert not any(one_hot[100:])
    for trial in study.trials[30:]:
        parents = genome.origin(trial)["parents"]
        assert 1 <= len(parents) <= 2
        assert all(0 <= parent < trial.number for parent in parents)


def test_one_phase_spaces() -> None:
    prune = PruneSpace(SHAPE, keep=4, groups=3, encoding="rows")
    study = run(prune, 20, initial=4, prune_until=6)
    assert {genome.origin(trial)["phase"] for trial in study.trials} == {"prune"}
    merge = MergeSpace(SHAPE, around=Plan.one_hot([[0, 1, 2, 3]] * 6, experts=8, k=2), groups=3)
    study = run(merge, 20, initial=4, prune_until=10)
    assert {genome.origin(trial)["phase"] for trial in study.trials} == {"merge"}


def test_redraw_avoids_duplicates_and_as_published_has_them() -> None:
    space = EEPSpace(SHAPE, keep=4, groups=1)
    assert len({genome.origin(t)["plan"] for t in run(space, 50, initial=10, redraw=200).trials}) == 50
    assert len({genome.origin(t)["plan"] for t in run(space, 50, initial=10, redraw=0).trials}) < 40


@pytest.mark.parametrize("phase", ["prune", "merge"])
def test_children_take_k_and_betas_from_their_first_parent(phase: str) -> None:
    """And a quarter of these numbers gets noise, each of the scale of its own step."""
    space = ActiveSpace(EEPSpace(SHAPE, keep=4, groups=3), k=(1, 4), skip=True)
    rng = np.random.default_rng(0)
    history = []
    for number in range(40):
        x = space.sample(rng)
        x[space.extras] = np.where(np.arange(12) < 6, 2 + number % 2, 0.4 + 0.2 * (number % 2))
        history.append(Observation(number, number, space.snap(x), 1.0, False, str(number), "initial", {}))
    sampler = EEPSampler(space, seed=0, prune_until=100 if phase == "prune" else 1)
    plain = EEPSampler(space.inner, seed=0, prune_until=sampler.prune_until)
    without = [Observation(t.number, t.slot, t.x[: space.inner.size], 1.0, False, "", "initial", {}) for t in history]
    ks, betas, crossed = [], [], 0
    for slot in range(40, 640):
        proposal, same = sampler.propose(history, slot, 0), plain.propose(without, slot, 0)
        assert np.array_equal(proposal.x[: space.inner.size], same.x)
        assert (proposal.parents, proposal.operator) == (same.parents, same.operator)
        crossed += len(proposal.parents) == 2
        moved = proposal.x[space.extras] - history[proposal.parents[0]].x[space.extras]
        ks.append(moved[:6])
        betas.append(moved[6:])
    for moved, step in ((np.array(ks), 0.75), (np.array(betas), 0.25)):
        hit = moved[moved != 0]
        assert hit.size / moved.size == pytest.approx(0.25, abs=0.03)
        assert hit.std() == pytest.approx(step, rel=0.1)
        assert abs(hit.mean()) < step / 5
    assert (crossed > 0) == (phase == "merge")


def test_active_experts_alone_make_a_phase_of_their_own() -> None:
    space = ActiveSpace(SHAPE, k=(1, 2))
    target = np.array([1, 2, 1, 1, 2, 1])
    study = optuna.create_study(sampler=EEPSampler(space, seed=0, initial=6))
    for _ in range(50):
        trial = study.ask()
        study.tell(trial, float(np.abs([layer.k for layer in space.plan(trial).layers] - target).sum()))
    assert study.best_value == 0
    assert {genome.origin(trial)["phase"] for trial in study.trials} == {"active"}
    assert {genome.origin(trial)["operator"] for trial in study.trials} == {"initial", "active"}


@given(st.integers(1, 1000))
def test_a_small_budget_is_spent_in_the_published_proportions(trials: int) -> None:
    sizes = scaled(trials)
    if trials >= 400:
        assert sizes == {"initial": 30, "prune_until": 100}
        return
    initial, prune_until = sizes["initial"], sizes["prune_until"]
    assert initial == max(2, round(trials * 30 / 400))
    assert initial < prune_until <= max(3, round(trials * 100 / 400))
    sampler = EEPSampler(SPACE, **sizes)
    assert (sampler.shortfall(trials) is None) == (trials > 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"initial": 10}, {"initial": 10, "prune_until": 11}),
        ({"prune_until": 20}, {"initial": 2, "prune_until": 20}),
        ({"prune_until": 1}, {"initial": 2, "prune_until": 1}),
        ({"initial": 1, "prune_until": 2}, {"initial": 1, "prune_until": 2}),
        ({"initial": "x"}, {"initial": "x", "prune_until": 8}),
    ],
)
def test_what_is_given_is_kept_and_the_rest_follows(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert scaled(30, options) == expected


def test_a_search_that_is_too_short_for_the_settings_is_told() -> None:
    sampler = EEPSampler(SPACE)
    assert "all 30 trials of EEP are random" in str(sampler.shortfall(30))
    assert "initial=2, prune_until=8" in str(sampler.shortfall(30))
    assert "merges nothing in 100 trials" in str(sampler.shortfall(100))
    assert sampler.shortfall(101) is None
    assert EEPSampler(PruneSpace(SHAPE, keep=4)).shortfall(100) is None


def test_optimize_warns_once_of_a_search_that_is_too_short() -> None:
    study = optuna.create_study(sampler=EEPSampler(SPACE, seed=0, initial=3, prune_until=4))
    with pytest.warns(UserWarning, match="all 2 trials of EEP are random"):
        moeopt.optimize(study, lambda trial: float(SPACE.vector(trial).sum()), n_trials=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moeopt.optimize(study, lambda trial: float(SPACE.vector(trial).sum()), n_trials=3)
