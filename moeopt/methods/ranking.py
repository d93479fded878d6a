"""Prunings by a score per expert: the r experts of largest score are kept, the lower number first at a tie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeopt.methods.base import Method, Wanted
from moeopt.methods.statistics import Array, Norms, Routing, Statistic
from moeopt.plan import LayerPlan

Kind = type[Routing] | type[Norms]


class Ranking(Method):
    """Keeps the experts of largest score.

    Args:
        summary: what it does.
        kind: the statistic that the score is made of.
        score: from the statistic to one number an expert, (n,).
    """

    def __init__(self, summary: str, kind: Kind, score: Callable[[Any], Array]) -> None:
        self.summary, self.kind, self.score = summary, kind, score

    def needs(self, wanted: Wanted) -> dict[str, Statistic]:
        return {self.kind.__name__: self.kind(wanted.experts, wanted.k)}

    def layer(self, statistics: Mapping[str, Statistic], wanted: Wanted, rng: np.random.Generator) -> LayerPlan:
        scores = self.score(statistics[self.kind.__name__])
        return wanted.pruned(np.argsort(-scores, kind="stable")[: wanted.keep].tolist())


class Random(Method):
    """Keeps r uniformly drawn experts."""

    summary = "r uniformly drawn experts per layer"

    def layer(self, statistics: Mapping[str, Statistic], wanted: Wanted, rng: np.random.Generator) -> LayerPlan:
        return wanted.pruned(rng.permutation(wanted.experts)[: wanted.keep].tolist())


def frequency(routing: Routing) -> Array:
    """v_j."""
    return routing.visits


def soft_activation(routing: Routing) -> Array:
    """The sum over X_j of g_j."""
    return routing.gates


def soft_activation_all(routing: Routing) -> Array:
    """The sum over all tokens of p_j."""
    return routing.probabilities


def ean(norms: Norms) -> Array:
    """The sum over X_j of ||f_j||."""
    return norms.norms


def ean_mean(norms: Norms) -> Array:
    """The mean over X_j of ||f_j||, 0 where X_j is empty."""
    return norms.norms / np.maximum(norms.visits, 1)


def reap(norms: Norms) -> Array:
    """The mean over X_j of g_j ||f_j||, 0 where X_j is empty (REAP, arXiv 2510.13999, equation 9)."""
    return norms.gated / np.maximum(norms.visits, 1)
