"""Merged experts: every tensor of new expert i is sum_j w_em[i, j] * that tensor of expert j, or what `mixing` makes.

EEP, arXiv 2407.00945, section 3.2.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from moeopt.models.devices import free_bytes, is_accelerator
from moeopt.models.layers import is_transposed, stacked, weights_map
from moeopt.models.mixing import ExpertForm, Reader, mixed_expert
from moeopt.plan import DownProjections, LayerPlan

CHUNK_BYTES = 4 << 20
"""Of float32 numbers that a CPU mixes at a time, so that they stay in its cache."""
FUSED_BYTES = 4 << 30
"""Of float32 numbers, sources and results, that an accelerator mixes at a time: one product a tensor, as a rule."""
DOWN = "down_proj"
"""Name of the down projections among the tensors of an experts module: (n, hidden, inner), or transposed."""


@torch.no_grad()
def merge(matrix: Tensor, tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """Mix the slices of a stacked tensor, accumulating in float32.

    Args:
        matrix: (r, n) float32.
        tensor: (n, ...) of any floating dtype.
        out: (r, ...) contiguous, of the tensor's dtype and on its device; written and returned. None allocates it.

    Returns:
        (r, ...), in the tensor's dtype. On a CPU temporaries stay within a few MiB, and every sum is rounded as in what
        `moeopt.export` writes, which mixes on a CPU always. An accelerator multiplies as much at once as a quarter of
        its free memory holds: its sums may differ from the CPU's, and where that changes how many products a tensor
        takes, from one another, by the rounding of float32, before they are rounded to the tensor's dtype.
    """
    r, n = matrix.shape
    out = tensor.new_empty((r, *tensor.shape[1:])) if out is None else out
    source, target = tensor.reshape(n, -1), out.view(r, -1)
    matrix = matrix.to(tensor.device, torch.float32)
    step = _numbers_at_a_time(r, n, tensor.device)
    with _whole_float32(tensor.device):
        for start in range(0, source.shape[1], step):
            target[:, start : start + step] = matrix @ source[:, start : start + step].float()
    return out


def _numbers_at_a_time(r: int, n: int, device: torch.device) -> int:
    """Of each of n tensors, how many numbers are mixed at a time."""
    if is_accelerator(device):
        # a power of two, so that a little more or less free memory changes no sum
        room = min(FUSED_BYTES, 1 << max(22, (free_bytes(device) // 4).bit_length() - 1))
        return max(1, room // (4 * (n + r)))
    # Column by column of (n, numbers), so that float32 copies are of a chunk; in these steps rounding is the same in
    # memory and in `exporting`, whatever the size of a tensor.
    return max(1, CHUNK_BYTES // (4 * n))


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 with all bits of it, also where the user lets CUDA round the factors to 10 (TF32)."""
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    # PyTorch 2.9 and later refuse to tell by the older name what was set by the newer one
    name, whole = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, whole)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class MergedCache:
    """Merged expert tensors of a model's layers, kept from one `patched` to the next.

    A layer is computed again only when its w_em or its down projections differ from those that its tensors were made
    from, and then into the same memory. Holds r / n of the experts' size for every layer that was ever merged, until
    `clear`.

    Args:
        shared: hold the tensors of one layer at a time, in one memory that all layers share. They are computed whenever
            another layer's turn comes, so that passing all batches through a layer before the next computes them once.

    Attributes:
        merges: how often a layer was computed.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.shared, self.merges = shared, 0
        self._entries: weakref.WeakKeyDictionary[nn.Module, tuple[object, dict[str, Tensor]]] = (
            weakref.WeakKeyDictionary()
        )

    def tensors(self, experts: nn.Module, part: LayerPlan) -> Mapping[str, Tensor]:
        """The (r, ...) merged tensors of an experts module whose weights are on their device now.

        Of a shared memory they are valid until the next call.
        """
        source = stacked(experts, part.experts)
        key = _key(experts, source, part)
        made_from, buffers = self._entries.get(experts, (None, {}))
        if made_from != key:
            if self.shared and self._entries:
                _, (_, buffers) = self._entries.popitem()
            self._entries.pop(experts, None)  # so that an interrupted merge is not taken for a finished one
            merge_into(buffers, source, part, experts)
            self._entries[experts] = (key, buffers)
            self.merges += 1
        return buffers

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for _, buffers in self._entries.values() for t in buffers.values())

    def clear(self) -> None:
        """Free everything held."""
        self._entries.clear()


def merge_into(buffers: dict[str, Tensor], source: Mapping[str, Tensor], part: LayerPlan, experts: nn.Module) -> None:
    """Write what the plan makes of every (n, ...) tensor of `source` into `buffers`, reusing those whose form fits.

    `experts` is the module that the tensors are of.
    """
    with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside of it
        matrix = torch.from_numpy(np.array(part.expert_matrix))
        for name in set(buffers) - set(source):
            del buffers[name]
        for name, tensor in source.items():
            old, shape = buffers.get(name), (len(matrix), *tensor.shape[1:])
            fits = old is not None and old.shape == shape and (old.dtype, old.device) == (tensor.dtype, tensor.device)
            buffers[name] = out = old if old is not None and fits else tensor.new_empty(shape)
            if name == DOWN and part.down is not None:
                for i in range(len(matrix)):
                    merged = partial(_merged, part, i, name, tensor, experts)
                    write_down(part.down, i, merged, out[i], is_transposed(experts))
            elif part.kept is not None:
                # not multiplied: a product with 0 would let the nan of another one in
                out.copy_(tensor[torch.tensor(part.kept).to(tensor.device)])
            elif part.sums_experts:
                merge(matrix, tensor, out)
            else:
                for i in range(len(matrix)):
                    mixed_expert(part, i, name, partial(tensor.select, 0), ExpertForm.from_module(experts), out[i])


def _merged(part: LayerPlan, i: int, name: str, tensor: Tensor, experts: nn.Module) -> Tensor:
    if part.kept is None and part.sums_experts:
        return merge(torch.from_numpy(part.expert_matrix[i : i + 1].copy()), tensor)[0]
    return new_expert(part, i, name, partial(tensor.select, 0), ExpertForm.from_module(experts))


def new_expert(part: LayerPlan, i: int, name: str, expert: Reader, form: ExpertForm) -> Tensor:
    """A tensor of new expert i as `kept` or `w_em` make it.

    Args:
        part, i: the layer's plan, and which of its r experts.
        name: of the tensor in the experts module.
        expert: gives the like tensor of each of the n experts.
        form: of these tensors.
    """
    if part.kept is not None:
        return expert(part.kept[i])
    if part.sums_experts:
        row = torch.from_numpy(part.expert_matrix[i : i + 1].copy())
        return merge(row, torch.stack([expert(j) for j in range(part.experts)]))[0]
    out = torch.empty_like(expert(0))
    mixed_expert(part, i, name, expert, form, out)
    return out


@torch.no_grad()
def write_down(down: DownProjections, expert: int, merged: Callable[[], Tensor], out: Tensor, transposed: bool) -> None:
    """Write the down projection of new expert `expert` into `out`, (hidden, inner) or transposed.

    Args:
        down: of a plan.
        expert: its number among the r.
        merged: what the expert's would be without them; asked for only where they are added to it.
        out: of the model's dtype.
        transposed: whether `out` and `merged()` are (inner, hidden).
    """
    if down.whole is not None:
        given = torch.from_numpy(down.whole[expert].copy())
        out.copy_(given.T if transposed else given)
        return
    assert down.left is not None
    assert down.right is not None
    # in float32 to the end, rounded once: the sum in the model's dtype would round the product before
    update = torch.from_numpy(down.left[expert].copy()) @ torch.from_numpy(down.right[expert].copy())
    out.copy_(merged().float() + (update.T if transposed else update).to(out.device))


def merged_view(experts: nn.Module, tensors: Mapping[str, Tensor], n: int) -> Any:
    """A shallow copy of an experts module that holds `tensors`, (r, ...), in place of its own (n, ...).

    It shares everything else with the original, has no hooks, and is good for calling
    `type(experts).forward`-like functions on it.
    """
    view = object.__new__(type(experts))
    attributes = dict(vars(experts))
    attributes["_parameters"] = {name: tensors.get(name, p) for name, p in experts._parameters.items()}
    attributes["_buffers"] = {name: tensors.get(name, b) for name, b in experts._buffers.items()}
    r = next(iter(tensors.values())).shape[0]
    # num_experts and its like, by which the family's forward and the grouped kernels count
    attributes.update({k: r for k, value in attributes.items() if type(value) is int and value == n and "expert" in k})
    attributes.pop("forward", None)  # accelerate's, bound to the original
    vars(view).update(attributes)
    return view


def _key(experts: nn.Module, source: Mapping[str, Tensor], part: LayerPlan) -> object:
    offloaded = hasattr(experts, "_hf_hook") and bool(weights_map(experts))  # then every load makes new tensors
    tensors = [(name, t.dtype, t.device, None if offloaded else identity(t)) for name, t in source.items()]
    w_em, down = part.expert_matrix, None if part.down is None else part.down.digests
    return w_em.shape, w_em.tobytes(), down, part.merge, part.neurons_digest, tensors


def identity(tensor: Tensor) -> object:
    """Compares unequal once the tensor was written, or has other memory; a storage's name is not used twice."""
    # A data pointer is used again once its memory is freed; a storage that is referred to weakly is not. Tensors of
    # inference mode count no versions, nor can they be written outside of it.
    version = 0 if tensor.is_inference() else tensor._version
    return version, None if tensor.is_meta else StorageWeakRef(tensor.untyped_storage())
