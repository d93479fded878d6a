"""Mergings by clusters of experts, weighed by how often each is picked.

HC-SMoE (arXiv 2410.08589) clusters experts by their mean outputs, agglomeratively with average linkage. M-SMoE (arXiv
2310.01334) keeps the most frequent experts and lets every other join the one whose router logits are most like its own.
As published, the router still picks k of all n experts and its picks are aliased to the merged ones
(``router="alias"``). The ``_summed`` variants add up a cluster's probabilities before top-k (W_RM), which EEP's space
can express. Where routers choose among groups of experts first, each of these is clustered alone.

M-SMoE also permutes neurons before it merges, which ``m_smoe:aligned`` does (`matching.by_weights`). Left out: it gives
layers different numbers of experts.

Baselines: where experts differ they are behind `naee` wherever they were tried, aligned or not (`benchmarks/refit.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from moeopt.methods.base import Budget, Method, statistic
from moeopt.methods.statistics import Array, MeanOutputs, Routing, Statistic
from moeopt.plan import LayerPlan, Router

Labels = NDArray[np.int64]
Grouping = Callable[[Mapping[str, Any], Budget], Labels]


class Clustering(Method):
    """Merges clusters of experts.

    Args:
        summary: what it does.
        group: from statistics to the cluster, 0..r-1, of each expert, (n,).
        kinds: the statistics beside `Routing` that it needs.
        router: what becomes of the router.
    """

    def __init__(
        self, summary: str, group: Grouping, kinds: tuple[type[MeanOutputs], ...], router: Literal["alias", "prob"]
    ) -> None:
        self.summary, self.group, self.kinds = summary, group, (Routing, *kinds)
        self.router: Router = router

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        labels = self.group(statistics, budget)
        members = (labels == np.arange(budget.keep)[:, None]).astype(np.float64)
        return LayerPlan(
            budget.experts,
            budget.active,
            w_em=merged(members, statistic(statistics, Routing).visits).astype(np.float32),
            w_rm=members.astype(np.float32),
            router=self.router,
        )


def merged(members: Array, visits: Array) -> Array:
    """W_EM: each cluster's mean, weighed by visits; by nothing where none of the cluster was visited.

    Args:
        members: (r, n), 1 where an expert belongs to a cluster.
        visits: v_j, (n,).
    """
    weighed = members * visits
    sums = weighed.sum(axis=1, keepdims=True)
    means: Array = np.where(
        sums > 0, weighed / np.where(sums > 0, sums, 1), members / members.sum(axis=1, keepdims=True)
    )
    return means


def by_outputs(statistics: Mapping[str, Any], budget: Budget) -> Labels:
    """HC-SMoE: average linkage of mean expert outputs under the Euclidean distance, cut where r clusters are left."""
    means, share = statistics["MeanOutputs"].means, budget.share
    labels = []
    for i, part in enumerate(budget.parts):
        # a single expert has no tree
        clusters = fcluster(linkage(means[part], method="average"), share, "maxclust") if len(part) > 1 else np.ones(1)
        labels.append(numbered(clusters, share) + i * share)
    return np.concatenate(labels)


def by_logits(statistics: Mapping[str, Any], budget: Budget) -> Labels:
    """M-SMoE: the r most frequent experts, joined by those whose logits have the largest cosine with theirs."""
    routing: Routing = statistics["Routing"]
    dominant = np.array(budget.best(routing.visits))
    norms = np.sqrt(np.maximum(routing.logits.diagonal(), np.finfo(float).tiny))
    cosine = routing.logits / norms / norms[:, None]
    size = budget.experts // budget.router_groups
    alike = np.where(np.arange(budget.experts)[:, None] // size == dominant // size, cosine[:, dominant], -np.inf)
    labels: Labels = alike.argmax(axis=1).astype(np.int64)
    labels[dominant] = np.arange(budget.keep)
    return labels


def numbered(labels: NDArray[Any], r: int) -> Labels:
    """Clusters numbered by their first expert; where ties left fewer than r, last ones of the largest stand alone."""
    _, firsts, clusters = np.unique(labels, return_index=True, return_inverse=True)
    numbers: Labels = np.argsort(np.argsort(firsts))[clusters]
    for number in range(len(firsts), r):
        largest = int(np.bincount(numbers).argmax())
        numbers[np.flatnonzero(numbers == largest)[-1]] = number
    return numbers
