"""Prunings by a score per expert: the r experts of largest score are kept, the lower number first at a tie.

Where routers choose among m groups of experts first, the r / m of largest score are kept of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeopt.errors import MethodError
from moeopt.methods.base import Budget, Method, Scored
from moeopt.methods.statistics import Array, Moves, Norms, Routing, Statistic


class Ranking(Scored):
    """Keeps the experts of largest score.

    Args:
        summary: what it does.
        kind: the statistic that the score is made of: a class that is made with n, and whose `add` takes a
            `LayerActivations`.
        score: from the statistic to one number an expert, (n,).
        progressive: whether the earlier layers are pruned when a layer's statistic is taken.
    """

    def __init__(
        self, summary: str, kind: type[Any], score: Callable[[Any], Array], *, progressive: bool = False
    ) -> None:
        self.summary, self.kinds, self.score = summary, (kind,), score
        self.progressive = self.alone = progressive

    def scores(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> Array:
        scores = np.asarray(self.score(statistics[self.kinds[0].__name__]), np.float64)
        if scores.shape != (budget.experts,) or not np.isfinite(scores).all():
            raise MethodError(f"{self.summary}: a score is {budget.experts} finite numbers, got {scores!r}")
        return scores


class Random(Scored):
    """Keeps r uniformly drawn experts."""

    summary = "r uniformly drawn experts per layer"

    def scores(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> Array:
        return -np.argsort(rng.permutation(budget.experts)).astype(np.float64)


def reap(norms: Norms) -> Array:
    """The mean over X_j of g_j ||f_j||, 0 where X_j is empty (REAP, arXiv 2510.13999, equation 9)."""
    return norms.gated / np.maximum(norms.visits, 1)


RANKINGS: dict[str, Method] = {
    # v_j
    "frequency": Ranking("the experts picked most often", Routing, lambda routing: routing.visits),
    # sum over X_j of g_j
    "soft_activation": Ranking(
        "largest sum of gates over the tokens routed to them", Routing, lambda routing: routing.gates
    ),
    # sum over all tokens of p_j
    "soft_activation_all": Ranking(
        "largest sum of probabilities over all tokens", Routing, lambda routing: routing.probabilities
    ),
    # sum over X_j of ||f_j||
    "ean": Ranking("largest sum of output norms over the tokens routed to them", Norms, lambda norms: norms.norms),
    # mean over X_j of ||f_j||, 0 where X_j is empty
    "ean_mean": Ranking(
        "largest mean output norm over the tokens routed to them",
        Norms,
        lambda norms: norms.norms / np.maximum(norms.visits, 1),
    ),
    "reap": Ranking("largest mean gated output norm over the tokens routed to them", Norms, reap),
    # as LLM Compressor takes it
    "reap_progressive": Ranking("reap, each layer after the earlier ones are pruned", Norms, reap, progressive=True),
    # mean over X_j of ||f_j||^2, 0 where X_j is empty (arXiv 2606.15716, whose MAN is ean_mean)
    "msan": Ranking(
        "largest mean squared output norm over the tokens routed to them",
        Norms,
        lambda norms: norms.squares / np.maximum(norms.visits, 1),
    ),
    # sum over X_j of g_j ||f_j|| max(0, 1 - cos(x, x + y)) (EASY-EP, arXiv 2504.06792). x are the hidden states that
    # the norm before the block takes, y what the routed experts add to them: without shared experts, as in the authors'
    # code, which also has the clamp.
    "easy_ep": Ranking(
        "largest sum of gated output norms, tokens weighed by how much the layer turns them",
        Moves,
        lambda moves: moves.moved,
    ),
}
"""Methods by name, the formula of the score above each; notation as in `statistics`."""
