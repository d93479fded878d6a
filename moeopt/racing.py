"""Racing: a trial stops as soon as the examples it has seen tell that it will not beat the incumbent.

The trial's losses l_i and the incumbent's m_i are paired: d_i = l_i - m_i, weights w_i, example i of N. The n examples
seen are a sample without replacement of the N, since examples stand in a fixed random order; what is estimated is the
mean over all N, D = sum(w d) / sum(w). The ratio estimate and its variance (Cochran 1977, section 6.4), f = n / N:

    D_n = sum_n(w d) / sum_n(w)        u_i = w_i (d_i - D_n) / mean_n(w)
    s^2 = sum_n(u^2) / (n - 1)         V = (1 - f) s^2 / n

With n = N nothing is left to estimate, V = 0. The means of growing samples have the covariances of sums of independent
increments with information I_n = n N / (N - n). A test at each rung spends a part of the error rate (Lan & DeMets
1983): after n examples error * (n / N)^SPENT in all (Kim & DeMets 1987), which `critical` turns into the p of each look
by recursive integration (Armitage, McPherson & Rowe 1969).

Differences of losses are skewed: a plan may be a little worse on most examples and much better on few that the sample
has not seen. The quantile of Student's t at n - 1 degrees, q, gets the first Cornish-Fisher term of a studentised mean
of a sample without replacement, g being the sample skewness of u (Hall 1992; Babu & Singh 1985), and only where that
makes pruning harder:

    T = q + max(0, -g ((1 - f) / 2 + (2 - f) (q^2 - 1) / 6) / sqrt(n (1 - f)))

The trial is pruned when D_n - T sqrt(V) exceeds the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState
from scipy.optimize import brentq
from scipy.special import ndtr, stdtrit

from moeopt import genome
from moeopt.errors import StudyError

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

NOISE_FLOOR = "noise_floor"
"""User attribute of a study: differences of mean loss up to this are noise (`moeopt.evaluation.noise_floor`)."""

SPENT = 0.5
"""Exponent of the share of the error rate spent by each look; see benchmarks/racing.py."""

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(128)
_FAR = 9.0

Array = NDArray[np.floating[Any]]


class RacingPruner(BasePruner):
    """Prunes a trial once it is confidently not better than the incumbent, with a stated error rate.

    For objectives that write the per-example losses of the examples so far in the trial (`moeopt.Objective` does) and
    report their mean with the number of examples as step. Trials of any other objective, and trials without a
    comparable incumbent (see `incumbent`), are never pruned.

    Args:
        error: the probability, over orders of the examples, that a trial whose mean loss over all examples is below the
            incumbent's is pruned at any of its rungs. An approximation, kept to within simulation error by the losses
            of benchmarks/racing.py. One study has one order, so its trials share their luck.
        noise_floor: a trial that may lie within so much above the incumbent is not pruned, in units of the mean loss;
            None for the study's user attribute ``"noise_floor"``, 0 where it has none.
        n_min: examples before the first decision.

    Raises:
        StudyError: if an argument is out of range, or, by `prune`, if the study maximises.
    """

    def __init__(self, *, error: float = 0.05, noise_floor: float | None = None, n_min: int = 8) -> None:
        if not 0 < error < 0.5:
            raise StudyError(f"error must be a probability between 0 and 0.5, got {error}")
        if noise_floor is not None and not 0 <= noise_floor < math.inf:
            raise StudyError(f"noise_floor must be at least 0 and finite, got {noise_floor}")
        if n_min < 4:
            raise StudyError(f"n_min must be at least 4 examples, got {n_min}")
        self.error, self.noise_floor, self.n_min = error, noise_floor, n_min

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to stop `trial`; called by `trial.should_prune()`."""
        if study.direction == StudyDirection.MAXIMIZE:
            raise StudyError("racing compares losses: create the study with direction='minimize'")
        scores = genome.read_scores(trial)
        n = 0 if scores is None else scores.shape[1]
        if scores is None or n < self.n_min or trial.last_step != n:
            return False
        best = incumbent(study, scores)
        if best is None:
            return False
        reference = genome.read_scores(best)
        assert reference is not None
        looks = sorted(step for step in trial.intermediate_values if self.n_min <= step <= n)
        p = critical(looks, reference.shape[1], self.error)[-1]
        difference = scores[0].astype(np.float64) - reference[0, :n]
        return bool(lower_bound(difference, scores[1], reference.shape[1], p) > self._floor(study))

    def _floor(self, study: Study) -> float:
        if self.noise_floor is not None:
            return self.noise_floor
        return float(study.user_attrs.get(NOISE_FLOOR, 0.0))


