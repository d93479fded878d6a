"""Each statistic against a slow and obvious reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moeopt import statistics as s
from moeopt.evaluation import Evaluation, paired_bootstrap

SEEDS = range(5)


def evaluation(losses: s.Floats, weights: s.Floats | None = None, correct: s.Floats | None = None) -> Evaluation:
    weights = np.ones(len(losses)) if weights is None else weights
    correct = np.zeros(len(losses)) if correct is None else correct
    arrays = (np.asarray(array, np.float32) for array in (losses, weights, correct))
    return Evaluation(*arrays, tokens=0, layer_tokens=0, seconds=0.0)


@pytest.mark.parametrize("n", [2, 7, 300])
def test_the_bootstrap_is_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = (evaluation(rng.normal(size=n), weights) for weights in [rng.integers(1, 255, n)] * 2)
    interval = paired_bootstrap(a, b, draws=2000, seed=3, level=0.8)
    weights = a.weights.astype(float)
    peer = stats.bootstrap(
        (weights * (a.losses.astype(float) - b.losses), weights),
        lambda x, w, axis: x.sum(axis) / w.sum(axis),
        paired=True, n_resamples=2000, confidence_level=0.8, method="percentile", rng=np.random.default_rng(3),
    )  # fmt: skip
    assert interval.mean == pytest.approx(a.loss - b.loss, abs=1e-6)
    assert (interval.low, interval.high) == pytest.approx(tuple(peer.confidence_interval), rel=1e-12)
    assert n < 9 or interval != paired_bootstrap(a, b, draws=2000, seed=4, level=0.8)


def test_the_bootstrap_of_accuracy_and_of_one_example() -> None:
    a, b = evaluation(np.zeros(50), correct=np.arange(50) % 2), evaluation(np.zeros(50))
    assert paired_bootstrap(a, b).mean == 0
    interval = paired_bootstrap(a, b, of="accuracy", draws=999)
    assert interval.mean == 0.5
    assert interval.low < 0.5 < interval.high
    assert paired_bootstrap(evaluation(np.ones(1)), evaluation(np.zeros(1))) == s.Interval(1.0, 1.0, 1.0)


def test_bad_arguments_of_the_bootstrap_are_refused() -> None:
    a, b = evaluation(np.zeros(3)), evaluation(np.zeros(4))
    with pytest.raises(ValueError, match="3 and 4 examples"):
        paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="level between 0 and 1"):
        paired_bootstrap(a, a, level=95)
    with pytest.raises(ValueError, match="'loss' or 'accuracy', got 'acc'"):
        paired_bootstrap(a, a, of="acc")  # type: ignore[arg-type]


def a_run(seed: int) -> tuple[s.Floats, s.Floats]:
    """Costs that may repeat, and losses of which some are missing, the first too."""
    rng = np.random.default_rng(seed)
    losses = rng.lognormal(size=30)
    losses[rng.random(30) < 0.3] = np.nan
    losses[:3] = np.nan
    return np.cumsum(rng.integers(0, 5, size=30)).astype(float), losses


def slow_height(costs: s.Floats, losses: s.Floats, at: float) -> float:
    return min((x for cost, x in zip(costs, losses) if cost <= at and not math.isnan(x)), default=math.nan)


@pytest.mark.parametrize("seed", SEEDS)
def test_curves_are_the_least_loss_so_far(seed: int) -> None:
    costs, losses = a_run(seed)
    at = np.linspace(-1, costs[-1] + 3, 200)
    expected = [slow_height(costs, losses, budget) for budget in at]
    np.testing.assert_array_equal(s.sample(costs, s.best_so_far(losses), at), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_height_is_the_area_by_its_length(seed: int) -> None:
    costs, losses = a_run(seed)
    curve = s.best_so_far(losses)
    start, end = float(costs[np.isfinite(curve)][0]) + 0.5, float(costs[-1]) - 0.25
    middles = start + (np.arange(200_000) + 0.5) * (end - start) / 200_000
    expected = np.mean([slow_height(costs, losses, budget) for budget in middles[::100]])
    assert s.mean_height(costs, curve, start, end) == pytest.approx(expected, rel=2e-3)
    assert math.isnan(s.mean_height(costs, curve, -1.0, end))
    assert math.isnan(s.mean_height(costs, curve, end, end))


@pytest.mark.parametrize("seed", SEEDS)
def test_time_to_a_target_is_the_first_cost_with_such_a_loss(seed: int) -> None:
    costs, losses = a_run(seed)
    targets = np.append(np.geomspace(0.01, 5, 40), losses[np.isfinite(losses)])
    expected = [
        min((cost for cost, loss in zip(costs, losses) if loss <= target), default=math.inf) for target in targets
    ]
    np.testing.assert_array_equal(s.time_to(costs, s.best_so_far(losses), targets), expected)


def test_restricted_mean_is_the_area_under_the_share_not_there_yet() -> None:
    times = np.array([1.0, 4.0, np.inf, 9.0])
    steps = np.arange(0, 8, 0.001)
    assert s.restricted_mean(times, 8.0) == pytest.approx(np.mean([(times > at).mean() for at in steps]) * 8, rel=1e-3)


@pytest.mark.parametrize(("high", "low"), [(1.5, 0.02), (0.9, 0.5), (0.5, -3.0), (0.4, 0.4)])
def test_targets_go_down_evenly_to_the_least_loss(high: float, low: float) -> None:
    targets = s.make_targets(high, low)
    assert targets[-1] == low
    if high > low:
        assert (np.diff(targets) < 0).all()
        assert targets[0] < high
        even = np.log(targets) if low > 0 and high > 5 * low else targets
        np.testing.assert_allclose(np.diff(even), np.diff(even)[0])


def test_ecdf_is_the_share_of_targets_and_seeds() -> None:
    rng = np.random.default_rng(0)
    times = np.where(rng.random((5, 20)) < 0.2, np.inf, rng.integers(1, 30, size=(5, 20)))
    at = np.arange(0, 40.0)
    expected = [sum(time <= budget for time in times.ravel()) / times.size for budget in at]
    np.testing.assert_allclose(s.ecdf(times, at), expected)


@pytest.mark.parametrize("n", range(1, 13))
def test_the_band_covers_the_median_as_often_as_it_says(n: int) -> None:
    """Each value lies above or below the true median as a coin falls: go through all ways."""
    values = np.arange(float(n))
    _, low, high, covered = s.median_band(values)
    first, last = int(low), int(high)
    inside = sum(first < below <= last for below in (sum(w) for w in itertools.product((0, 1), repeat=n)))
    assert covered == pytest.approx(inside / 2**n)
    assert covered >= 0.95 or n < 6
    if n >= 6 and first + 1 <= last - 1:  # one narrower would not do
        tighter = sum(first + 1 < sum(w) <= last - 1 for w in itertools.product((0, 1), repeat=n))
        assert tighter / 2**n < 0.95


def test_median_and_band_take_a_missing_loss_for_the_worst() -> None:
    values = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, np.nan], [0.5, 7.0, np.nan]])
    middle, low, high, covered = s.median_band(values)
    np.testing.assert_array_equal(middle, [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(low, [0.5, 7.0, 3.0])
    np.testing.assert_array_equal(high, [2.0, np.nan, np.nan])
    assert covered == 0.75


@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_sign_flip_goes_through_all_signs(n: int, seed: int) -> None:
    d = np.random.default_rng(seed).normal(0.5, size=n).round(1)
    peer = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert s.sign_flip(d) == pytest.approx(peer.pvalue)
    assert s.sign_flip(d) >= s.least_p(n) == s.sign_flip(np.abs(d) + 1)


def test_five_seeds_give_no_p_below_a_sixteenth() -> None:
    assert s.least_p(5) == s.sign_flip(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == 0.0625
    assert s.sign_flip(np.zeros(5)) == s.sign_flip(np.array([])) == 1.0


def test_sign_flip_draws_signs_where_there_are_many() -> None:
    d = np.random.default_rng(1).normal(0.35, size=40)
    peer = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=100_000, rng=0)
    assert s.sign_flip(d) == pytest.approx(peer.pvalue, abs=0.005)
    assert s.sign_flip(d) == s.sign_flip(d)


@pytest.mark.parametrize("n", [6, 8, 11])
def test_the_interval_holds_what_the_test_does_not_reject(n: int) -> None:
    d = np.random.default_rng(n).normal(0.5, size=n)
    low, high = s.interval(d)
    for shift in np.linspace(d.min() - 1, d.max() + 1, 101):
        assert (s.sign_flip(d - shift) > 0.05) == (low < shift < high)


def test_below_six_differences_no_interval_has_ends() -> None:
    assert s.interval(np.arange(5.0)) == s.interval(np.array([])) == (-math.inf, math.inf)
    assert s.interval(np.arange(6.0)) == (0.0, 5.0)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for low, high in (s.interval(rng.standard_cauchy(9)) for _ in range(600))]
    assert np.mean(covered) > 0.93


def test_ranks_share_ties_and_put_missing_losses_last() -> None:
    ranked = s.ranks(np.array([[0.3, 0.1, 0.3, np.nan], [np.nan, np.nan, 1.0, 2.0]]))
    np.testing.assert_array_equal(ranked, [[2.5, 1.0, 2.5, 4.0], [3.5, 3.5, 1.0, 2.0]])


@pytest.mark.parametrize("losses", [np.random.default_rng(seed).random((4, 3)).round(1) for seed in SEEDS])
def test_friedman_is_its_permutation_distribution(losses: s.Floats) -> None:
    ranked = s.ranks(losses)
    statistic = np.square(ranked.sum(axis=0)).sum()
    ways = itertools.product(*(list(itertools.permutations(row)) for row in ranked))
    expected = np.mean([np.square(np.sum(way, axis=0)).sum() >= statistic - 1e-9 for way in ways])
    assert s.friedman(ranked) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("seed", SEEDS)
def test_holm_is_the_closure_of_bonferroni(seed: int) -> None:
    """A hypothesis is rejected when Bonferroni rejects every set of hypotheses that it is in."""
    p = np.random.default_rng(seed).random(5) ** 3
    sets = [c for size in range(1, 6) for c in itertools.combinations(range(5), size)]
    expected = [min(1.0, max(len(c) * min(p[list(c)]) for c in sets if i in c)) for i in range(5)]
    np.testing.assert_allclose(s.holm(list(p)), expected)


@pytest.mark.parametrize("pairs", [1, 3, 6, 28, 45])
def test_the_seeds_to_conclude_are_the_fewest(pairs: int) -> None:
    def could(n: int) -> bool:
        return s.holm([s.sign_flip(np.ones(n))] + [1.0] * (pairs - 1))[0] <= 0.05

    assert s.seeds_to_conclude(pairs) == next(n for n in range(1, 20) if could(n))


def test_the_seeds_for_power_show_the_difference() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(1.0, size=12)
    first = (first - first.mean()) / first.std(ddof=1) + 1.0
    n = s.seeds_for_power(first, 1)
    assert n is not None
    shown = [s.sign_flip(rng.normal(1.0, size=n)) <= 0.05 for _ in range(300)]
    assert 0.6 < np.mean(shown) < 0.95
    assert s.seeds_for_power(np.zeros(4), 3) is None
    assert s.seeds_for_power(np.array([1.0]), 3) is None
