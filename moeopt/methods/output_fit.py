"""Output fit: keep experts that can stand in for the others, and route the others' probability to them.

Where the layer picks expert j, the plan should give what j gave. With weights c >= 0 on the kept experts S, the squared
error over the tokens routed to j,

    sum over X_j of g_j^2 || f_j - sum over i in S of c_i f_i ||^2,

is a least-squares problem whose normal equations are A_j = sum over X_j of g_j^2 G, G being the Gram matrix of a
token's expert outputs. Its solution is column j of W_RM: p' = W_RM p gives expert i the part c_i of j's probability.
Two kept sets are tried: NAEE's, and the one whose residuals, summed over the experts dropped, are least.

What top-k and renormalising make of it is then accounted for by the layer's true error (see `naee`): W_RM is drawn back
towards the pruning as far as that helps, and its entries are moved up and down while that helps, for a few rounds.
W_EM stays one-hot: a mean of weights does not give the mean of outputs. No gradients, and one pass over the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from moeopt.methods.base import Budget, Method, statistic
from moeopt.methods.kept_sets import KeptSet, kept_sets
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.statistics import Array, Statistic
from moeopt.methods.token_grams import TokenGrams
from moeopt.plan import LayerPlan, one_hot

MOST_SETS = 500
"""Kept sets whose residuals are computed; beyond, NAEE's set alone is tried."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far to go from the pruning to the least-squares solution."""
STEPS = (0.2, 0.1, 0.05)
"""By how much entries are moved, a round each."""
MOST_ENTRIES = 256
"""W_RM of more free entries is not refined."""


class OutputFit(Method):
    """See the top of this file."""

    summary = "kept experts that stand in for the others, W_RM fitted to the layer's output"

    kinds = (TokenGrams,)

    def layer(self, statistics: Mapping[str, Statistic], budget: Budget, rng: np.random.Generator) -> LayerPlan:
        tokens = statistic(statistics, TokenGrams)
        n, fits = budget.experts, tokens.fits()
        sets: list[KeptSet] = [tokens.best_set(budget)]
        if budget.sets <= MOST_SETS:
            every = kept_sets(n, budget.keep, budget.router_groups)
            sets = [every[int(tokens.of_sets(every, budget.active).argmin())]]
            sets.append(
                min(every, key=lambda kept: sum(column(fits[j], kept, j)[1] for j in range(n) if j not in kept))
            )
        mappings = [fitted(tokens, fits, kept, budget.active) for kept in dict.fromkeys(sets)]
        error, kept, w_rm = min(mappings, key=lambda mapping: mapping[0])
        prunings = tokens.of_sets(sets, budget.active)  # by selected rows, which may differ from a one-hot W_RM
        if prunings.min() <= error:
            return budget.pruned(sets[int(prunings.argmin())])
        return LayerPlan(n, budget.active, kept=kept, w_rm=w_rm.astype(np.float32), router="prob")


def column(a: Array, kept: KeptSet, j: int) -> tuple[Array, float]:
    """The weights c >= 0, (r,), on the kept experts that stand in for j best, and the squared error left.

    Args:
        a: A_j, (n, n).
    """
    rows = list(kept)
    inner, cross = a[np.ix_(rows, rows)], a[rows, j]
    values, vectors = np.linalg.eigh(inner)
    root = np.sqrt(np.maximum(values, 0.0))
    usable = root > 1e-7 * max(root.max(), np.finfo(float).tiny)
    if not usable.any():
        return np.zeros(len(rows)), float(a[j, j])
    half = root[usable, None] * vectors[:, usable].T  # half' half is inner
    c, _ = nnls(half, (vectors[:, usable].T @ cross) / root[usable])
    return c, float(a[j, j] - 2 * c @ cross + c @ inner @ c)


def fitted(tokens: TokenGrams, fits: Array, kept: KeptSet, active: int) -> tuple[float, KeptSet, Array]:
    """Error, kept set and fitted W_RM, (r, n)."""
    n = len(fits)
    pruning = one_hot(kept, n).astype(np.float64)
    whole = pruning.copy()
    dropped = [j for j in range(n) if j not in kept]
    for j in dropped:
        whole[:, j] = column(fits[j], kept, j)[0]
    candidates = np.stack([pruning + share * (whole - pruning) for share in SHARES])
    errors = errors_of(tokens, candidates, kept, active)
    best, w_rm = float(errors.min()), candidates[int(errors.argmin())]
    if len(kept) * len(dropped) <= MOST_ENTRIES:
        for step in STEPS:
            for j in dropped:
                moved = np.stack([w_rm] * (2 * len(kept)))
                for m, (i, sign) in enumerate(itertools.product(range(len(kept)), (-1, 1))):
                    moved[m, i, j] = max(0.0, moved[m, i, j] + sign * step)
                errors = errors_of(tokens, moved, kept, active)
                if float(errors.min()) < best:
                    best, w_rm = float(errors.min()), moved[int(errors.argmin())]
    return best, kept, w_rm


def errors_of(tokens: TokenGrams, w_rm: Array, kept: KeptSet, active: int) -> Array:
    """The layer's error under router mappings (choices, r, n) of kept experts: (choices,)."""
    matrices = torch.from_numpy(w_rm).float()
    return tokens.errors(lambda acts: mapped(acts, matrices.to(acts.logits.device), kept, active))


def mapped(acts: LayerActivations, w_rm: Tensor, kept: KeptSet, active: int) -> tuple[Tensor, Tensor]:
    """Experts that run and their weights, (tokens, choices, k), under router mappings (choices, r, n)."""
    scores = torch.einsum("tn,crn->tcr", acts.probabilities, w_rm)
    top, index = acts.rule.choose(scores, active, None if acts.correction is None else w_rm @ acts.correction.float())
    return torch.tensor(kept, device=index.device)[index], acts.gated(top)