def incumbent(study: Study, scores: Array | None = None) -> FrozenTrial | None:
    """The complete trial of least value, the earliest of equals, whose scores `genome.read_scores` reads; or None.

    With the `scores` (3, n) of another trial it must have more examples, the first n of them with the same weights.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for trial in sorted((t for t in done if t.value is not None), key=lambda t: (t.value, t.number)):
        found = genome.read_scores(trial)
        if found is not None and (scores is None or (found.shape[1] > scores.shape[1] and _paired(scores, found))):
            return trial
    return None


def honest_estimate(scores: Array, reference: Array) -> float:
    """What a trial's mean loss over all examples would be, from the examples it has seen, whatever pruned it.

    The incumbent's mean over all its examples plus the mean paired difference so far, both weighted.

    Args:
        scores: losses, weights, correct of the trial, (3, n), n at least 1.
        reference: those of the incumbent, (3, N), N at least n.

    Raises:
        StudyError: if the two are not of the same examples.
    """
    n = scores.shape[1]
    if n == 0 or not _paired(scores, reference):
        raise StudyError(
            f"the scores of {n} and {reference.shape[1]} examples are not paired: their weights or numbers do not agree"
        )
    losses, weights = scores[:2].astype(np.float64)
    m, all_weights = reference[:2].astype(np.float64)
    return float(np.average(m, weights=all_weights) + np.average(losses - m[:n], weights=weights))


def _paired(scores: Array, reference: Array) -> bool:
    n = scores.shape[1]
    return n <= reference.shape[1] and bool(np.array_equal(scores[1], reference[1, :n]))


def lower_bound(differences: Array, weights: Array, population: int, p: float) -> float:
    """Lower confidence bound, at one-sided level 1 - p, of the weighted mean difference over the whole population.

    Args:
        differences, weights: (n,) of the examples drawn, n at least 2; weights positive.
        population: N, examples in all, at least n.
        p: between 0 and 0.5.

    Returns:
        The bound as the module describes it; NaN if a difference is.
    """
    d, w = differences.astype(np.float64), weights.astype(np.float64)
    n, left = len(d), 1 - len(d) / population
    mean = float(np.average(d, weights=w))
    u = w * (d - mean) / w.mean()
    variance = float(u @ u) / (n - 1)
    if variance == 0 or left == 0:
        return mean
    q = float(stdtrit(n - 1, 1 - p))
    skewness = float(np.mean(u**3)) / variance**1.5
    shift = -skewness * (left / 2 + (1 + left) * (q * q - 1) / 6) / math.sqrt(n * left)
    return mean - (q + max(0.0, shift)) * math.sqrt(left * variance / n)


def critical(looks: Sequence[int], population: int, error: float) -> list[float]:
    """The p below which each look prunes, so that all looks together spend error * (n / N)^SPENT by the n-th example.

    Args:
        looks: examples seen at each look so far, increasing, each below `population`.
    """
    at, mass, before, spent = np.zeros(1), np.ones(1), 0.0, 0.0
    levels: list[float] = []
    for n in looks:
        information = n * population / (population - n)
        step, scale = math.sqrt(information - before), math.sqrt(information)
        spend = error * (n / population) ** SPENT - spent

        def beyond(bound: float, mass: Array = mass, at: Array = at, step: float = step, spend: float = spend) -> float:
            return float(mass @ ndtr((at - bound) / step)) - spend

        bound = float(brentq(beyond, -_FAR * scale, _FAR * scale))
        levels.append(float(ndtr(-bound / scale)))
        half = (bound + _FAR * scale) / 2
        grid = bound - half * (1 - _NODES)
        kernel = np.exp(-0.5 * ((grid[:, None] - at) / step) ** 2) / (step * math.sqrt(2 * math.pi))
        at, mass = grid, half * _NODE_WEIGHTS * (kernel @ mass)
        before, spent = information, spent + spend
    return levels


def rung_sizes(examples: int, rungs: int, factor: float = 2.0) -> tuple[int, ...]:
    """Examples seen after each rung, growing by `factor` to all of them: ``rung_sizes(64, 4) == (8, 16, 32, 64)``.

    Fewer rungs where there are too few examples for so many.

    Raises:
        StudyError: if there is no example, no rung, or the factor is not above 1.
    """
    if examples < 1 or rungs < 1 or factor <= 1:
        raise StudyError(f"rungs need an example, a rung and a factor above 1, got {examples}, {rungs} and {factor}")
    return tuple(sorted({math.ceil(examples / factor**i) for i in range(rungs)}))


def blocks(examples: int, count: int) -> tuple[int, ...]:
    """Examples seen after each of `count` blocks as equal as can be: ``blocks(10, 3) == (4, 7, 10)``.

    For Optuna's `WilcoxonPruner`, which takes what is reported at each step for an independent instance: report the mean
    of the block, not that of all so far. Fewer blocks where there are too few examples.

    Raises:
        StudyError: if there is no example or no block.
    """
    if examples < 1 or count < 1:
        raise StudyError(f"blocks need an example and a block, got {examples} and {count}")
    return tuple(sorted({-(-examples * i // count) for i in range(1, count + 1)}))
