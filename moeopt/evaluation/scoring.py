"""What logits say of tokens, from the scored positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeopt.evaluation.batches import Batch

ROWS = 256
"""Cells whose logits are in memory at a time."""
NEAR = 1 << 19
"""Float32 numbers that a CPU works on at a time, so that they stay in its cache: six times faster than all at once."""


def blocks(batch: Batch, logits_of: Callable[[slice], Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The logits of a batch's cells, a few at a time, with what is scored there.

    Yields logits (rows, vocabulary), of whatever dtype and device, and for each entry of the batch that they predict
    its row among them and its number, both int64 (entries,), on the CPU.

    Args:
        batch: whose `cells` hold the scored tokens.
        logits_of: logits (cells, vocabulary) of a slice of `batch.cells`; any dtype and device.
    """
    order = batch.cell.argsort(stable=True)
    cells = batch.cell[order]
    for start in range(0, len(batch.cells), ROWS):
        logits = logits_of(slice(start, start + ROWS))
        step = max(1, NEAR // logits.shape[1]) if logits.device.type == "cpu" else ROWS
        for first in range(start, start + len(logits), step):
            block = logits[first - start : first - start + step]
            a, b = torch.searchsorted(cells, torch.tensor([first, first + len(block)])).tolist()
            yield block, cells[a:b] - first, order[a:b]


def score(batch: Batch, logits_of: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    """For every scored token, its natural-log likelihood (float32) and whether no token is likelier (bool).

    Both are (scored,), on the CPU; the arguments are those of `blocks`. The log-softmax runs in float32.
    """
    likelihood = torch.empty(len(batch.cell))
    greedy = torch.empty(len(batch.cell), dtype=torch.bool)
    for block, row, entry in blocks(batch, logits_of):
        row, target = (t.to(block.device) for t in (row, batch.target[entry]))
        likelihood[entry] = block.log_softmax(1, dtype=torch.float32)[row, target].cpu()
        greedy[entry] = (block[row, target] == block.amax(1)[row]).cpu()
    return likelihood, greedy
