"""Windows, moves, acceptance and the bandit of local search."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import optuna
import pytest

from moeopt.errors import SamplerError
from moeopt.plan import ModelShape, Plan
from moeopt.samplers import LocalSampler, Observation
from moeopt.samplers.bandit import choose
from moeopt.samplers.moves import ACTIVE, MOVES
from moeopt.spaces import NAMED_AT_MOST, ActiveSpace, EEPSpace, MergeSpace, PruneSpace, Space
from moeopt.trials import genome

SHAPE = ModelShape(layers=8, experts=6, k=2)
AROUND = Plan.one_hot([[0, 1, 2]] * 8, experts=6, k=2)
SPACES: dict[str, Space] = {
    "scores": PruneSpace(SHAPE, keep=3),
    "rows": PruneSpace(SHAPE, keep=3, encoding="rows"),
    "subset": PruneSpace(SHAPE, keep=3, encoding="subset", groups=[(0, 2), (3, 3), (4, 7)]),
    "merge": MergeSpace(SHAPE, around=AROUND, groups=4),
    "eep": EEPSpace(SHAPE, keep=3),
}
EEP = SPACES["eep"]


def obs(slot: int, loss: float | None, x: np.ndarray | None = None, **more: Any) -> Observation:
    x = EEP.sample(np.random.default_rng(slot)) if x is None else x
    facts: dict[str, Any] = {"failed": False, "fingerprint": str(slot), "operator": "enqueued", "attrs": {}}
    return Observation(number=slot, slot=slot, x=x, loss=loss, **(facts | more))


def played(slot: int, move: str, first: int, loss: float | None, parent: int = 0, **more: Any) -> Observation:
    notes = {"first": first, "width": 1, "parent": parent}
    return obs(slot, loss, operator=move, notes=notes, failed=loss is None, **more)


def search(space: Space, n: int, **options: Any) -> optuna.Study:
    study = optuna.create_study(sampler=LocalSampler(space, seed=0, **options))
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, float(np.square(space.matrices(space.vector(trial)) - 0.2).sum()))
    return study


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPACES)
def test_only_the_noted_window_changes(kind: str) -> None:
    space = SPACES[kind]
    large = space.size > NAMED_AT_MOST
    study = search(space, 80 if large else 20, **({"moves": list(MOVES)} if large else {}))
    assert genome.origin(study.trials[0])["operator"] == "start"
    seen = set()
    for trial in study.trials[1:]:
        origin = genome.origin(trial)
        (parent,) = origin["parents"]
        before, after = (genome.read(t).reshape(len(space.groups), -1) for t in (study.trials[parent], trial))
        first, width = origin["notes"]["first"], origin["notes"]["width"]
        changed = np.flatnonzero((before != after).any(axis=1))
        assert set(changed) <= set(range(first, first + width))
        layer = space.plan(study.trials[parent]).first_difference(space.plan(trial))
        assert layer is None or layer >= space.groups[first][0]
        assert origin["phase"] == MOVES[origin["operator"]][0]
        seen.add((origin["operator"], width))
    assert {width for _, width in seen} == set(LocalSampler(space).widths)
    assert {move for move, _ in seen} == set(study.sampler.moves)


@pytest.mark.parametrize("move", MOVES)
def test_moves(move: str) -> None:
    rng = np.random.default_rng(0)
    for slot in range(50):
        before = EEP.matrices(EEP.sample(np.random.default_rng(slot)))[0]
        pair = before.copy()
        MOVES[move][1](rng, pair, 0.1, 0.5)
        kept, dropped = before[0].argmax(axis=1), np.flatnonzero(before[0].sum(axis=0) == 0)
        rows = np.flatnonzero((pair != before).any(axis=(0, 2)))
        if move == "swap":
            assert np.array_equal(pair[0], pair[1])
            assert np.array_equal(np.sort(pair[0].sum(axis=1)), np.ones(3))
            assert len(rows) == 1
            assert pair[0, rows[0]].argmax() in dropped
        elif move in ("route", "remap"):
            assert np.array_equal(pair[0], before[0])
            assert move == "remap" or (len(rows) == 1 and pair[1, rows[0], kept[rows[0]]] == 1)
        elif move == "blend":
            assert len(rows) == 1
            assert np.allclose(pair[0].sum(axis=1), 1)
            assert 0 < pair[0, rows[0], dropped].sum() <= 0.5
            assert np.array_equal(pair[0, :, dropped], pair[1, :, dropped])
        else:
            assert (pair != before).mean() == pytest.approx(0.5, abs=0.3)


def test_swapping_a_merged_row_keeps_what_else_it_has() -> None:
    pair = np.zeros((2, 2, 4), dtype=np.float32)
    pair[:, 0, :2], pair[:, 1, 2] = (1.0, 0.25), 1.0
    for seed in range(20):
        child = pair.copy()
        MOVES["swap"][1](np.random.default_rng(seed), child, 0.1, 0.5)
        assert np.array_equal(np.sort(child, axis=2), np.sort(pair, axis=2))


def test_parents_are_the_best_different_plans() -> None:
    history = [obs(0, 3.0, operator="start"), obs(1, 1.0, fingerprint="a"), obs(2, 1.5, fingerprint="b"), obs(3, None)]
    history += [obs(4, 1.0, fingerprint="a"), obs(5, None, failed=True), obs(6, 1.2, fingerprint="c")]
    for population, parents in {1: {1}, 2: {1, 6}, 3: {1, 6, 2}, 9: {1, 6, 2, 0}}.items():
        sampler = LocalSampler(EEP, seed=0, population=population, fade=0.0)
        assert {sampler.propose(history, slot, 0).parents[0] for slot in range(7, 80)} == parents


@pytest.mark.parametrize("given", [False, True])
def test_enqueued_trials_are_members_of_the_population(given: bool) -> None:
    """They stand in for the default start; a start that was asked for is evaluated all the same."""
    space = SPACES["scores"]
    study = optuna.create_study(sampler=LocalSampler(space, seed=0, start=space.start() if given else None))
    good = space.sample(np.random.default_rng(0))
    study.add_trial(genome.waiting(genome.pack(genome.GENOME, good), {}))
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), 2.0)
    assert [genome.origin(t)["operator"] for t in study.trials] == ["enqueued", "start" if given else "swap"]
    study.ask()
    assert genome.origin(study.trials[2])["parents"] == [0]


def test_a_parent_fades_with_every_child() -> None:
    """Six children, of which the lower quartile differs from the parent by 0.3."""
    history = [obs(0, 3.0, operator="start"), obs(1, 5.0), obs(2, 3.15)]
    for slot in range(3, 9):
        loss = 3.0 + 2.0 * (slot % 2)
        history.append(played(slot, "swap", 0, loss + 0.3))
    for fade, number in {0.0: 0, 0.08: 0, 0.09: 2, 0.5: 2}.items():
        assert LocalSampler(EEP, seed=0, fade=fade).propose(history, 9, 0).parents == (number,)


def arms_played(history: list[Observation], **options: Any) -> Counter[tuple[str, int]]:
    sampler = LocalSampler(EEP, seed=0, bands=4, widths=[1], **{"moves": list(MOVES), **options})
    proposals = [sampler.propose(history, slot, 0) for slot in range(1000, 1200)]
    return Counter((p.operator, sampler.band(p.notes["first"])) for p in proposals)


def test_bandit_prefers_the_arm_with_more_gain() -> None:
    """The same cost everywhere; only routing changes in the second band of depth ever gained."""
    history = [obs(0, 5.0)]
    for slot in range(1, 200):
        move, band = list(MOVES)[slot % len(MOVES)], slot // len(MOVES) % 4
        won = (move, band) == ("route", 1)
        history.append(played(slot, move, 2 * band, 4.9 if won else 5.1))
    assert arms_played(history, memory=1e6)["route", 1] > 150


def test_bandit_counts_gain_per_layer_token() -> None:
    """Gains are equal; trials of one half of the depth ran all examples, those of the other were stopped early.

    What they say they ran, which depends on what their process could reuse, changes nothing.
    """
    for dear in (0, 4):
        history = [obs(0, 5.0)]
        for slot in range(1, 200):
            first = slot % 8
            attrs = {"layer_tokens": slot**3 % 1009, "tokens": 1000 if first // 4 == dear // 4 else 1}
            history.append(played(slot, "swap", first, 4.9, attrs=attrs))
        bands = arms_played(history, moves=["swap"], memory=1e6)
        early = bands["swap", 0] + bands["swap", 1]
        assert early < 20 if dear == 0 else early > 180


def test_late_windows_are_cheaper() -> None:
    history = [obs(0, 5.0), *(played(slot, "swap", slot % 8, 4.9) for slot in range(1, 200))]
    bands = arms_played(history, moves=["swap"], memory=1e6)
    assert bands["swap", 3] > 150


def test_old_gains_are_forgotten() -> None:
    # 2 layers over all examples cost as much as 8 over a quarter.
    late, soon = {"tokens": 4}, {"tokens": 1}
    late_dry = [played(slot, "swap", 6, 4.9 if slot < 30 else 5.1, attrs=late) for slot in range(1, 60)]
    early = [played(slot, "swap", 0, 4.9 if slot % 3 == 0 else 5.1, attrs=soon) for slot in range(60, 80)]
    history = [obs(0, 5.0), *late_dry, *early]
    assert arms_played(history, moves=["swap"], memory=1e6)["swap", 3] > 45
    assert arms_played(history, moves=["swap"], memory=10.0)["swap", 3] < 40


def test_failed_and_running_trials() -> None:
    sampler = LocalSampler(EEP, seed=0)
    history = [obs(0, 5.0), played(1, "swap", 3, None), played(2, "route", 3, 4.0), obs(3, None)]
    assert [(arm.move, gain) for arm, gain, _ in sampler.plays(history)] == [("swap", 0.0), ("route", 1.0)]
    assert [cost for _, _, cost in sampler.plays(history)] == [5.0, 5.0]
    running = [obs(0, None), obs(1, None)]
    assert sampler.propose(running, 2, 0).parents == ()


def test_choose_is_nearly_greedy_after_many_plays() -> None:
    plays = [(arm, gain, 1.0) for _ in range(100) for arm, gain in (("a", 1.0), ("b", 0.5), ("c", 0.0), ("gone", 9.0))]
    chosen = [choose(np.random.default_rng(i), ["a", "b", "c"], plays, prior=1.0, memory=1e6) for i in range(100)]
    assert Counter(chosen)["a"] > 95
    first = [choose(np.random.default_rng(i), ["a", "b"], [], prior=3.0, memory=50.0) for i in range(400)]
    assert Counter(first)["a"] / 400 == pytest.approx(0.5, abs=0.1)


def test_a_space_with_nothing_to_swap() -> None:
    space = EEPSpace(SHAPE, keep=6, groups=1)
    study = search(space, 20, widths=[2, 3])
    assert study.sampler.widths == (1,)
    assert study.best_value < study.trials[0].value
    pruning = PruneSpace(SHAPE, keep=6)
    assert len({genome.origin(t)["plan"] for t in search(pruning, 4, redraw=2).trials}) == 1


def test_moves_that_a_space_has_not() -> None:
    assert LocalSampler(SPACES["rows"]).moves == ("swap",)
    assert "swap" not in LocalSampler(SPACES["merge"]).moves
    assert LocalSampler(SPACES["rows"], moves=["swap", "blend"]).moves == ("swap",)
    assert LocalSampler(ActiveSpace(SHAPE, k=(1, 2))).moves == (ACTIVE,)
    for move in ("route", ACTIVE):
        with pytest.raises(SamplerError, match=rf"moves must be some of swap for this space, got \['{move}'\]"):
            LocalSampler(SPACES["rows"], moves=[move])


# Active experts -----------------------------------------------------------------------------------------------------


def test_the_active_move_changes_k_and_betas_of_its_window() -> None:
    inner = PruneSpace(SHAPE, keep=3, groups=2)
    space = ActiveSpace(inner, k=(1, 3), skip=True, groups=4)
    sampler = LocalSampler(space, seed=0, moves=[ACTIVE], widths=[1, 2], p_entry=0.3)
    history = [obs(0, 5.0, space.sample(np.random.default_rng(0)))]
    before, seen = history[0].x[inner.size :].reshape(2, 4), set()
    for slot in range(1, 120):
        proposal = sampler.propose(history, slot, 0)
        assert (proposal.operator, proposal.phase, proposal.parents) == (ACTIVE, "active", (0,))
        assert np.array_equal(proposal.x[: inner.size], history[0].x[: inner.size])
        after = proposal.x[inner.size :].reshape(2, 4)
        first, width = proposal.notes["first"], proposal.notes["width"]
        changed = np.flatnonzero((before != after).any(axis=0))
        assert set(changed) <= set(range(first, first + width))
        assert changed.size
        assert np.abs(after[0] - before[0]).max() in (0, 1)
        seen |= {(first, width)}
    assert seen == {(first, width) for width in (1, 2) for first in range(5 - width)}


def test_other_moves_leave_k_and_betas_alone() -> None:
    space = ActiveSpace(EEPSpace(SHAPE, keep=3, groups=4), k=(1, 2), skip=True, groups=2)
    history = [obs(0, 5.0, space.sample(np.random.default_rng(0)))]
    sampler = LocalSampler(space, seed=0, moves=list(MOVES))
    for slot in range(1, 60):
        x = sampler.propose(history, slot, 0).x
        assert np.array_equal(x[space.extras], history[0].x[space.extras])
        assert not np.array_equal(x, history[0].x)


def test_active_moves_cost_the_layers_from_their_window_on() -> None:
    space = ActiveSpace(PruneSpace(SHAPE, keep=3), k=(1, 2), groups=[(0, 5), (6, 6), (7, 7)])
    sampler = LocalSampler(space, seed=0)
    assert sampler.moves == ("swap", ACTIVE)
    x = space.start()
    history = [obs(0, 5.0, x), played(1, ACTIVE, 1, 4.5, x=x), played(2, "swap", 1, 4.0, x=x)]
    assert [(arm.move, gain, cost) for arm, gain, cost in sampler.plays(history)] == [
        (ACTIVE, 0.5, 2.0),
        ("swap", 1.0, 7.0),
    ]


def test_active_experts_of_one_plan_alone() -> None:
    """Eight numbers to get right; one for all layers has the move of a single window."""
    target = np.array([1, 2, 1, 1, 2, 1, 2, 2])
    space = ActiveSpace(SHAPE, around=AROUND, k=(1, 2))
    study = optuna.create_study(sampler=LocalSampler(space, seed=0))
    for _ in range(40):
        trial = study.ask()
        study.tell(trial, float(np.abs([layer.k for layer in space.plan(trial).layers] - target).sum()))
    assert study.best_value == 0
    assert {genome.origin(t)["operator"] for t in study.trials[1:]} == {ACTIVE}
    single = ActiveSpace(SHAPE, k=(1, 2), groups=1)
    study = optuna.create_study(sampler=LocalSampler(single, seed=0, widths=[2, 3]))
    assert {study.ask().params["k.L0-7"] for _ in range(4)} == {1, 2}
