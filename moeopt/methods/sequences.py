"""Token sequences in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moeopt.evaluation.batches import grouped


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded sequences: ids and mask int64 (rows, width), numbers of the sequences int64 (rows,)."""

    ids: Tensor
    mask: Tensor
    numbers: Tensor

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        return {"input_ids": self.ids.to(device), "attention_mask": self.mask.to(device)}

    @cached_property
    def sequence(self) -> Tensor:
        """The sequence of every token that is not padding, (tokens,)."""
        return self.numbers[:, None].expand_as(self.mask)[self.mask.bool()]


def packed(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[Batch]:
    """Sequences of like lengths together, longest first."""
    batches = []
    for group in grouped(range(len(sequences)), lambda number: len(sequences[number]), batch_tokens):
        ids = torch.zeros(len(group), len(sequences[group[0]]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(group):
            ids[row, : len(sequences[number])] = torch.tensor(sequences[number])
            mask[row, : len(sequences[number])] = 1
        batches.append(Batch(ids, mask, torch.tensor(group)))
    return batches
