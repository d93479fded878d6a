"""Racing: a trial stops as soon as the examples it has seen tell that it will not beat the incumbent.

The losses l_i of the trial and m_i of the incumbent are paired: d_i = l_i - m_i, with weights w_i, i = 1..N. The n
examples seen are a sample without replacement of the N, since examples stand in a fixed random order. Estimated is the
mean difference over all N, sum(w d) / sum(w), by the ratio estimator (Cochran 1977, section 6.4), f = n / N:

    D = sum_n(w d) / sum_n(w)          u_i = w_i (d_i - D) / mean_n(w)
    s^2 = sum_n(u^2) / (n - 1)         V = (1 - f) s^2 / n * max(1, S_m^2 / s_m^2)

S_m^2 and s_m^2 are the same for the incumbent's losses, over all N and over the n seen (Isaki 1983). Differences are
skewed to the left: a plan may be a little worse on most examples and much better on a few that the incumbent gets
wrong. A sample that lacks those knows it only from the incumbent's losses.

The quantile of Student's t with n - 1 degrees, q, gets the first Cornish-Fisher term of the studentised mean of a
sample without replacement (Hall 1992; Babu & Singh 1985), g being the skewness of u, where that makes pruning harder:

    T = q + max(0, -g ((1 - f) / 2 + (2 - f) (q^2 - 1) / 6) / sqrt(n (1 - f)))

A trial is pruned when D - T sqrt(V), plus what its `penalty` is above the incumbent's, exceeds the noise floor. Means
of growing samples have the covariances of a Brownian motion seen at the information n N / (N - n), so that the error
rate can be spent over looks (Lan & DeMets 1983): by n examples the part n / N of it, each look getting the level that
`critical` finds by recursive integration (Armitage, McPherson & Rowe 1969). Spending earlier, as sqrt(n / N), would
save 2% of the examples more, and at a tie break the stated rate where differences are very skewed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState
from scipy.optimize import brentq
from scipy.special import ndtr, stdtrit

from moeopt.errors import StudyError
from moeopt.trials import description, genome
from moeopt.trials.front import is_feasible

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

NOISE_FLOOR = "noise_floor"
"""User attribute of a study: differences of mean loss up to this are noise (`moeopt.evaluation.noise_floor`)."""

PENALTY = "penalty"
"""Key, in the head of a trial's scores, of what its objective adds to their mean loss."""

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(256)
_FAR = 9.0

Array = NDArray[np.floating[Any]]


