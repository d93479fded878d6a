"""Racing against slow obvious references, its error rate by simulation, and plain Optuna studies that use it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.trial import TrialState
from scipy.stats import norm, t

from moeopt.errors import StudyError
from moeopt.samplers.racing import (
    NOISE_FLOOR,
    RacingPruner,
    blocks,
    critical,
    honest_estimate,
    incumbent,
    lower_bound,
    mean_difference,
    rung_sizes,
)
from moeopt.study.storage import attributes
from moeopt.trials import genome

N = 64
EASY = np.random.default_rng(7).gamma(1.0, 1.0, N)
WEIGHTS = np.random.default_rng(8).integers(16, 64, N).astype(np.float32)


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class FakeObjective:
    """Trial `x` has the losses `table[x]`, written and reported rung by rung as `moeopt.Objective` does."""

    def __init__(self, table: np.ndarray, *, rungs: Any = None, block: bool = False, write: bool = True) -> None:
        self.table, self.block, self.write = table, block, write
        self.rungs = rungs or rung_sizes(table.shape[1], 4)

    def __call__(self, trial: optuna.Trial) -> float:
        losses, weights = self.table[trial.suggest_int("x", 0, len(self.table) - 1)], WEIGHTS[: self.table.shape[1]]
        for before, n in zip((0, *self.rungs), self.rungs):
            scores = np.stack([losses, weights, np.zeros(len(losses))])[:, :n]
            if self.write:
                attributes.write(trial.study, trial, genome.pack(genome.SCORES, scores.reshape(-1)))
            shown = slice(before if self.block else 0, n)
            trial.report(float(np.average(losses[shown], weights=weights[shown])), n)
            if n < len(losses) and trial.should_prune():
                best = incumbent(trial.study, scores)
                if best is not None:
                    trial.set_user_attr(genome.ESTIMATE, honest_estimate(scores, genome.read_scores(best)))
                raise optuna.TrialPruned
        return float(np.average(losses, weights=weights))


def plans(*shifts: float, sd: float = 0.1, seed: int = 0) -> np.ndarray:
    """Losses, float32 (plans, N): the easy ones, plus noise of weighted mean 0, plus a shift a plan."""
    noise = np.random.default_rng(seed).normal(0, sd, (len(shifts), N))
    noise -= np.average(noise, axis=1, weights=WEIGHTS)[:, None]
    return (EASY + noise + np.array(shifts)[:, None]).astype(np.float32)


def run(table: np.ndarray, order: list[int], pruner: Any = None, **options: Any) -> optuna.Study:
    study = optuna.create_study(pruner=pruner or RacingPruner(), sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({"x": order[0]})
    for x in order[1:]:
        study.enqueue_trial({"x": x})
    study.optimize(FakeObjective(table, **options), n_trials=len(order))
    return study


def ends(study: optuna.Study) -> list[int | None]:
    """Examples at which each trial was pruned, None for those that were not."""
    return [trial.last_step if trial.state == TrialState.PRUNED else None for trial in study.trials]


# Formulas


@pytest.mark.parametrize("n", [3, 5, 8])
def test_variance_is_that_of_the_mean_over_all_samples_without_replacement(n):
    rng = np.random.default_rng(n)
    losses, reference, ones = rng.exponential(1, 9), np.ones(9), np.ones(9)
    estimates = []
    for sample in combinations(range(9), n):
        order = [*sample, *(i for i in range(9) if i not in sample)]
        estimates.append(mean_difference(losses[order][:n], reference, ones)[:2])
    means, variances = np.array(estimates).T
    assert means.mean() == pytest.approx(losses.mean() - 1)
    assert variances.mean() == pytest.approx(means.var())


def test_variance_of_the_ratio_estimator_of_weighted_examples():
    rng = np.random.default_rng(0)
    size, n = 16, 8
    losses, weights = rng.normal(0, 1, size), rng.integers(10, 60, size).astype(float)
    estimates = []
    for _ in range(20_000):
        order = rng.permutation(size)
        estimates.append(mean_difference(losses[order][:n], np.zeros(size), weights[order])[:2])
    means, variances = np.array(estimates).T
    assert means.mean() == pytest.approx(np.average(losses, weights=weights), abs=0.02)
    assert variances.mean() == pytest.approx(means.var(), rel=0.1)


def test_bound_is_students_for_symmetric_differences_and_lower_for_left_skewed_ones():
    d = np.array([-2.0, -1, 0, 1, 2, 3, 4, 5])
    d -= 1.5
    got = lower_bound(1 + d, np.ones(32), np.ones(32), 0.01)
    assert got == pytest.approx(-t.ppf(0.99, 7) * np.sqrt(d.var(ddof=1) / 8 * (1 - 8 / 32)))
    skewed = np.array([1.0] * 7 + [-7.0])
    for sign, comparison in ((1, np.less), (-1, np.isclose)):
        students = -t.ppf(0.99, 7) * np.sqrt(skewed.var(ddof=1) / 8 * (1 - 8 / 32))
        assert comparison(lower_bound(1 + sign * skewed, np.ones(32), np.ones(32), 0.01), students)


def test_variance_grows_with_what_the_incumbent_gets_wrong_on_unseen_examples():
    rng = np.random.default_rng(0)
    reference = rng.random(64)
    losses = reference[:16] + rng.normal(0.1, 0.1, 16)
    plain = mean_difference(losses, reference, np.ones(64))[1]
    easy = reference.copy()
    easy[16:] = reference[:16].mean()
    assert mean_difference(losses, easy, np.ones(64))[1] <= plain
    hard = reference.copy()
    hard[60] = 20.0
    ratio = hard.var(ddof=1) / reference[:16].var(ddof=1)
    assert mean_difference(losses, hard, np.ones(64))[1] == pytest.approx(
        plain * ratio / max(1, reference.var(ddof=1) / reference[:16].var(ddof=1))
    )


def test_bound_of_degenerate_differences():
    reference, ones = np.linspace(0, 1, 32), np.ones(32)
    assert lower_bound(reference[:8], reference, ones, 0.01) == 0
    assert lower_bound(reference[:8] + 0.25, reference, ones, 0.01) == pytest.approx(0.25)
    assert lower_bound(reference + ones * 0.5, reference, ones, 0.01) == pytest.approx(0.5)
    flat = np.where(np.arange(32) < 8, 0.0, reference)
    assert lower_bound(np.linspace(0, 1, 8), flat, ones, 0.01) == -np.inf
    for bad in (np.nan, np.inf):
        losses = reference[:8].copy()
        losses[3] = bad
        assert lower_bound(losses, reference, ones, 0.01) == -np.inf
        unseen = reference.copy()
        unseen[20] = bad
        assert lower_bound(reference[:8] + np.arange(8), unseen, ones, 0.01) == -np.inf


@pytest.mark.parametrize(
    ("looks", "population"), [((8, 16, 32), 64), (tuple(range(8, 160, 8)), 160), (tuple(range(8, 64)), 64)]
)
def test_looks_spend_the_error_of_a_random_walk(looks, population):
    p = critical(looks, population, 0.05)
    assert p[0] == pytest.approx(0.05 * looks[0] / population, rel=1e-4)
    information = np.array([n * population / (population - n) for n in looks])
    steps = np.random.default_rng(0).normal(size=(100_000, len(looks))) * np.sqrt(np.diff(information, prepend=0))
    crossed = (steps.cumsum(1) / np.sqrt(information) > norm.isf(p)).cumsum(1) > 0
    np.testing.assert_allclose(crossed.mean(0), 0.05 * np.array(looks) / population, rtol=0.06, atol=5e-4)


# Error rate


def pruned_share(losses: np.ndarray, reference: np.ndarray, weights: np.ndarray, error: float, orders: int) -> float:
    looks = rung_sizes(len(losses), 4)[:-1]
    levels, rng, pruned = critical(looks, len(losses), error), np.random.default_rng(0), 0
    for _ in range(orders):
        order = rng.permutation(len(losses))
        a, b, w = losses[order], reference[order], weights[order]
        pruned += any(lower_bound(a[:n], b, w, p) > 0 for n, p in zip(looks, levels))
    return pruned / orders


@pytest.mark.parametrize("kind", ["normal", "skewed", "rare"])
def test_a_trial_that_ties_is_pruned_no_more_often_than_stated(kind):
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(20):
        reference, weights = rng.gamma(1.0, 1.0, N), rng.integers(16, 64, N).astype(float)
        if kind == "normal":
            difference = rng.normal(0, 0.3, N)
        elif kind == "skewed":
            difference = -0.3 * reference * rng.random(N)
        else:  # the incumbent gets few examples wrong, the trial those right
            reference = np.where(rng.random(N) < 0.1, 3.0, 0.05) * rng.uniform(0.8, 1.2, N)
            difference = -0.7 * reference * (reference > 1) + rng.normal(0, 0.05, N)
        difference -= np.average(difference, weights=weights)
        shares.append(pruned_share(reference + difference, reference, weights, 0.05, 150))
    assert np.mean(shares) < 0.058  # two standard errors above 0.05


def test_a_much_worse_trial_is_pruned_early_and_a_better_one_hardly_ever():
    rng = np.random.default_rng(4)
    noise = rng.normal(0, 0.3, N)
    noise -= np.average(noise, weights=WEIGHTS)
    assert pruned_share(EASY + noise + 1.0, EASY, WEIGHTS, 0.05, 200) == 1
    assert pruned_share(EASY + noise - 0.05, EASY, WEIGHTS, 0.05, 400) < 0.02
    few = [pruned_share(EASY + noise + 0.1, EASY, WEIGHTS, error, 300) for error in (0.01, 0.05, 0.2)]
    assert few[0] < few[1] < few[2]


# In studies


def test_worse_trials_stop_early_with_an_honest_estimate_and_better_ones_finish():
    table = plans(0.0, 1.0, 0.15, -0.3)
    study = run(table, [0, 1, 2, 3])
    assert ends(study)[:2] == [None, 8]
    assert ends(study)[2] in (8, 16, 32)
    assert ends(study)[3] is None
    assert study.best_trial.number == 3
    for trial in study.get_trials(states=(TrialState.PRUNED,)):
        n = trial.last_step
        x = trial.params["x"]
        difference = np.average(table[x][:n].astype(float) - table[0][:n], weights=WEIGHTS[:n])
        expected = np.average(table[0].astype(float), weights=WEIGHTS) + difference
        assert trial.user_attrs[genome.ESTIMATE] == pytest.approx(expected, abs=1e-5)


def test_equal_trials_are_not_pruned():
    assert ends(run(plans(0.0), [0, 0, 0])) == [None, None, None]
    assert ends(run(np.repeat(np.ones((1, N)), 2, 0), [0, 1])) == [None, None]


def test_differences_below_the_noise_floor_are_not_raced():
    table = plans(0.0, 0.05, sd=0.001)
    assert ends(run(table, [0, 1])) == [None, 8]
    assert ends(run(table, [0, 1], RacingPruner(noise_floor=0.06))) == [None, None]
    study = optuna.create_study(pruner=RacingPruner())
    study.set_user_attr(NOISE_FLOOR, 0.06)
    for x in (0, 1):
        study.enqueue_trial({"x": x})
    study.optimize(FakeObjective(table), n_trials=2)
    assert ends(study) == [None, None]


def test_no_decision_before_n_min():
    table = plans(0.0, 1.0)
    assert ends(run(table, [0, 1], RacingPruner(n_min=20))) == [None, 32]
    assert ends(run(table, [0, 1], rungs=(2, 4, 64))) == [None, None]


def test_studies_of_other_objectives_are_never_pruned():
    table = plans(0.0, 1.0, 2.0)
    assert ends(run(table, [0, 1, 2], write=False)) == [None] * 3

    def scores_without_examples_as_steps(trial):
        x = trial.suggest_int("x", 0, 2)
        attributes.write(trial.study, trial, genome.pack(genome.SCORES, np.full(3 * 16, float(x))))
        trial.report(float(x), 1)
        assert not trial.should_prune()
        return float(x)

    study = optuna.create_study(pruner=RacingPruner(), sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(scores_without_examples_as_steps, n_trials=5)


def test_incumbent_has_the_least_value_and_scores_of_the_same_examples():
    study = run(plans(0.2, 0.0, 0.0, 0.4), [0, 1, 2, 1, 3], NopPruner())
    study.add_trial(optuna.trial.create_trial(value=-5.0))
    best = incumbent(study)
    assert best is not None
    assert best.value == min(trial.value for trial in study.trials[:5])
    scores = genome.read_scores(best)
    assert incumbent(study, scores[:, :16]).number == best.number
    assert incumbent(study, scores) is None
    other = scores[:, :16].copy()
    other[1, 3] += 1
    assert incumbent(study, other) is None
    assert incumbent(optuna.create_study()) is None


def test_honest_estimate_of_all_examples_is_the_trials_own_mean():
    a, b = (np.stack([losses, WEIGHTS, WEIGHTS]) for losses in plans(0.0, 0.3))
    assert honest_estimate(b, a) == pytest.approx(np.average(b[0], weights=WEIGHTS), abs=1e-6)
    hard = np.argsort(EASY)[::-1]
    a, b = a[:, hard], b[:, hard]
    assert honest_estimate(b[:, :16], a) == pytest.approx(np.average(b[0], weights=b[1]), abs=0.1)
    assert np.average(b[0, :16], weights=b[1, :16]) > 1.5
    with pytest.raises(StudyError, match="not paired"):
        honest_estimate(a, b[:, :16])
    with pytest.raises(StudyError, match="not paired"):
        honest_estimate(a[:, :0], b)


def test_bad_arguments_are_refused():
    for bad in ({"error": 0.0}, {"error": 0.5}, {"noise_floor": -1.0}, {"noise_floor": float("nan")}, {"n_min": 3}):
        with pytest.raises(StudyError, match=f"{next(iter(bad))} must be"):
            RacingPruner(**bad)
    study = optuna.create_study(direction="maximize", pruner=RacingPruner())
    with pytest.raises(StudyError, match="direction='minimize'"):
        study.optimize(FakeObjective(plans(0.0)), n_trials=1)


def test_sizes_of_rungs_and_blocks():
    assert rung_sizes(64, 4) == (8, 16, 32, 64)
    assert rung_sizes(100, 3) == (25, 50, 100)
    assert rung_sizes(90, 3, factor=3) == (10, 30, 90)
    assert rung_sizes(3, 5) == (1, 2, 3)
    assert rung_sizes(7, 1) == (7,)
    assert blocks(10, 3) == (4, 7, 10)
    assert blocks(3, 20) == (1, 2, 3)
    assert set(np.diff((0, *blocks(1000, 20)))) == {50}
    for bad in ((0, 3), (3, 0)):
        with pytest.raises(StudyError):
            rung_sizes(*bad)
        with pytest.raises(StudyError):
            blocks(*bad)
    with pytest.raises(StudyError):
        rung_sizes(8, 2, factor=1)
