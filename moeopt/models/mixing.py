"""How several experts become one: their projections, neurons put in order, and the means that are no weighted sum.

An expert gives W2 a(x), where row a of W1 (and of its gate W3) makes neuron a of a(x). Another order of its neurons, of
W1's and W3's rows and of W2's columns, gives the same expert, and another weighted sum with others.

`MERGES` mix one projection (W1, W3, W2 or a bias) at a time. ``linear`` is the weighted sum. The others take experts j
with weights w_j >= 0, which count by their shares of their sum:

* ``ties`` (TIES-Merging, arXiv 2306.01708): the expert of largest weight is the base b; of every other's difference
  W_j - W_b the `DENSITY` of largest magnitude stays, each number takes the sign of sum_j w_j (W_j - W_b), and what is
  added to W_b is the weighted mean of the differences of that sign. So of two experts weights say no more than which is
  the base. (REAP's code, with the same base, adds W_b - W_j,
  which leads away from the others; it keeps a tenth, and divides by all weights, not by those that agree.)
* ``slerp``: sum_j w_j |W_j| times the direction of sum_j w_j W_j / |W_j|. It is what mergekit and REAP call multislerp:
  their step in the tangent space at that direction is 0 for any experts. (REAP's takes differences from the dominant
  expert, and leaves it out.) Opposite experts of equal weight have no direction, and give 0.
* ``karcher``: sum_j w_j |W_j| times the weighted Fréchet mean of the directions on the sphere, by gradient steps; of
  two experts that is slerp proper. (REAP's code leaves the dominant expert out of it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.models.layers import is_transposed
from moeopt.plan import LayerPlan

DENSITY = 0.2
"""Share of each difference that TIES keeps; the paper's."""
STEPS, ENOUGH = 50, 1e-7
"""Of the Fréchet mean: how many steps at most, and of what length, in radians, the last one is."""

Reader = Callable[[int], Tensor]
"""The tensor of one expert of the full model by its number."""


