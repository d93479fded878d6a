"""Sets of experts to keep, and the search for a good one where all are too many to try."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.methods.base import Budget

Array = NDArray[np.float64]
KeptSet = tuple[int, ...]

MOST_SETS = 20_000
"""Sets of one layer that are all tried; of more, some are searched."""
STEPS = 2
"""An elimination drops this part of the excess at a time, of the experts without which least changes."""
SWAPS = 16
"""Swaps that are tried at a time."""


def kept_sets(n: int, r: int, groups: int = 1) -> list[KeptSet]:
    """All sets of r out of n experts, in lexicographic order; as many of each of so many groups of consecutive ones."""
    parts = (range(first, first + n // groups) for first in range(0, n, n // groups))
    chosen = itertools.product(*(itertools.combinations(part, r // groups) for part in parts))
    return [tuple(itertools.chain(*each)) for each in chosen]


def masks(sets: Sequence[KeptSet], n: int) -> Tensor:
    """bool (sets, n)."""
    rows: NDArray[np.bool_] = np.zeros((len(sets), n), dtype=bool)
    for row, members in zip(rows, sets):
        row[list(members)] = True
    return torch.from_numpy(rows)


def eliminated(kept: KeptSet, budget: Budget, toggled: Callable[[KeptSet, KeptSet], Array]) -> KeptSet:
    """A set of r experts, from a larger one by dropping, a part of the excess at a time, those missed least.

    Args:
        kept: the set to begin with.
        budget: says how many experts to keep.
        toggled: scores of a set without each of its experts, or with each of others, (experts,); lower is better.
    """
    while (excess := len(kept) - budget.keep) > 0:
        left = excess - -(-excess // STEPS)
        for e in [kept[i] for i in np.argsort(toggled(kept, kept), kind="stable")]:
            if len(kept) > budget.keep + left and e in budget.spare(kept):
                kept = tuple(other for other in kept if other != e)
    return kept


def descended(
    kept: KeptSet,
    budget: Budget,
    of_sets: Callable[[list[KeptSet]], Array],
    toggled: Callable[[KeptSet, KeptSet], Array],
) -> tuple[float, KeptSet]:
    """The best swap of one expert for another, of `SWAPS` that promise most, again and again until none betters.

    Args:
        kept: the set to begin with.
        budget: says which experts there are; one of a group that routers choose first makes way for one of it.
        of_sets: scores of sets, (sets,); lower is better.
        toggled: as for `eliminated`. A swap promises what dropping the one and adding the other would do together.

    Returns:
        The score of the set, and the set.
    """
    least = float(of_sets([kept])[0])
    size = budget.experts // budget.router_groups
    while others := tuple(e for e in range(budget.experts) if e not in kept):
        pairs = np.argwhere(np.equal.outer(np.array(kept) // size, np.array(others) // size))
        if len(pairs) > SWAPS:
            promised = np.add.outer(toggled(kept, kept), toggled(kept, others))[tuple(pairs.T)]
            pairs = pairs[np.argsort(promised, kind="stable")[:SWAPS]]
        sets = [tuple(sorted({*kept} - {kept[i]} | {others[j]})) for i, j in pairs]
        scores = of_sets(sets)
        if scores.min() >= least:
            break
        kept, least = sets[int(scores.argmin())], float(scores.min())
    return least, kept
