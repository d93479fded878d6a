"""Which layers matter: how much of the ranking of a study's trials each layer group's choice explains.

A study of moeopt is no random design: samplers stay near good plans, and parts of a plan move together. What can be
said is predictive. The rank of a trial's loss, scaled to [0, 1], is predicted from the choices of all groups at once by
ridge regression,

    y = b + sum over groups g of f_g(x),        f_g(x) = X_g w_g,

X_g being the sums over rows of the group's W_EM and W_RM (for a pruning, which experts it keeps), so that the order of
rows does not matter. Ten folds predict trials that the fit has not seen; the ridge is the one of six that does so best.
The importance of group g is the share of var(y) by which the error of those predictions grows when the group's choice
is swapped with that of a random trial. For a sum this expectation has a closed form, trial by trial:

    d = (y - b - sum_h!=g f_h - mean f_g)^2 + var f_g - (y - b - sum_h f_h)^2

(permutation importance, Breiman 2001, without the permutations). Its mean over trials over var(y), with 1.96 standard
errors, is given; and the share of var(y) that the prediction explains, without which the rest means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEWEST, MOST, MOST_NUMBERS = 20, 600, 4_000_000
"""Trials below which nothing is said, and of which, and whose features, no more are used: evenly spaced ones."""
FOLDS = 10
RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)


@dataclass(frozen=True)
class Importance:
    """What `importance` finds.

    Args:
        shares: (groups,), of the variance of the trials' ranks; about 0 for a group that explains nothing.
        errors: (groups,), 1.96 standard errors of these.
        explained: share of the variance that is predicted for unseen trials; below 0: worse than the mean.
        trials: how many were used.
    """

    shares: Floats
    errors: Floats
    explained: float
    trials: int


def importance(features: NDArray[np.float32], losses: Floats, blocks: Sequence[slice]) -> Importance | None:
    """Importance of every block of features; None where fewer than 20 different trials, or one loss, say nothing.

    Args:
        features: (trials, size).
        losses: (trials,), finite.
        blocks: the place of each group in a row of `features`; they do not overlap.
    """
    _, first = np.unique(features, axis=0, return_index=True)
    first.sort()
    most = min(MOST, max(100, MOST_NUMBERS // max(1, features.shape[1])))
    if len(first) > most:
        first = first[np.linspace(0, len(first) - 1, most).astype(int)]
    x, y = features[first].astype(np.float64), _ranks(losses[first])
    n = len(y)
    if n < FEWEST or not blocks or np.ptp(y) == 0:
        return None
    folds = np.random.default_rng(0).permutation(n) % FOLDS
    parts = np.zeros((len(RIDGES), len(blocks), n))
    base = np.zeros(n)
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        mean, base[test] = x[train].mean(axis=0), y[train].mean()
        a, b = x[train] - mean, x[test] - mean
        eigenvalues, vectors = np.linalg.eigh(a @ a.T)
        seen = vectors.T @ (y[train] - base[test][0])
        for i, ridge in enumerate(RIDGES):
            dual = vectors @ (seen / (np.maximum(eigenvalues, 0.0) + ridge))
            weights = a.T @ dual
            for g, block in enumerate(blocks):
                parts[i, g, test] = b[:, block] @ weights[block]
    errors = [float(np.mean((y - base - part.sum(axis=0)) ** 2)) for part in parts]
    chosen = int(np.argmin(errors))
    part, variance = parts[chosen], float(y.var())
    missing = y - base - part.sum(axis=0)
    swapped = (missing + part - part.mean(axis=1, keepdims=True)) ** 2 + part.var(axis=1, keepdims=True)
    grown = (swapped - missing**2) / variance
    return Importance(
        grown.mean(axis=1), 1.96 * grown.std(axis=1, ddof=1) / np.sqrt(n), 1 - errors[chosen] / variance, n
    )


def _ranks(losses: Floats) -> Floats:
    """Ranks from 0 to 1, equal losses sharing the mean of theirs."""
    _, inverse, counts = np.unique(losses, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(middle[inverse] / max(1, len(losses) - 1), dtype=np.float64)
