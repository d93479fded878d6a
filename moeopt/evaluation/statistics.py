"""Comparing two plans on the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moeopt.evaluation.evaluation import Evaluation

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


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


def bootstrap(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
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
    step = max(1, _CHUNK // n)
    for start in range(0, draws, step):
        drawn = rng.integers(n, size=(min(step, draws - start), n))
        means[start : start + step] = weighted[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(weighted.sum() / weights.sum()), float(low), float(high))
