"""Log-likelihoods of target tokens, from logits at the scored positions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeopt.evaluation.batches import Batch

ROWS = 256
"""Cells whose logits are in memory at a time."""


def score(batch: Batch, logits_of: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    """For every scored token, its natural-log likelihood (float32) and whether it is the model's first choice (bool).

    Both are (scored,), on the CPU.

    Args:
        batch: whose `cells` hold the scored tokens.
        logits_of: logits (cells, vocabulary) of a slice of `batch.cells`; any dtype and device. The log-softmax runs in
            float32.
    """
    likelihood = torch.empty(len(batch.cell))
    greedy = torch.empty(len(batch.cell), dtype=torch.bool)
    for start in range(0, len(batch.cells), ROWS):
        logits = logits_of(slice(start, start + ROWS))
        here = ((batch.cell >= start) & (batch.cell < start + ROWS)).nonzero()[:, 0]
        cell = (batch.cell[here] - start).to(logits.device)
        target = batch.target[here].to(logits.device)
        top, first = logits.max(1)
        top = top.float()
        total = (logits.float() - top[:, None]).exp_().sum(1).log() + top
        likelihood[here] = (logits[cell, target].float() - total[cell]).cpu()
        greedy[here] = (first[cell] == target).cpu()
    return likelihood, greedy
