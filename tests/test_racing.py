"""Racing against slow obvious references, its error rate by simulation, and plain Optuna studies that use it."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from moeopt import genome
from moeopt.errors import StudyError
from moeopt.racing import RacingPruner, blocks, critical, honest_estimate, incumbent, lower_bound, rung_sizes

optuna.logging.set_verbosity(optuna.logging.ERROR)

N = 64
EASY = np.random.default_rng(7).gamma(1.0, 1.0, N).astype(np.float32)
WEIGHTS = np.random.default_rng(8).integers(16, 64, N).astype(np.float32)


class FakeObjective:
    """Losses of a trial are `table[x]`, written and reported rung by rung as `moeopt.Objective` does."""

    def __init__(self, table: np.ndarray, *, report: str = "mean", write: bool = True, rungs: Any = None) -> None:
        self.table, self.report, self.write = table, report, write
        self.rungs = rungs or rung_sizes(table.shape[1], 4)

    def __call__(self, trial: optuna.Trial) -> float:
        x = trial.suggest_int("x", 0, len(self.table) - 1)
        losses, weights = self.table[x], WEIGHTS[: self.table.shape[1]]
        before = 0
        for n in self.rungs:
            if self.write:
                scores = np.stack([losses[:n], weights[:n], np.zeros(n, np.float32)])
                genome.write(trial.study, trial, genome.pack(genome.SCORES, scores.reshape(-1)))
            start = before if self.report == "block" else 0
            trial.report(float(np.average(losses[start:n], weights=weights[start:n])), n)
            before = n
            if n < len(losses) and trial.should_prune():
                best = incumbent(trial.study)
                if best is not None and self.write:
                    estimate = honest_estimate(genome.read_scores(trial), genome.read_scores(best))
                    trial.set_user_attr("estimate", estimate)
                raise optuna.TrialPruned
        return float(np.average(losses, weights=weights))


def table(*shifts: float, sd: float = 0.1, seed: int = 0, n: int = N) -> np.ndarray:
    """Losses of one plan a row: the easy losses, moved by a shift and by noise whose weighted mean is 0."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, sd, (len(shifts), n))
    noise -= np.average(noise, axis=1, weights=WEIGHTS[:n])[:, None]
    return (EASY[:n] + noise + np.array(shifts)[:, None]).astype(np.float32)


def study_of(pruner: Any, order: list[int], storage: Any = None, **options: Any) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(pruner=pruner, sampler=sampler, storage=storage, **options)
    for x in order:
        study.enqueue_trial({"x": x})
    return study


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def test_variance_of_an_unweighted_mean_is_that_over_all_samples_without_replacement():
    population = np.array([0.0, 1.0, 1.5, 4.0, 7.0, 8.0, 8.5])
    n, size = 3, 7
    samples = [population[list(chosen)] for chosen in combinations(range(size), n)]
    means = [sample.mean() for sample in samples]
    estimated = []
    for sample in samples:
        # symmetric about its middle value: no skewness correction, so that the bound shows the variance itself
        low, high = (lower_bound(s, np.ones(n), size, 0.1) for s in (sample, 2 * sample.mean() - sample))
        q = 1.8856180831641267  # Student's t, 2 degrees, 0.9
        estimated.append(min(sample.mean() - low, sample.mean() - high) / q)
    assert np.mean(means) == pytest.approx(population.mean())
    width = np.array(estimated)
    del high
    right = np.mean([min_width**2 for min_width in width])
    assert right >= np.var(means) * (1 - 1e-9)
