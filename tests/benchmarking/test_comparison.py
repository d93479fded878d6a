"""From studies to arrays, groups, and sentences that claim no more than the tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from moeopt.errors import StudyError
from moeopt.report.optimiser_comparison import conclusions
from moeopt.results.optimiser_comparison import compare, read
from moeopt.results.optimiser_comparison.grouping import readable_names
from moeopt.statistics import sign_flip

Make = Callable[..., Any]
FAIL, PRUNED, COMPLETE = TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE


def test_every_trial_costs_and_only_completed_ones_are_best(make: Make, trial: Make) -> None:
    run = read(
        make(
            "a",
            [
                trial(state=FAIL, start=0, layer_tokens=7),
                trial(0.9, start=1, layer_tokens=10, calibration_layer_tokens=100, warm_start="p", method="naee"),
                trial(0.1, state=PRUNED, start=2, layer_tokens=5, estimate=0.1),
                trial(math.inf, start=3, layer_tokens=10),
                trial(0.5, start=4, layer_tokens=20),
                trial(0.7, start=5, layer_tokens=0, copied_from=1),
                trial(state=FAIL, start=6, failure="not finite"),
            ],
        )
    )
    np.testing.assert_array_equal(run.curve, [np.nan, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(run.costs["layer-tokens"], np.cumsum([7, 110, 5, 10, 20, 0, 20]))
    np.testing.assert_array_equal(run.costs["trials"], np.arange(1, 8))
    np.testing.assert_allclose(run.costs["time"], np.arange(1, 8))
    assert run.counts == {"completed": 4, "pruned": 1, "failed": 2}
    assert run.charged == 1
    assert run.settings["warm_starts"] == ["naee"]


def test_an_attempt_that_was_made_again_counts_once(make: Make, trial: Make) -> None:
    run = read(
        make(
            "a",
            [
                trial(0.9, start=0, layer_tokens=10),
                trial(state=FAIL, start=1, end=5000, layer_tokens=3, interrupted=True),  # reclaimed much later
                trial(state=FAIL, start=5000, layer_tokens=4, interrupted=True, system={"retry_history": [1]}),
                trial(0.5, start=5001, layer_tokens=10, system={"retry_history": [1, 2]}),
            ],
        )
    )
    np.testing.assert_array_equal(run.costs["trials"], [1, 2])
    np.testing.assert_array_equal(run.costs["layer-tokens"], [10, 20])
    np.testing.assert_allclose(run.costs["time"], [1, 2])


def test_time_is_when_at_least_one_worker_runs(make: Make, trial: Make) -> None:
    spans = [(0, 4), (1, 3), (2, 6), (100, 101), (100.5, 103)]
    trials = [trial(1.0 - i / 10, start=a, end=b, layer_tokens=1) for i, (a, b) in enumerate(spans)]
    run = read(make("a", trials))
    moments = np.arange(0, 110, 0.001) + 0.0005
    busy = np.any([(a <= moments) & (moments < b) for a, b in spans], axis=0)
    expected = [0.001 * busy[moments < end].sum() for end in sorted(b for _, b in spans)]
    np.testing.assert_allclose(run.costs["time"], expected, atol=0.01)
    np.testing.assert_allclose(run.curve, [0.9, 0.9, 0.8, 0.7, 0.6])  # by end: the second trial ends first


def test_running_and_waiting_trials_are_not_there_yet(make: Make) -> None:
    study = make("a", [0.5, 0.4])
    study.ask()
    study.enqueue_trial({})
    assert len(read(study).curve) == 2


def test_all_are_held_against_each_other_where_the_shortest_ended(make: Make) -> None:
    long = make("long", [0.9, 0.8, 0.7, 0.1], "eep")
    short = make("short", [0.6, 0.5], "tpe")
    comparison = compare([long, short])
    assert comparison.budget == 20
    assert {o.name: o.median for o in comparison.optimisers} == {"tpe": 0.5, "eep": 0.8}
    assert any("short ended there" in text and "40 layer-tokens" in text for text in conclusions(comparison))
    assert comparison.optimisers[1].mean_height == pytest.approx([0.9])  # from the 10th to the 20th layer-token
    assert compare([long, short], cost="trials").budget == 2
    assert compare([long, short], cost="time").budget == pytest.approx(2)


def test_times_to_a_target_are_censored_at_the_budget(make: Make) -> None:
    studies = [make(f"a{i}", losses, seed=i) for i, losses in enumerate([[0.9, 0.3], [0.9, 0.8], [0.2, 0.2]])]
    (optimiser,) = compare(studies, target=0.4).optimisers
    np.testing.assert_array_equal(optimiser.times, [20, np.inf, 10])
    assert optimiser.reached == 2
    reached_later = make("late", [0.9, 0.8, 0.1], seed=3)
    assert math.isinf(compare([*studies, reached_later], target=0.4).optimisers[0].times[3])


def test_optimisers_are_grouped_by_all_but_the_seed_and_named_by_what_differs(make: Make) -> None:
    studies = [
        make("a", [0.5], "eep", 0, options={"initial": 30}),
        make("b", [0.4], "eep", 1, options={"initial": 30}),
        make("c", [0.4], "eep", 0, options={"initial": 10}),
        make("d", [0.4], "tpe", 0),
        make("e", [0.4], "tpe", 0, change={"pruner.class": "moeopt.samplers.racing.RacingPruner"}),
        make("f", [0.4], "optuna", 5, options={"sampler": {"class": "optuna.samplers._qmc.QMCSampler", "seed": 1}}),
        make("g", [0.4], "optuna", 5, options={"sampler": {"class": "optuna.samplers._qmc.QMCSampler", "seed": 2}}),
    ]
    grouped = {optimiser.name: [run.seed for run in optimiser.runs] for optimiser in compare(studies).optimisers}
    assert grouped == {
        "eep (initial=30)": ["0", "1"], "eep (initial=10)": ["0"], "tpe": ["0"], "tpe + RacingPruner": ["0"],
        "QMCSampler": ["5/1", "5/2"],
    }  # fmt: skip


def test_a_warm_start_makes_another_optimiser(make: Make, trial: Make) -> None:
    warm = make("w", [trial(0.5, layer_tokens=10, warm_start="p", method="naee")])
    assert {o.name for o in compare([make("a", [0.5]), warm]).optimisers} == {"eep", "eep from naee"}


def test_distinct_settings_have_distinct_names() -> None:
    long = [{"name": "x", "option": "o" * 60 + str(i)} for i in range(3)]
    nested = [{"name": "x", "option": {"deep": [i]}} for i in range(3)]
    odd = [{"name": "x"}, {"name": "x", "extra": 1}, {"name": "x (extra=1)"}]
    for settings in (long, nested, odd):
        assert len(set(readable_names(settings))) == 3


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.fingerprint", "other"), ("task.limit", 9), ("model.weights", "other"), ("space.keep", 3),
        ("evaluation.rungs", [4, 8]), ("evaluation.score", "kl"),
    ],
)  # fmt: skip
def test_what_is_not_comparable_is_refused_by_field(make: Make, path: str, value: Any) -> None:
    with pytest.raises(StudyError, match=rf"'a' and 'b' cannot be compared, they differ in {path}: "):
        compare([make("a", [0.5]), make("b", [0.4], "tpe", change={path: value})])


def test_the_same_weights_elsewhere_are_comparable(make: Make) -> None:
    assert compare([make("a", [0.5]), make("b", [0.4], "tpe", change={"model.name_or_path": "elsewhere"})])


CANNOT_BE_COMPARED: list[tuple[Callable[[Make, Make], list[Any]], dict[str, Any], str]] = [
    (lambda make, trial: [], {}, "no study to compare"),
    (
        lambda make, trial: [make("a", [0.5], seed=3), make("b", [0.4], seed=3)], {},
        "'a' and 'b' are the same optimiser, eep, with the same seed, 3",
    ),
    (lambda make, trial: [optuna.create_study(study_name="plain")], {}, "'plain' does not say what it searched"),
    (lambda make, trial: [make("up", [0.5], direction="maximize")], {}, "'up' does not minimize 'loss'"),
    (lambda make, trial: [make("a", [0.5])], {"cost": "tokens"}, "layer-tokens, time or trials, got 'tokens'"),
    (lambda make, trial: [make("a", [0.5])], {"target": math.nan}, "target must be a finite loss, got nan"),
    (lambda make, trial: [make("a", [])], {}, "none of these studies has a finished trial"),
    (lambda make, trial: [make("a", [trial(state=FAIL, layer_tokens=1)])], {}, "no completed trial has a finite loss"),
    (
        lambda make, trial: [make("silent", [trial(0.5)])], {},
        "'silent' does not know its layer-tokens throughout; compare by time or tri",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("studies", "keywords", "message"), CANNOT_BE_COMPARED)
def test_what_cannot_be_compared_says_so(
    studies: Callable[..., list[Any]], keywords: dict[str, Any], message: str, make: Make, trial: Make
) -> None:
    with pytest.raises(StudyError, match=message):
        compare(studies(make, trial), **keywords)


def test_a_study_that_does_not_know_a_cost_is_compared_by_others(make: Make, trial: Make) -> None:
    assert compare([make("silent", [trial(0.5)])], cost="trials").costs == ("time", "trials")


@pytest.mark.parametrize("value", [math.nan, -1, "many", True, [1], 1e300])
def test_a_damaged_attribute_is_named(make: Make, trial: Make, value: Any) -> None:
    with pytest.raises(StudyError, match="study 'a', trial 0: layer_tokens must be a number from 0"):
        read(make("a", [trial(0.5, layer_tokens=value)]))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        *(("selection", value, r"study 'a': .*selection") for value in (1, {}, {"scores": []})),
        ("selection", {"scores": {"test": {"winner": {"loss": "0.1"}}}}, r"study 'a': .*selection"),
        *(("moeopt", value, "study 'a': its attribute 'moeopt'") for value in (1, {"sampler": []})),
        ("moeopt", {"model": {}, "task": {}, "space": {}, "evaluation": {}}, "study 'a': its attribute 'moeopt'"),
    ],
)
def test_a_damaged_study_is_refused(make: Make, attribute: str, value: Any, message: str) -> None:
    study = make("a", [0.5])
    study.set_user_attr(attribute, value)
    with pytest.raises(StudyError, match=message):
        read(study)


def test_a_study_without_trials_is_left_out_and_named(make: Make) -> None:
    comparison = compare([make("a", [0.5]), make("empty", [], "tpe")])
    assert comparison.left_out == ("empty",)
    assert "Left out, without a finished trial: empty." in conclusions(comparison)
    assert comparison.budget == 10


def test_too_few_seeds_conclude_nothing_and_say_how_many_would(grid: Make) -> None:
    comparison = compare(grid({"good": 0.1, "bad": 10.0}, seeds=5))
    assert comparison.pairs[0].p == 0.0625
    assert comparison.pairs[0].better is None
    text = conclusions(comparison)[0]
    assert "No order of these optimisers by search loss can be concluded from 5 seeds" in text
    assert "no p below 0.0625" in text
    assert "At least 6 common seeds" in text
    assert math.isinf(comparison.pairs[0].low)


def test_enough_seeds_conclude_an_order(grid: Make) -> None:
    comparison = compare(grid({"bad": 10.0, "good": 0.1}, seeds=6))
    assert conclusions(comparison)[0].startswith("good reaches a lower search loss than bad (corrected p = 0.031).")
    assert comparison.pairs[0].high < 0


def test_the_correction_counts_all_pairs(grid: Make) -> None:
    levels = {"a": 0.1, "b": 10.0, "c": 1000.0}
    few, enough = compare(grid(levels, seeds=6)), compare(grid(levels, seeds=7))
    assert not any(pair.better for pair in few.pairs)
    assert "At least 7 common seeds" in conclusions(few)[0]
    assert [pair.better for pair in enough.pairs] == ["a", "a", "b"]
    assert "is refuted" in conclusions(few)[1]  # Friedman's test tells that they differ, not which


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_optimisers_are_hardly_ever_ordered(grid: Make, seeds: int, count: int) -> None:
    comparison = compare(grid({f"o{i}": 1.0 for i in range(count)}, seeds=seeds))
    decided = [pair for pair in comparison.pairs if pair.better]
    assert all(pair.corrected <= 0.05 and len(pair.differences) >= 6 for pair in decided)
    assert decided or any("No order" in text for text in conclusions(comparison))


def test_no_difference_is_not_equality(make: Make) -> None:
    offsets = [0.1, -0.2, 0.15, -0.1, 0.2, -0.3, 0.25, 0.1]
    a = [make(f"a{i}", [1.0 + offset], "a", i) for i, offset in enumerate(offsets)]
    text = conclusions(compare([*a, *(make(f"b{i}", [1.0], "b", i) for i in range(8))]))[0]
    assert "No order" in text
    assert "does not make them equal" in text


def test_optimisers_that_have_not_parted_yet_are_named(make: Make) -> None:
    studies = [make(f"{name}{i}", [0.5 - i / 10], name, i) for name in ("a", "b") for i in range(3)]
    said = "Within this budget a and b found the same loss on every common seed."
    assert said in conclusions(compare(studies))
    parted = compare([*studies, make("a3", [0.1], "a", 3), make("b3", [0.2], "b", 3)])
    assert said not in conclusions(parted)


def test_pairs_are_on_common_seeds_only(make: Make) -> None:
    a = [make(f"a{seed}", [1.0 + seed], "a", seed) for seed in (0, 1, 2)]
    b = [make(f"b{seed}", [1.5 * seed], "b", seed) for seed in (2, 1, 7)]
    comparison = compare([*a, *b])
    assert comparison.seeds == ("1", "2")
    np.testing.assert_allclose(sorted(comparison.pairs[0].differences), sorted([2 - 1.5, 3 - 3.0]))
    assert comparison.pairs[0].p == sign_flip(comparison.pairs[0].differences)
    apart = compare([make("a", [1.0], "a", 0), make("b", [2.0], "b", 1)])
    assert "no two optimisers share a seed" in conclusions(apart)[0]
    assert all(math.isnan(o.rank) for o in apart.optimisers)


def test_one_optimiser_is_compared_with_nothing(make: Make) -> None:
    comparison = compare([make("a", [0.5, 0.4])])
    assert conclusions(comparison) == ["There is one optimiser, eep, and nothing to compare it with."]
    assert comparison.pairs == ()


def test_search_loss_alone_is_said_to_be_that(make: Make) -> None:
    none = compare([make("a", [0.5]), make("b", [0.4], "tpe")])
    assert any(text.startswith("Only search loss is compared") for text in conclusions(none))
    some = compare([make("a", [0.5], test_loss=0.6), make("b", [0.4], "tpe")])
    assert any("1 of 2 studies have a test loss" in text for text in conclusions(some))
    assert some.held_out_pairs == ()


def test_test_losses_are_compared_where_every_study_has_one(make: Make) -> None:
    studies = [
        make(f"{name}{seed}", [0.5 + seed / 100], name, seed, test_loss=level + seed / 100)
        for name, level in (("a", 0.9), ("b", 0.3))
        for seed in range(6)
    ]
    comparison = compare(studies)
    assert comparison.held_out_pairs[0].better == "b"
    assert comparison.held_out_pairs[0].mean == pytest.approx(0.6)
    assert comparison.pairs[0].better is None
    assert any(
        text.startswith("On test (12 examples") and "b reaches a lower test" in text for text in conclusions(comparison)
    )
