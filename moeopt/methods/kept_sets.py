"""Sets of experts to keep, and the search for a good one where all are too many to try."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
KeptSet = tuple[int, ...]

MOST_SETS = 20_000
"""Sets of one layer that are all tried; of more, some are searched."""
STEPS = 2
"""An elimination drops this part of the excess at a time, of the experts without which least changes."""
SWAPS = 16
"""Swaps that are tried at a time."""


def kept_sets(n: int, r: int) -> list[KeptSet]:
    """All sets of r out of n experts, in lexicographic order."""
    return list(itertools.combinations(range(n), r))


def masks(sets: Sequence[KeptSet], n: int) -> Tensor:
    """bool (sets, n)."""
    rows: NDArray[np.bool_] = np.zeros((len(sets), n), dtype=bool)
    for row, members in zip(rows, sets):
        row[list(members)] = True
    return torch.from_numpy(rows)


def eliminated(kept: KeptSet, r: int, toggled: Callable[[KeptSet, KeptSet], Array]) -> KeptSet:
    """A set of r experts, from a larger one by dropping, a part of the excess at a time, those missed least.

    Args:
        kept: the set to begin with.
        r: experts to keep.
        toggled: scores of a set without each of its experts, or with each of others, (experts,); lower is better.
    """
    while (excess := len(kept) - r) > 0:
        order = np.argsort(toggled(kept, kept), kind="stable")
        dropped = {kept[i] for i in order[: -(-excess // STEPS)]}
        kept = tuple(e for e in kept if e not in dropped)
    return kept


def descended(
    kept: KeptSet, n: int, of_sets: Callable[[list[KeptSet]], Array], toggled: Callable[[KeptSet, KeptSet], Array]
) -> tuple[float, KeptSet]:
    """The best swap of one expert for another, of `SWAPS` that promise most, again and again until none betters.

    Args:
        kept: the set to begin with.
        n: experts of the layer.
        of_sets: scores of sets, (sets,); lower is better.
        toggled: as for `eliminated`. A swap promises what dropping the one and adding the other would do together.

    Returns:
        The score of the set, and the set.
    """
    least = float(of_sets([kept])[0])
    while others := tuple(e for e in range(n) if e not in kept):
        pairs = list(itertools.product(range(len(kept)), range(len(others))))
        if len(pairs) > SWAPS:
            promised = np.add.outer(toggled(kept, kept), toggled(kept, others)).ravel()
            pairs = [pairs[i] for i in np.argsort(promised, kind="stable")[:SWAPS]]
        sets = [tuple(sorted({*kept} - {kept[i]} | {others[j]})) for i, j in pairs]
        scores = of_sets(sets)
        if scores.min() >= least:
            break
        kept, least = sets[int(scores.argmin())], float(scores.min())
    return least, kept
