"""A quantised checkpoint seen with the experts of some layers dequantised, for what makes new experts of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, dtype
from transformers import PreTrainedModel

from moeopt.errors import ExportError
from moeopt.exporting.quantised import Quantised
from moeopt.exporting.source import Source, Stored, dtype_name
from moeopt.plan import LayerPlan

BANDS = 2048
"""Dequantised bands of rows that are kept: more than experts that are mixed at a time."""
ROWS = 32
"""Of a band; the groups of MXFP4."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1, by their four bits."""


class Dequantised(Source):
    """A checkpoint in which some quantised weights are tensors of floats, made a band of rows at a time.

    Weights are what transformers makes of them on loading, bit for bit: FP8 is value times scale in float32, rounded
    once; MXFP4, (n, out, groups, 16) and (n, out, groups), becomes (n, in, out), as gpt-oss has it.

    Args:
        source: the checkpoint.
        quantised: its quantised weights.
        weights: names of those that are to be floats.
        kind: dtype to make them in.

    Raises:
        ExportError: when the parts of a weight are not of shapes and dtypes that its method has.
    """

    def __init__(self, source: Source, quantised: Quantised, weights: Collection[str], kind: dtype) -> None:
        self.folder, self.files = source.folder, source.files
        self._source, self._quantised, self._kind = source, quantised, kind
        self._bands: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()
        self._scales: OrderedDict[str, Tensor] = OrderedDict()
        self._mapped: dict[Path, Tensor] = {}
        self._made: dict[str, tuple[int, ...]] = {}
        self.tensors = {}
        for name, stored in source.tensors.items():
            weight = quantised.parts.get(name)
            if weight not in weights or weight is None:
                self.tensors[name] = stored
            elif weight not in self._made:
                self._made[weight] = self._shape(weight)
                self.tensors[weight] = Stored(dtype_name(kind), self._made[weight])

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Source.read`."""
        if name not in self._made:
            return self._source.read(name, start, stop)
        return self.tensor(name, start, stop).view(torch.uint8).numpy().tobytes()

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Source.tensor`."""
        if name not in self._made:
            return self._source.tensor(name, start, stop)
        *_, rows, columns = self._made[name]
        stop = math.prod(self._made[name]) if stop is None else stop
        size, height = rows * columns, ROWS * columns
        pieces = []
        while start < stop:
            expert, at = divmod(start, size)
            band = at // height
            end = min(stop, expert * size + min(size, (band + 1) * height))
            begin = start - expert * size - band * height
            pieces.append(self._band(name, expert, band).reshape(-1)[begin : begin + end - start])
            start = end
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self._kind)

    def _shape(self, weight: str) -> tuple[int, ...]:
        main, scale = (self._source.tensors[name] for name in self._names(weight))
        if self._quantised.method == "mxfp4":
            if main.dtype == scale.dtype == "U8" and main.shape == (*scale.shape, 16) and len(main.shape) == 4:
                n, out, groups, _ = main.shape
                return n, groups * 2 * 16, out
        elif main.dtype in ("F8_E4M3", "F8_E5M2") and len(main.shape) in (2, 3):
            grid = scale.shape if len(scale.shape) == len(main.shape) else (*main.shape[:-2], 1, 1)
            fits = grid[:-2] == main.shape[:-2] and all(a % b == 0 for a, b in zip(main.shape[-2:], grid[-2:]))
            if fits and scale.size == math.prod(grid):
                return main.shape
        raise ExportError(
            f"{weight!r} cannot be dequantised, as its experts are to be made anew: it is stored as {main.dtype} "
            f"{main.shape} with scales {scale.dtype} {scale.shape}"
        )

    def _names(self, weight: str) -> tuple[str, str]:
        """Of the tensor with its numbers, and of that with its scales."""
        parts, packing = self._quantised.weights[weight], self._quantised.packings[weight]
        return parts[packing.main], next(parts[end] for end in packing.needed[0] if end in parts)

    def _band(self, weight: str, expert: int, band: int) -> Tensor:
        """Rows `ROWS * band` and on of one expert, (up to ROWS, columns)."""
        key = (weight, expert, band)
        if key in self._bands:
            self._bands.move_to_end(key)
        else:
            make = self._mxfp4 if self._quantised.method == "mxfp4" else self._fp8
            self._bands[key] = make(weight, expert, band)
            while len(self._bands) > BANDS:
                self._bands.popitem(last=False)
        return self._bands[key]

    def _fp8(self, weight: str, expert: int, band: int) -> Tensor:
        name, scales = self._names(weight)
        *lead, rows, columns = self._made[weight]
        first = ROWS * band
        last = min(rows, first + ROWS)
        at = expert * rows
        values = self._source.tensor(name, (at + first) * columns, (at + last) * columns).view(-1, columns).float()
        stored = self._source.tensors[scales]
        grid_rows, grid_columns = stored.shape[-2:] if len(stored.shape) == 2 + len(lead) else (1, 1)
        grid = self._scale(scales).view(-1, grid_rows, grid_columns)[expert]
        per_row = grid[torch.arange(first, last) // (rows // grid_rows)]
        return (values * per_row.repeat_interleave(columns // grid_columns, 1)).to(self._kind)

    def _scale(self, name: str) -> Tensor:
        """All scales of a tensor, float32."""
        if name not in self._scales:
            stored = self._source.tensors[name]
            if stored.dtype in ("U8", "F8_E8M0"):  # exponents of two
                raw = torch.frombuffer(bytearray(self._source.read(name, 0, stored.size)), dtype=torch.uint8)
                self._scales[name] = (raw.float() - 127).exp2()
            else:
                self._scales[name] = self._source.tensor(name).float()
            while len(self._scales) > BANDS:
                self._scales.popitem(last=False)
        return self._scales[name]

    def _mxfp4(self, weight: str, expert: int, band: int) -> Tensor:
        """A band of inputs is one group of 32: 16 bytes of each output, the low four bits first."""
        name, scales = self._names(weight)
        _, out, groups, size = self._source.tensors[name].shape
        every = self._packed(name, expert, out * groups * size).view(out, groups, size)[:, band]
        exponents = self._packed(scales, expert, out * groups).view(out, groups)[:, band]
        numbers = torch.stack([every & 15, every >> 4], -1).reshape(out, 2 * size)
        values = torch.tensor(FP4, dtype=self._kind)[numbers.int()]
        return torch.ldexp(values, exponents.int()[:, None] - 127).to(self._kind).T.contiguous()

    def _packed(self, name: str, expert: int, size: int) -> Tensor:
        """The bytes of one expert: mapped from the file where it can be, as a band is spread over all of them."""
        stored = self._source.tensors[name]
        if stored.offset < 0:
            return self._source.tensor(name, expert * size, (expert + 1) * size)
        if stored.file not in self._mapped:
            size_of_file = stored.file.stat().st_size
            self._mapped[stored.file] = torch.from_file(str(stored.file), size=size_of_file, dtype=torch.uint8)
        at = stored.offset + expert * size
        return self._mapped[stored.file][at : at + size]


def dequantised(
    source: Source, quantised: Quantised, plans: Mapping[str, LayerPlan], model: PreTrainedModel
) -> tuple[Source, list[str]]:
    """The checkpoint with quantised experts as floats where new ones are made of them, and the modules of these.

    Args:
        source: the checkpoint.
        quantised: its quantised weights.
        plans: of each module of experts, by its name in the checkpoint.
        model: what its config describes, in its dtype.
    """
    weights: dict[str, str] = {}
    for module in (module for module, part in plans.items() if part.makes_experts):
        weights |= {weight: module for weight in quantised.weights if weight.startswith(f"{module}.")}
    modules = list(dict.fromkeys(weights.values()))
    return (Dequantised(source, quantised, weights, model.dtype) if weights else source), modules
