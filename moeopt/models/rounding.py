"""When two computations of the same thing agree: bit for bit, or as far as the order of their sums may move them.

A kernel that gets another shape may add in another order (another tile, another split), and one that adds by atomics
does so each time. A sum of m terms, accumulated in float32 and rounded to a dtype with unit roundoff u, is off by
u + sqrt(m) u32 of its size as a rule (Higham & Mary 2019: errors are independent, so that their sum grows with
the root). Where c of them follow one another, and two results are compared that are both off,

    |a - b| / |a|  <=  sqrt(2 c) (u + sqrt(m) u32)

in Euclidean norms: 2 % in bfloat16 and 2e-5 in float32 for a decoder layer (c = 16) with sums of 4,096 terms.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

IN_BLOCK, IN_LAYER = 8, 16
"""c: how many sums and products that are rounded follow one another in an MoE block, and in a decoder layer."""

_INEXACT: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""What of a model agrees within rounding only, and was said."""


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether the tensors are equal, bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def bound(dtype: torch.dtype, terms: int, steps: int) -> float:
    """How far results of `steps` sums of so many terms may be apart, relative to their norm."""
    return math.sqrt(2 * steps) * (torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps) / 2


def near(first: Sequence[Tensor], second: Sequence[Tensor], terms: int, steps: int) -> bool:
    """Whether the tensors agree within rounding; those that are no floating numbers must be equal."""
    return len(first) == len(second) and all(_near(a, b, terms, steps) for a, b in zip(first, second))


def _near(a: Tensor, b: Tensor, terms: int, steps: int) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    most = bound(a.dtype, terms, steps)
    a, b = a.double(), b.to(a.device).double()
    return bool((a - b).norm() <= most * a.norm())


def agree(
    model: nn.Module, what: str, first: Sequence[Tensor], second: Sequence[Tensor], terms: int, steps: int
) -> bool:
    """Whether two results for the same thing agree; where only within rounding, that is said once, and noted.

    Args:
        model: what computed them; see `is_exact`.
        what: what they are, for the warning.
        terms: the most terms of a sum.
        steps: see `bound`.
    """
    if same(first, second):
        return True
    if not near(first, second, terms, steps):
        return False
    note(model, what)
    return True


def note(model: nn.Module, what: str) -> None:
    """Say once for a model that something agrees within rounding only."""
    noted = _INEXACT.setdefault(model, set())
    if not noted:
        warnings.warn(
            f"{type(model).__name__}: {what} agrees within rounding, not bit for bit, as kernels add in another order "
            "at another shape or time: losses move by as much (see noise_floor), also where hidden states are reused",
            stacklevel=3,
        )
    noted.add(what)


def is_exact(model: nn.Module) -> bool:
    """Whether every self-check that ran on a model so far held bit for bit."""
    return not _INEXACT.get(model)