class RacingPruner(BasePruner):
    """Prunes a trial once it is confidently not better than the incumbent, with a stated error rate.

    For objectives that write the per-example losses of the examples so far in the trial (`moeopt.Objective` does) and
    report their mean with the number of examples as step. Trials of any other objective, and trials without a
    comparable incumbent (see `incumbent`), are never pruned.

    Args:
        error: the probability, over orders of the examples, that a trial whose mean loss over all examples is below the
            incumbent's is pruned at any of its rungs. It is reached, approximately, by trials that all but tie with the
            incumbent; others are safer. One study has one order, so its trials share their luck.
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
        looks = tuple(sorted(step for step in trial.intermediate_values if self.n_min <= step <= n))
        return self._beaten(study, trial, incumbent(study, scores, genome.scores_of(trial)), looks)

    def dominated(self, study: Study, trial: FrozenTrial, rungs: Sequence[int], values: Sequence[float | None]) -> bool:
        """Whether to stop a trial of several objectives: a complete one will surely be better in all of them.

        Optuna lets no trial of several objectives report; the objective asks here instead. Held against is, of the
        trials that are at least as good in all other objectives, the one of least loss.

        Args:
            study: it.
            trial: holds the scores of the examples so far.
            rungs: rising numbers of examples after which it was asked, or will be.
            values: of the trial, as the study orders them; None for the loss, which is raced.
        """
        scores = genome.read_scores(trial)
        n = 0 if scores is None else scores.shape[1]
        if scores is None or n < self.n_min:
            return False
        best = incumbent(study, scores, genome.scores_of(trial), values)
        return self._beaten(study, trial, best, tuple(rung for rung in rungs if self.n_min <= rung <= n))

    def _beaten(self, study: Study, trial: FrozenTrial, best: FrozenTrial | None, looks: tuple[int, ...]) -> bool:
        scores = genome.read_scores(trial)
        reference = None if best is None else genome.read_scores(best)
        if best is None or scores is None or reference is None:
            return False
        p = critical(looks, reference.shape[1], self.error)[-1]
        worse = lower_bound(scores[0], reference[0], reference[1], p) + penalty(trial) - penalty(best)
        return worse > self._floor(study)

    def _floor(self, study: Study) -> float:
        if self.noise_floor is not None:
            return self.noise_floor
        return float(description.number(study.user_attrs, NOISE_FLOOR) or 0.0)


def penalty(trial: FrozenTrial) -> float:
    """What the trial's objective adds to the mean of its scores' losses, as noted with the scores; 0 by default."""
    head = trial.system_attrs.get(genome.SCORES)
    return float(head.get(PENALTY, 0.0)) if isinstance(head, dict) else 0.0


def incumbent(
    study: Study,
    scores: Array | None = None,
    scores_name: str | None = None,
    values: Sequence[float | None] = (None,),
) -> FrozenTrial | None:
    """The complete trial of least loss, the earliest of equals, whose scores `genome.read_scores` reads; or None.

    One that breaks a constraint is none.

    Args:
        study: it.
        scores: of another trial, (3, n): it must have more examples, the first n of them with the same weights.
        scores_name: of that trial; its own (`genome.scores_of`) must be the same.
        values: where the study has several objectives, those of that trial, in their order, None for the loss: in the
            others it must be at least as good.
    """
    at = list(values).index(None)
    others = [(i, value) for i, value in enumerate(values) if value is not None]
    signs = [-1.0 if each == StudyDirection.MAXIMIZE else 1.0 for each in study.directions]
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    able = (t for t in done if t.values and all(signs[i] * t.values[i] <= signs[i] * value for i, value in others))
    for trial in sorted(able, key=lambda t: (t.values[at], t.number)):
        theirs = genome.read_scores(trial)
        if theirs is None or not is_feasible(trial):
            continue
        paired = scores is None or (theirs.shape[1] > scores.shape[1] and _paired(scores, theirs))
        if paired and (scores is None or genome.scores_of(trial) == scores_name):
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


def lower_bound(losses: Array, reference: Array, weights: Array, p: float) -> float:
    """Lower confidence bound, at one-sided level 1 - p, of the weighted mean difference over all examples.

    Args:
        losses: (n,) of the trial, n from 2 to N.
        reference, weights: (N,) losses of the incumbent, and weights.
        p: between 0 and 0.5.

    Returns:
        The bound as the module describes it; minus infinity where a loss is not finite, or where the incumbent's losses
        so far do not differ while others do.
    """
    n, population = len(losses), len(reference)
    mean, variance, skewness = mean_difference(losses, reference, weights)
    if variance == 0:
        return mean
    if not np.isfinite(variance):
        return -math.inf
    left = 1 - n / population
    q = float(stdtrit(n - 1, 1 - p))
    shift = -skewness * (left / 2 + (1 + left) * (q * q - 1) / 6) / math.sqrt(n * left)
    return mean - (q + max(0.0, shift)) * math.sqrt(variance)


def mean_difference(losses: Array, reference: Array, weights: Array) -> tuple[float, float, float]:
    """D, V and g of the module's description; arguments as for `lower_bound`. V is infinite where D tells nothing."""
    n, population = len(losses), len(reference)
    w, m = weights.astype(np.float64), reference.astype(np.float64)
    d = losses.astype(np.float64) - m[:n]
    if not (np.isfinite(d).all() and np.isfinite(m).all()):
        return 0.0, math.inf, 0.0
    mean, u = _residuals(d, w[:n])
    spread = float(u @ u) / (n - 1)
    if spread == 0 or n == population:
        return mean, 0.0, 0.0
    seen, everything = _residuals(m[:n], w[:n])[1], _residuals(m, w)[1]
    sampled, whole = float(seen @ seen) / (n - 1), float(everything @ everything) / (population - 1)
    unseen = max(1.0, whole / sampled if sampled else math.inf if whole else 1.0)
    return mean, (1 - n / population) * spread / n * unseen, float(np.mean(u**3)) / spread**1.5


def _residuals(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The weighted mean and what each value adds to its error, in units of the values."""
    mean = float(np.average(values, weights=weights))
    return mean, weights * (values - mean) / weights.mean()


@lru_cache(maxsize=1024)
def critical(looks: tuple[int, ...], population: int, error: float) -> tuple[float, ...]:
    """The p below which each look prunes, so that all looks together spend error * n / N by the n-th example.

    Args:
        looks: examples seen at each look so far, increasing, each below `population`.
    """
    at, mass, before, spent = np.zeros(1), np.ones(1), 0.0, 0.0
    levels: list[float] = []
    for n in looks:
        information = n * population / (population - n)
        step, scale = math.sqrt(information - before), math.sqrt(information)
        spend = error * n / population - spent

        def beyond(bound: float, mass: Array = mass, at: Array = at, step: float = step, spend: float = spend) -> float:
            return float(mass @ ndtr((at - bound) / step)) - spend

        bound = float(brentq(beyond, -_FAR * scale, _FAR * scale))
        levels.append(float(ndtr(-bound / scale)))
        half = (bound + _FAR * scale) / 2
        grid = bound - half * (1 - _NODES)
        kernel = np.exp(-0.5 * ((grid[:, None] - at) / step) ** 2) / (step * math.sqrt(2 * math.pi))
        at, mass = grid, half * _NODE_WEIGHTS * (kernel @ mass)
        before, spent = information, spent + spend
    return tuple(levels)


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

    For Optuna's `WilcoxonPruner`, which takes what is reported at each step for an independent instance: report the
    mean of the block, not that of all so far. Fewer blocks where there are too few examples.

    Raises:
        StudyError: if there is no example or no block.
    """
    if examples < 1 or count < 1:
        raise StudyError(f"blocks need an example and a block, got {examples} and {count}")
    return tuple(sorted({-(-examples * i // count) for i in range(1, count + 1)}))
