"""Down projections of a layer's experts that are numbers of their own, not the full model's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import PlanError
from moeopt.plan.matrices import finite, frozen

Weights = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DownProjections:
    """W2 of the r experts of a planned layer, expert i giving W2_i a_i(x); all arrays float32.

    Either `whole` stands in place of what `kept` or `w_em` would give, or the product of `left` and `right` is added
    to it, for each expert a matrix of rank q that takes q (hidden + inner) numbers rather than hidden x inner.

    Args:
        whole: (r, hidden, inner).
        left: (r, hidden, q).
        right: (r, q, inner).

    Raises:
        PlanError: for arrays that are not finite or do not fit each other.
    """

    whole: Weights | None = None
    left: Weights | None = None
    right: Weights | None = None

    def __post_init__(self) -> None:
        names = tuple(name for name, array in self.arrays.items() if array is not None)
        if names not in (("whole",), ("left", "right")):
            raise PlanError(
                f"down projections are either whole, or left and right, got {' and '.join(names) or 'none'}"
            )
        for name in names:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.left is not None and self.right is not None:
            shapes = self.left.shape, self.right.shape
            if shapes[0][0] != shapes[1][0] or shapes[0][2] != shapes[1][1]:
                raise PlanError(f"left (r, hidden, q) and right (r, q, inner) do not fit each other, got {shapes}")

    @property
    def arrays(self) -> dict[str, Weights | None]:
        """By name of field."""
        return {"whole": self.whole, "left": self.left, "right": self.right}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(r, hidden, inner)."""
        if self.whole is not None:
            return self.whole.shape
        assert self.left is not None
        assert self.right is not None
        return (*self.left.shape[:2], self.right.shape[2])

    @property
    def rank(self) -> int | None:
        """q, of what is added; None for whole ones."""
        return None if self.left is None else self.left.shape[2]

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """32 bytes for each expert that tell its numbers from others."""
        arrays = [(name, array) for name, array in self.arrays.items() if array is not None]
        digests = []
        for i in range(self.shape[0]):
            digest = hashlib.sha256()
            for name, array in arrays:
                digest.update(f"{name},{array.shape[1:]};".encode())
                # adding 0.0 makes -0.0 of 0.0, which are equal and have other bytes
                digest.update((array[i] + np.float32(0.0)).astype("<f4").tobytes())
            digests.append(digest.digest())
        return tuple(digests)


def _checked(name: str, value: ArrayLike) -> Weights:
    array = np.array(value, dtype=np.float32)
    if array.ndim != 3 or not array.size:
        raise PlanError(f"{name} of down projections must have three dimensions, expert first, got {array.shape}")
    return frozen(finite(f"{name} of down projections", array))
