"""Log-likelihoods of target tokens, without a float32 copy of all logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeopt.evaluation.batches import Batch

_CHUNK = 1 << 24


def score(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """For every scored token, its natural-log likelihood (float32) and whether it is the model's first choice (bool).

    Both are (scored,), on the CPU.

    Args:
        logits: (rows, kept, vocabulary), of the last `kept` positions of the batch; any dtype and device. The
            log-softmax runs in float32 on chunks of at most 2**24 logits.
    """
    vocabulary = logits.shape[-1]
    rows = batch.row.to(logits.device)
    positions = (batch.position - (batch.ids.shape[1] - logits.shape[1])).to(logits.device)
    targets = batch.target.to(logits.device)
    step = max(1, _CHUNK // vocabulary)
    likelihoods, greedy = [], []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        chunk = logits[rows[part], positions[part]].float()
        target = targets[part, None]
        likelihoods.append(chunk.gather(1, target)[:, 0] - chunk.logsumexp(1))
        greedy.append(chunk.argmax(1) == target[:, 0])
    return torch.cat(likelihoods).cpu(), torch.cat(greedy).cpu()
