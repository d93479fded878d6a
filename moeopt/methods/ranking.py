"""Prunings by a score per expert: the r experts of largest score are kept, the lower number first at a tie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeopt.methods.base import Budget, Method
from moeopt.methods.statistics import Array, Moves, Norms, Routing, Statistic
from moeopt.plan import LayerPlan

Kind = type[Routing] | type[Norms] | type[Moves]


class Ranking(Method):
    """Keeps the experts of largest score.

    Args:
        summary: what it does.
        kind: the statistic that the score is made of.
        score: from the statistic to one number an expert, (n,).
        progressive: whether the earlier layers are pruned when a layer's statistic is taken.
    """

    def __init__(self, summary: str, kind: Kind, score: Callable[[Any], Array], *, progressive: bool = False) -> None:
        self.summary, self.kind, self.score = summary, kind, score
        self.progressive = self.alone = progressive

    def needs(self, budget: Budget) -> dict[str, Statistic]:
        return {self.kind.__name__: self.kind(budget.experts, budget.k)}

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        scores = self.score(statistics[self.kind.__name__])
        return budget.pruned(np.argsort(-scores, kind="stable")[: budget.keep].tolist())


class Random(Method):
    """Keeps r uniformly drawn experts."""

    summary = "r uniformly drawn experts per layer"

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        return budget.pruned(rng.permutation(budget.experts)[: budget.keep].tolist())


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
    """The mean over X_j of g_j ||f_j||, 0 where X_j is empty (REAP, arXiv 2510.13999, equation 9).

    `reap_progressive` takes it layer by layer, the earlier ones being pruned, as LLM Compressor does.
    """
    return norms.gated / np.maximum(norms.visits, 1)


def msan(norms: Norms) -> Array:
    """The mean over X_j of ||f_j||^2, 0 where X_j is empty (arXiv 2606.15716, whose MAN is `ean_mean`)."""
    return norms.squares / np.maximum(norms.visits, 1)


def easy_ep(moves: Moves) -> Array:
    """The sum over X_j of g_j ||f_j|| max(0, 1 - cos(x, x + y)) (EASY-EP, arXiv 2504.06792).

    x are the hidden states that the norm before the block takes, y what the routed experts add to them: without shared
    experts, as in the authors' code, which also has the clamp.
    """
    return moves.moved
