"""Layer groups, and the experts that rows of their matrices stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moeopt.errors import SpaceError
from moeopt.plan import Matrix, ModelShape, one_hot

Groups: TypeAlias = int | Sequence[tuple[int, int]]


def range_names(ranges: Sequence[tuple[int, int]]) -> list[str]:
    """The names of layer ranges that cover all layers.

    >>> range_names([(0, 7), (8, 8), (9, 31)])
    ['L00-07', 'L08', 'L09-31']
    """
    width = len(str(ranges[-1][1]))
    return [f"L{a:0{width}}" if a == b else f"L{a:0{width}}-{b:0{width}}" for a, b in ranges]


def layer_groups(groups: Groups, layers: int) -> tuple[tuple[int, int], ...]:
    """Inclusive layer ranges from a number of groups or explicit ranges.

    >>> layer_groups(3, 8)
    ((0, 1), (2, 3), (4, 7))
    """
    if isinstance(groups, (int, np.integer)) and not isinstance(groups, bool):
        if not 1 <= groups <= layers:
            raise SpaceError(f"groups must be between 1 and the model's {layers} MoE layers, got {groups}")
        size = layers // int(groups)
        firsts = [g * size for g in range(int(groups))]
        return tuple(zip(firsts, [first - 1 for first in firsts[1:]] + [layers - 1]))
    try:
        ranges = tuple((int(first), int(last)) for first, last in cast(Iterable[tuple[int, int]], groups))
    except (TypeError, ValueError):
        raise SpaceError(f"groups must be an integer or (first, last) layer ranges, got {groups!r}") from None
    expected = 0
    for first, last in ranges:
        if last < first:
            raise SpaceError(f"layer range {first}-{last} ends before it begins")
        if first != expected:
            wrong = "overlaps the one before" if first < expected else f"leaves out layer {expected}"
            raise SpaceError(
                f"layer range {first}-{last} {wrong}; ranges must cover layers 0-{layers - 1} once, in order"
            )
        expected = last + 1
    if expected != layers:
        wrong = f"leave out layers from {expected}" if expected < layers else f"go beyond layer {layers - 1}"
        raise SpaceError(f"layer ranges {list(ranges)} {wrong}; they must cover layers 0-{layers - 1} once, in order")
    return ranges


def one_hot_pair(rows: NDArray[np.integer[Any]], n: int) -> Matrix:
    """(groups, 2, r, n) from expert indices (groups, r): W_EM one-hot, and W_RM the same."""
    return np.stack([np.stack([one_hot(kept, n)] * 2) for kept in rows]).astype(np.float32)


def random_rows(
    rng: np.random.Generator, groups: int, r: int, n: int, router_groups: int = 1, *, ordered: bool = True
) -> NDArray[np.int64]:
    """r distinct experts out of n for each group, as many of each router group: int64 (groups, r).

    `ordered`: by number within a router group, else as drawn.
    """
    drawn = np.argsort(rng.random((groups * router_groups, n // router_groups)), axis=1)[:, : r // router_groups]
    return experts_of(np.sort(drawn, axis=1) if ordered else drawn, n, router_groups)


def first_rows(groups: int, r: int, shape: ModelShape) -> NDArray[np.int64]:
    """The first experts of each router group, as many of each, for every group: int64 (groups, r)."""
    within = np.arange(r // shape.router_groups)
    return experts_of(np.tile(within, (groups * shape.router_groups, 1)), shape.experts, shape.router_groups)


def experts_of(within: NDArray[np.integer[Any]], n: int, router_groups: int) -> NDArray[np.int64]:
    """Numbers of experts within their router groups, (groups * router_groups, r / router_groups), as numbers among all
    n: int64 (groups, r)."""
    first = np.arange(len(within))[:, None] % router_groups * (n // router_groups)
    return (within + first).reshape(len(within) // router_groups, -1).astype(np.int64)


def router_rows(w_em: Matrix, router_groups: int = 1) -> list[int]:
    """The router row that each new expert of W_EM, (r, n), gets where W_RM is no choice of its own.

    They are distinct, each of the router group that the new expert is in, and have the largest sum of absolute weights
    |w_em[i, row i]|: each new expert has that of the expert which weighs most in it, but where two would have one row.
    """
    r, n = len(w_em) // router_groups, w_em.shape[1] // router_groups
    blocks = (np.abs(w_em[g * r : (g + 1) * r, g * n : (g + 1) * n]) for g in range(router_groups))
    return [g * n + int(j) for g, block in enumerate(blocks) for j in linear_sum_assignment(-block)[1]]


def kept_rows(matrices: Matrix) -> NDArray[np.int64]:
    """Expert indices (groups, r) of one-hot pairs; SpaceError when a group is no plain pruning."""
    w_em, w_rm = matrices[:, 0], matrices[:, 1]
    rows: NDArray[np.int64] = w_em.argmax(axis=2).astype(np.int64)
    plain = np.array_equal(one_hot_pair(rows, matrices.shape[3]), np.stack([w_em, w_rm], axis=1))
    if not plain or any(len(set(kept)) < len(kept) for kept in rows.tolist()):
        raise SpaceError("a pruning space holds only distinct one-hot rows with the router following; this plan merges")
    return rows


def with_spare_rows(w_em: Matrix, w_rm: Matrix, rows: int, router_groups: int) -> Matrix:
    """Both matrices, (r, n), with so many rows, (2, rows, n): further ones keep experts that weigh most in none.

    Where routers choose groups of experts first, every group's rows are followed by its own spare ones.
    """
    if len(w_em) == rows:
        return np.stack([w_em, w_rm])
    blocks, n = router_groups, w_em.shape[1]
    parts, size, share = [], n // blocks, len(w_em) // blocks
    for b in range(blocks):
        pair = np.stack([w_em, w_rm])[:, b * share : (b + 1) * share]
        free = np.setdiff1d(np.arange(b * size, (b + 1) * size), np.abs(pair[0]).argmax(axis=1))
        spare = one_hot(free[: rows // blocks - share].tolist(), n)
        parts.append(np.concatenate([pair, np.stack([spare, spare])], axis=1))
    joined: Matrix = np.concatenate(parts, axis=1).astype(np.float32)
    return joined
