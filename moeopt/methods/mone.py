"""MoNE, Mixture of Novices and Experts: experts whose output hardly varies become constants, novices.

Of the authors' code (github.com/zxgx/mode-pd) its metric "fusion" by layer. With X_j the tokens routed to expert j,
f_j(x) its output without its gate, g_j(x) the router's own weight of it, and d the dimensions of the hidden states,

    score_j = sqrt(sum_d Var_{x in X_j} f_j(x)_d) * sum_{x in X_j} g_j(x).

The r experts of largest score are kept, the lower number first at a tie. Each other one becomes its mean output over
X_j, 0 where X_j is empty. The router stays whole (``router="whole"``): a token that it sends to such a j gets g_j times
this constant, and j costs nothing.

Where we differ from the code: the variance is the population's, exactly, where theirs is a running update that takes
each batch about the mean so far and leaves out the first; gates are the model's own, where theirs are for OLMoE the top
k of the softmax whether or not the model renormalises them; constants are float32, theirs bfloat16.

Layers that share a choice of experts add up squares, visits and gates, each layer's squares about its own means; each
has constants of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moeopt.methods.base import Budget, Scored, statistic
from moeopt.methods.statistics import Array, Spread, Statistic
from moeopt.plan import LayerPlan


class Mone(Scored):
    """See the top of this file."""

    summary = "experts whose output varies least and is weighed least replaced by their mean output"

    kinds = (Spread,)

    def scores(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> Array:
        return mone(statistic(statistics, Spread))

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        (layer,) = statistic(statistics, Spread).means
        return self.layers(statistics, budget, rng, [layer])[0]

    def layers(
        self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator, group: Sequence[int]
    ) -> list[LayerPlan]:
        spread = statistic(statistics, Spread)
        kept = tuple(budget.best(mone(spread)))
        dropped = np.setdiff1d(np.arange(budget.experts), kept)
        constants = [spread.means[layer][dropped].astype(np.float32) for layer in group]
        n, k = budget.experts, budget.active
        return [LayerPlan(n, k, kept=kept, router="whole", novices=novices) for novices in constants]


def mone(spread: Spread) -> Array:
    """The score of every expert, (n,), 0 where it was never routed to."""
    squares, visits = (np.sum(list(sums.values()), axis=0) for sums in (spread.squares, spread.visits))
    scores: Array = np.sqrt(squares / np.maximum(visits, 1)) * spread.gates
    return scores
