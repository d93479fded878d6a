"""All statistics: plans compared on the same examples, and best-so-far curves compared over repeated seeds.

Functions of arrays; nothing here knows a study. A curve is a step function: `costs` (n,), non-decreasing, what a run
had spent when its events ended, and `curve` (n,), the least loss it had by then, NaN before there is one. A loss holds
at a cost from there on.

scipy's `bootstrap` and exact `permutation_test` give the same numbers (the tests hold these against them). They are not
called, as they refuse a single example and would load `scipy.stats`, most of a second, for every evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy  # scipy.stats is loaded by its first use
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moeopt.evaluation.evaluation import Evaluation

Floats = NDArray[np.float64]
Standing = Literal["holds", "unclear", "broken"]
"""How a change stands to what is allowed (`Interval.within`)."""

ALPHA = 0.05
"""What a corrected p-value must not exceed for an order to be concluded."""
EXACT = 16
"""Differences up to which all 2^n signs are gone through; beyond, 2^16 are drawn."""
DRAWS = 20_000
CHUNK = 1 << 22
"""Numbers that a bootstrap draws at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval.

    >>> gap = Interval(0.1, 0.05, 0.15)
    >>> str(gap), gap.judged, str(-gap)
    ('+0.1000 [+0.0500, +0.1500]', 'worse', '-0.1000 [-0.1500, -0.0500]')
    """

    mean: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def judged(self) -> Literal["better", "worse", "no difference"]:
        """What a difference of losses says of the first: one that does not exclude 0 says nothing."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference"

    def within(self, limit: float) -> Standing:
        """Whether a change stays within what is allowed; the burden of proof is on it.

        It holds where the whole interval is at most `limit`, is broken where its mean is above, and unclear in between.

        >>> [Interval(mean, mean - 0.02, mean + 0.02).within(0.02) for mean in (-0.01, 0.01, 0.03)]
        ['holds', 'unclear', 'broken']
        """
        return "broken" if not self.mean <= limit else "holds" if self.high <= limit else "unclear"


def paired_bootstrap(
    a: Evaluation,
    b: Evaluation,
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    of: Literal["loss", "accuracy"] = "loss",
) -> Interval:
    """The difference a - b of weighted means, with a percentile bootstrap interval (Efron 1979).

    Examples (windows, for text) are drawn with replacement, the same ones for both, so that what makes an example hard
    for both cancels. A loss interval wholly below 0 says that `a` is better.

    Raises:
        ValueError: if the two were not evaluated on the same number of examples with the same weights, or an argument
            is out of range.
    """
    if of not in ("loss", "accuracy"):
        raise ValueError(f"of must be 'loss' or 'accuracy', got {of!r}")
    if not np.array_equal(a.weights, b.weights):
        raise ValueError(
            f"the evaluations are not of the same examples: {len(a.weights)} and {len(b.weights)} examples"
            f" of total weight {a.weights.sum():g} and {b.weights.sum():g}"
        )
    first, second = (a.losses, b.losses) if of == "loss" else (a.correct, b.correct)
    difference = first.astype(np.float64) - second
    return bootstrap(difference, a.weights.astype(np.float64), draws=draws, seed=seed, level=level)