@dataclass(frozen=True)
class ExpertForm:
    """How the tensors of one expert are laid out.

    Args:
        hidden, inner: numbers of its hidden states, and of its neurons.
        transposed: whether projections are (in, out), not (out, in).
        concatenated: whether W3 and W1 lie behind each other in what holds both, rather than by turns.
    """

    hidden: int
    inner: int
    transposed: bool
    concatenated: bool

    @classmethod
    def from_module(cls, experts: nn.Module) -> ExpertForm:
        """That of an experts module that dispatches through transformers' experts interface."""
        transposed, down = is_transposed(experts), experts.down_proj
        assert isinstance(down, Tensor)
        inner, hidden = down.shape[1:] if transposed else down.shape[:0:-1]
        return cls(hidden, inner, transposed, bool(getattr(experts, "is_concatenated", True)))

    def projections(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Views of one expert's tensor, one a projection, neurons first, and whether they are of neurons at all.

        Args:
            name: of the tensor in the experts module, such as ``"gate_up_proj"``.
            tensor: it, or what of it a checkpoint holds by itself, which is W1 or W3 then.
        """
        if name.startswith("down_proj"):
            is_weight = tensor.ndim == 2
            yield (tensor if self.transposed or not is_weight else tensor.T), is_weight
            return
        if not name.startswith(("gate_up_proj", "gate_proj", "up_proj")):
            yield tensor, False
            return
        rows = tensor.T if self.transposed and tensor.ndim == 2 else tensor
        if len(rows) == self.inner:
            yield rows, True
        elif self.concatenated:
            yield rows[: self.inner], True
            yield rows[self.inner :], True
        else:
            yield rows[::2], True
            yield rows[1::2], True


@torch.no_grad()
def mixed_expert(part: LayerPlan, i: int, name: str, expert: Reader, form: ExpertForm, out: Tensor) -> None:
    """Write a tensor of new expert i of a plan whose experts are permuted, or mixed otherwise than by a sum.

    Args:
        part: the layer's plan; it has a `w_em`.
        i: 0 to r - 1.
        name: of the tensor in the experts module.
        expert: gives the like tensor of each of the n experts, of the form and dtype of `out`.
        form: of these tensors.
        out: written.
    """
    row = part.expert_matrix[i]
    members = [int(j) for j in np.flatnonzero(row)]
    weights = torch.from_numpy(row[members].copy())
    views = [list(form.projections(name, expert(j))) for j in members]
    for place, (into, has_neurons) in enumerate(form.projections(name, out)):
        # in one order of numbers, whatever the form, so that sums over them round alike
        parts = torch.stack([view[place][0].contiguous() for view in views]).to(out.device).float()
        if has_neurons and part.neurons is not None:
            orders = torch.from_numpy(part.neurons[members].astype(np.int64)).to(out.device)
            parts = torch.stack([p[order] for p, order in zip(parts, orders)])
        into.copy_(MERGES[part.merge](weights, parts))


def linear(weights: Tensor, parts: Tensor) -> Tensor:
    """sum_j w_j W_j, of weights (m,) on the CPU and parts (m, ...), both float32, as all of these."""
    return (weights.to(parts.device) @ parts.flatten(1)).view_as(parts[0])


def ties(weights: Tensor, parts: Tensor) -> Tensor:
    """W_b + the weighted mean of the trimmed differences that have the sign of their weighted sum."""
    base = int(weights.argmax())
    others = [j for j in range(len(parts)) if j != base]
    if not others:
        return parts[base]
    agreeing, total, elected = (torch.zeros_like(parts[base]) for _ in range(3))
    differences = [_trimmed(parts[j] - parts[base]) for j in others]
    for j, difference in zip(others, differences):
        elected += weights[j] * difference
    for j, difference in zip(others, differences):
        agrees = (difference.sign() == elected.sign()) & (difference != 0)
        agreeing += torch.where(agrees, weights[j] * difference, 0.0)
        total += torch.where(agrees, weights[j], 0.0)
    return parts[base] + agreeing / total.masked_fill(total == 0, 1.0)


def _trimmed(difference: Tensor) -> Tensor:
    """The numbers of largest magnitude, the rest 0."""
    flat = difference.flatten()
    largest = flat.abs().topk(max(1, round(DENSITY * len(flat)))).indices
    return torch.zeros_like(flat).scatter(0, largest, flat[largest]).view_as(difference)


def slerp(weights: Tensor, parts: Tensor) -> Tensor:
    """The direction of the mean direction, at the mean norm."""
    shares, norms, units = _directions(weights, parts)
    return _at_norm(shares @ units, shares, norms, parts)


def karcher(weights: Tensor, parts: Tensor) -> Tensor:
    """The direction whose weighted sum of squared angles to all is least, at the mean norm."""
    shares, norms, units = _directions(weights, parts)
    mean = _unit(shares @ units)
    for _ in range(STEPS):
        cosines = (units @ mean).clamp(-1.0, 1.0)
        angles = torch.arccos(cosines)
        # angle / sine times a tangent as long as the sine: the logarithm map, whose weighted mean is the step
        ways = units - cosines[:, None] * mean  # from the mean to the unit vectors, as long as the sines
        step = (shares * angles / angles.sin().clamp_min(ENOUGH)) @ ways
        length = step.norm()  # and the exponential map back to the sphere
        mean = _unit(length.cos() * mean + length.sin() * _unit(step))
        if float(length) < ENOUGH:
            break
    return _at_norm(mean, shares, norms, parts)


def _directions(weights: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares (m,), norms (m,) and unit vectors (m, numbers) in float64; those of 0 have no direction."""
    weights, flat = (
        weights.to(parts.device),
        parts.flatten(1).double(),
    )  # as angles between near directions are lost in float32
    norms = flat.norm(dim=1)
    return weights.double() / weights.double().sum(), norms, flat / norms.masked_fill(norms == 0, 1.0)[:, None]


def _unit(vector: Tensor) -> Tensor:
    norm: Tensor = vector.norm()
    return vector / norm.masked_fill(norm == 0, 1.0)


def _at_norm(direction: Tensor, shares: Tensor, norms: Tensor, parts: Tensor) -> Tensor:
    mixed: Tensor = _unit(direction) * (shares @ norms)
    return mixed.view_as(parts[0]).float()


MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": linear, "ties": ties, "slerp": slerp, "karcher": karcher,
}  # fmt: skip
"""From weights (m,), on the CPU, and parts (m, ...), both float32, to the part of one expert."""
