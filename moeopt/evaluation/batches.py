"""Requests packed into padded batches, with every token run as few times as needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeopt.tasks import Request


@dataclass(frozen=True)
class Batch:
    """One forward pass, right-padded, and what is scored in it; all tensors are int64, on the CPU.

    `ids` and `mask` are (rows, width). Entry e of `row`, `position`, `target` and `request`, each (scored,), says that
    the logits at (row, position) predict the token `target` of that request.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    request: Tensor

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def pack(requests: Sequence[Request], batch_tokens: int) -> list[Batch]:
    """Batches of at most `batch_tokens` padded tokens (a longer sequence gets one of its own), longest first.

    The last token of a request is only ever a target, so requests that differ in nothing else, such as the one-token
    options of a question, share a row.

    Raises:
        ValueError: if `batch_tokens` is below 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        inputs.setdefault(request.ids[:-1], []).append(i)
    groups: list[list[tuple[int, ...]]] = []
    width = 0
    for ids in sorted(inputs, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * width > batch_tokens:
            groups.append([])
            width = len(ids)
        groups[-1].append(ids)
    return [_batch([(ids, inputs[ids]) for ids in group], requests) for group in groups]


def _batch(rows: list[tuple[tuple[int, ...], list[int]]], requests: Sequence[Request]) -> Batch:
    width = len(rows[0][0])
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    entries: list[tuple[int, int, int, int]] = []
    for r, (tokens, members) in enumerate(rows):
        ids[r, : len(tokens)] = torch.tensor(tokens)
        mask[r, : len(tokens)] = 1
        for i in members:
            request = requests[i]
            entries += [(r, t - 1, request.ids[t], i) for t in range(request.scored_from, len(request.ids))]
    return Batch(ids, mask, *torch.tensor(entries).unbind(1))