def bootstrap(values: Floats, weights: Floats, *, draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """The weighted mean of `values`, (n,), with a percentile bootstrap interval.

    Raises:
        ValueError: if an argument is out of range.
    """
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 1 and level between 0 and 1, got {draws} and {level}")
    weighted = weights * values
    rng = np.random.default_rng(seed)
    n = len(weights)
    means = np.empty(draws)
    step = max(1, CHUNK // n)
    for start in range(0, draws, step):
        drawn = rng.integers(n, size=(min(step, draws - start), n))
        means[start : start + step] = weighted[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(weighted.sum() / weights.sum()), float(low), float(high))


# Curves --------------------------------------------------------------------------------------------------------------


def best_so_far(losses: Floats) -> Floats:
    """The least loss up to each event, (n,); NaN among `losses`, (n,), are passed over."""
    return np.fmin.accumulate(losses) if len(losses) else losses


def sample(costs: Floats, curve: Floats, at: Floats) -> Floats:
    """The curve's heights at the costs `at`, any shape; NaN before the first event."""
    return np.append(curve, np.nan)[np.searchsorted(costs, at, side="right") - 1]  # index -1 is the NaN


def mean_height(costs: Floats, curve: Floats, start: float, end: float) -> float:
    """The area under the curve from `start` to `end`, divided by end - start: a loss, the average over the run.

    NaN where the curve has no height at `start`, or end <= start.
    """
    if not end > start:
        return math.nan
    inner = costs[(costs > start) & (costs < end)]
    edges = np.concatenate([[start], inner, [end]])
    return float(sample(costs, curve, edges[:-1]) @ (np.diff(edges) / (end - start)))


def time_to(costs: Floats, curve: Floats, targets: Floats) -> Floats:
    """The cost at which each target, (m,), was reached (loss <= target); infinite where it was not."""
    heights = np.where(np.isnan(curve), np.inf, curve)
    index = np.searchsorted(-heights, -targets, side="left")  # heights do not increase
    return np.append(costs, np.inf)[index]


def restricted_mean(times: Floats, budget: float) -> float:
    """The mean of min(time, budget) over runs, (n,): defined whatever share reached the target.

    The restricted mean survival time of Royston & Parmar (2013), BMC Med. Res. Methodol. 13:152; all runs are seen up
    to the budget, so that no estimate of a survival curve is needed.
    """
    return float(np.minimum(times, budget).mean())


def make_targets(high: float, low: float, count: int = 50) -> Floats:
    """`count` losses from below `high` down to `low`, in equal ratios where high > 5 low > 0, else in equal steps."""
    if not high > low:
        return np.array([low])
    steps = np.arange(1, count + 1) / count
    targets = high * (low / high) ** steps if low > 0 and high > 5 * low else high + (low - high) * steps
    targets[-1] = low
    return targets


def ecdf(times: Floats, at: Floats) -> Floats:
    """The share of `times`, any shape, of at most `at`, (n,): the empirical distribution of run time.

    Over targets and seeds at once, as in Hansen, Auger, Ros, Mersmann, Tušar & Brockhoff (2021), COCO, Optim. Methods
    Softw. 36:114-144.
    """
    return np.searchsorted(np.sort(times, axis=None), at, side="right") / times.size


# Repeated seeds ------------------------------------------------------------------------------------------------------


def median_band(values: Floats, level: float = 0.95) -> tuple[Floats, Floats, Floats, float]:
    """Median over seeds, the ends of its band, and the probability with which the band covers the true median.

    The band is between order statistics: exact for any distribution, where a bootstrap of few seeds is not (Conover
    1999, Practical Nonparametric Statistics, 3.2). Below 6 seeds none covers 95%; it is then their range, which covers
    1 - 2^(1 - seeds).

    Args:
        values: (seeds, ...); NaN counts as worse than any loss.
        level: of confidence.
    """
    n = len(values)
    ordered = np.sort(np.where(np.isnan(values), np.inf, values), axis=0)
    # Both tails, if i values are left out at either end.
    beyond = 2 * scipy.stats.binom.cdf(np.arange((n + 1) // 2), n, 0.5)
    inner = max(1, int((beyond <= 1 - level).sum()))
    middle = ordered[(n - 1) // 2] / 2 + ordered[n // 2] / 2
    low, high = ordered[inner - 1], ordered[n - inner]
    middle, low, high = (np.where(np.isinf(part), np.nan, part) for part in (middle, low, high))
    return middle, low, high, float(1 - beyond[inner - 1])


def ranks(losses: Floats) -> Floats:
    """Rank of each optimiser within each seed, (seeds, optimisers), 1 the least loss; ties share, NaN are worst."""
    return np.asarray(scipy.stats.rankdata(np.where(np.isnan(losses), np.inf, losses), axis=1), dtype=np.float64)


def friedman(ranked: Floats, *, draws: int = DRAWS, seed: int = 0) -> float:
    """The p-value of all optimisers being equal, from `ranks`, (seeds, optimisers).

    Friedman's (1937) test, JASA 32:675-701, by its permutation distribution: within each seed ranks are shuffled, so
    that it holds for few seeds, where scipy's chi-square does not.
    """
    observed = float(np.square(ranked.sum(axis=0)).sum())
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.broadcast_to(ranked, (draws, *ranked.shape)), axis=2)
    beyond = np.square(shuffled.sum(axis=1)).sum(axis=1) >= observed - 1e-9
    return float((1 + beyond.sum()) / (1 + draws))


def sign_flip(differences: Floats, *, seed: int = 0) -> float:
    """The two-sided p-value of paired differences, (n,), being symmetric around 0: Fisher's (1935) randomisation test.

    The mean is held against those under all 2^n signs (see `EXACT`). It cannot be below `least_p`; 1 for n = 0.
    """
    n = len(differences)
    if n == 0:
        return 1.0
    signs = 1.0 - 2.0 * _subsets(n, seed)
    sums = np.abs(signs @ differences)
    beyond = int((sums >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()).sum())
    return beyond / len(signs) if n <= EXACT else (1 + beyond) / (1 + len(signs))


def least_p(n: int) -> float:
    """The least p-value that `sign_flip` can give for n differences: 2 of 2^n signs."""
    return min(1.0, 2.0 ** (1 - min(n, EXACT)))


def interval(differences: Floats, level: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """The interval of the differences' centre, (n,), that `sign_flip` does not reject: Hartigan's (1969).

    Its ends are means of subsets, JASA 64:1303-1317; it covers at least `level`. Infinite where there are too few
    differences for that: below 6 at 95%.
    """
    n = len(differences)
    if n == 0:
        return -math.inf, math.inf
    subsets = _subsets(n, seed)
    subsets = subsets[subsets.any(axis=1)]
    means = np.sort(subsets @ differences / subsets.sum(axis=1))
    beyond = int((1 - level) / 2 * (len(means) + 1) + 1e-9)
    if beyond == 0:
        return -math.inf, math.inf
    return float(means[beyond - 1]), float(means[-beyond])


def _subsets(n: int, seed: int) -> Floats:
    """Membership in all 2^n subsets of n things, or in 2^EXACT drawn ones, (subsets, n), 0 or 1."""
    if n <= EXACT:
        return (np.arange(1 << n)[:, None] >> np.arange(n) & 1).astype(np.float64)
    return np.random.default_rng(seed).integers(2, size=(1 << EXACT, n)).astype(np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being many, in the same order: Holm (1979), Scand. J. Stat. 6:65-70."""
    order = np.argsort(p_values, kind="stable")
    tests_left = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, tests_left * np.asarray(p_values)[order]))
    return [float(p) for p in corrected]


def seeds_to_conclude(pairs: int, alpha: float = ALPHA) -> int:
    """The fewest common seeds with which `sign_flip` can be below alpha after `holm` over so many pairs."""
    return math.ceil(1 + math.log2(pairs / alpha) - 1e-9)


def seeds_for_power(differences: Floats, pairs: int, alpha: float = ALPHA, power: float = 0.8) -> int | None:
    """About how many seeds show a difference as large as that of these, (n,), after correction; None if there is none.

    The usual normal approximation, ((z_{alpha / 2 pairs} + z_power) sd / mean)^2, and not fewer than
    `seeds_to_conclude`.
    """
    if len(differences) < 2 or differences.mean() == 0:
        return None
    z = float(scipy.stats.norm.isf(alpha / 2 / pairs) + scipy.stats.norm.ppf(power))
    needed = math.ceil((z * float(differences.std(ddof=1) / differences.mean())) ** 2)
    return max(needed, seeds_to_conclude(pairs, alpha))


def hypervolume(points: Floats, reference: Floats) -> float:
    """The volume between points and a reference that is worse than they: what at least one of them dominates.

    Args:
        points: (n, m), less being better; those that do not dominate the reference add nothing.
        reference: (m,).

    By slices along the last column (HSO, While et al. 2006): sorted, two columns take n log n, each further one n times
    as much.

    >>> hypervolume(np.array([[0.0, 0.5], [0.5, 0.0]]), np.array([1.0, 1.0]))
    0.75
    """
    inside = points[(points < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    if inside.shape[1] == 2:
        widths = reference[0] - np.minimum.accumulate(inside[:, 0])
        return float(widths @ np.diff(np.append(inside[:, 1], reference[1])))
    depths = np.diff(np.append(inside[:, -1], reference[-1]))
    slices = (hypervolume(inside[: i + 1, :-1], reference[:-1]) for i in range(len(inside)))
    return float(sum(area * depth for area, depth in zip(slices, depths) if depth))
