"""Paired bootstrap against what normal theory says."""

from __future__ import annotations

import numpy as np
import pytest

from moeopt.evaluation import Evaluation, paired_bootstrap


def evaluation(losses: np.ndarray, weights: np.ndarray | None = None, correct: np.ndarray | None = None) -> Evaluation:
    weights = np.ones(len(losses)) if weights is None else weights
    correct = np.zeros(len(losses)) if correct is None else correct
    arrays = (np.asarray(array, np.float32) for array in (losses, weights, correct))
    return Evaluation(*arrays, tokens=0, layer_tokens=0, seconds=0.0)


def test_interval_is_the_normal_one_for_many_normal_differences():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 50, 2000)
    difference = rng.normal(0.3, 1.0, 2000)
    interval = paired_bootstrap(evaluation(hard + difference), evaluation(hard))
    error = difference.std() / np.sqrt(2000)
    assert interval.mean == pytest.approx(difference.mean(), abs=1e-5)
    assert interval.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.05 * error + 1e-5)
    assert interval.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.05 * error + 1e-5)


def test_interval_covers_the_truth_as_often_as_its_level_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        a, b = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
        interval = paired_bootstrap(evaluation(a), evaluation(b), draws=400, level=0.8)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.72 < covered / 300 < 0.86


def test_weighted_mean_is_the_difference_of_losses():
    rng = np.random.default_rng(3)
    weights = rng.integers(1, 255, 40)
    a, b = evaluation(rng.random(40), weights), evaluation(rng.random(40), weights)
    interval = paired_bootstrap(a, b)
    assert interval.mean == pytest.approx(a.loss - b.loss, abs=1e-6)
    assert interval.low < interval.mean < interval.high
    reverse = paired_bootstrap(b, a)
    assert (reverse.low, reverse.high) == pytest.approx((-interval.high, -interval.low))


def test_accuracy_and_seed():
    zeros = np.zeros(50)
    a, b = evaluation(zeros, correct=np.arange(50) % 2), evaluation(zeros)
    assert paired_bootstrap(a, b).mean == 0
    interval = paired_bootstrap(a, b, of="accuracy", draws=999)
    assert interval.mean == 0.5
    assert interval.low < 0.5 < interval.high

    rng = np.random.default_rng(4)
    a = evaluation(rng.random(50))
    assert paired_bootstrap(a, b, draws=99, seed=1) == paired_bootstrap(a, b, draws=99, seed=1)
    assert paired_bootstrap(a, b, draws=99, seed=1) != paired_bootstrap(a, b, draws=99, seed=2)


def test_bad_arguments_are_refused():
    a, b = evaluation(np.zeros(3)), evaluation(np.zeros(4))
    with pytest.raises(ValueError, match="3 and 4 examples"):
        paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="level between 0 and 1"):
        paired_bootstrap(a, a, level=95)
    with pytest.raises(ValueError, match="'loss' or 'accuracy', got 'acc'"):
        paired_bootstrap(a, a, of="acc")  # type: ignore[arg-type]
