"""Requests packed into padded batches, with every token run as few times as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeopt.tasks import Request

Tokens = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One forward pass, right-padded, and what is scored in it; all tensors are on the CPU.

    `ids` and `mask`, int64, are (rows, width). Where rows branch (the options of a question behind its prompt),
    `position`, int64, (rows, width), and `sees`, bool, (rows, width, width), say where each token stands and which
    tokens it attends to; elsewhere they are None: rows are plain causal.

    Entry e of `cell`, `target`, `request` and `place`, int64, each (scored,), says that the logits at the `cell`-th of
    `cells`, (cells,), flat positions in (rows, width), predict the token `target`, which is `ids[place]` of that
    request.
    """

    ids: Tensor
    mask: Tensor
    position: Tensor | None
    sees: Tensor | None
    cells: Tensor
    cell: Tensor
    target: Tensor
    request: Tensor
    place: Tensor

    @cached_property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a model's forward; `dtype` is that of its hidden states."""
        if self.sees is None or self.position is None:
            return {"input_ids": self.ids.to(device), "attention_mask": self.mask.to(device)}
        unseen = torch.zeros(self.sees.shape, dtype=dtype).masked_fill(~self.sees, torch.finfo(dtype).min)
        return {
            "input_ids": self.ids.to(device),
            "position_ids": self.position.to(device),
            "attention_mask": unseen[:, None].to(device),
        }


@dataclass
class _Row:
    """A prompt and the branches behind it; the requests that end in each (-1: right behind the prompt)."""

    prompt: Tokens
    branches: list[Tokens]
    members: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))


def pack(requests: Sequence[Request], batch_tokens: int, *, branching: bool = True) -> list[Batch]:
    """Batches of at most `batch_tokens` padded tokens (a longer sequence gets one of its own), longest first.

    The last token of a request is only ever a target, so requests that differ in nothing else, such as the one-token
    options of a question, share a row.

    Args:
        requests: what to score; `Batch.request` numbers them.
        batch_tokens: padded tokens a batch.
        branching: whether the longer options of a question share its prompt, in one row that branches.

    Raises:
        ValueError: if `batch_tokens` is below 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    groups = grouped(_rows(requests, branching), lambda row: row.length, batch_tokens)
    return [_batch(group, requests) for group in groups]


def grouped(rows: Iterable[T], length: Callable[[T], int], batch_tokens: int) -> list[list[T]]:
    """Rows of like length together, longest first, at most `batch_tokens` padded tokens or one row a group."""
    groups: list[list[T]] = []
    width = 0
    for row in sorted(rows, key=length, reverse=True):
        if not groups or (len(groups[-1]) + 1) * width > batch_tokens:
            groups.append([])
            width = length(row)
        groups[-1].append(row)
    return groups


def _rows(requests: Sequence[Request], branching: bool) -> list[_Row]:
    rows: dict[object, _Row] = {}
    for i, request in enumerate(requests):
        split = request.scored_from if branching else len(request.ids) - 1
        prompt, branch = request.ids[:split], request.ids[split:-1]
        key = (request.example, prompt) if branching else prompt
        row = rows.setdefault(key, _Row(prompt, [], []))
        if branch and branch not in row.branches:
            row.branches.append(branch)
        row.members.append((i, row.branches.index(branch) if branch else -1))
    return list(rows.values())


def _batch(rows: Sequence[_Row], requests: Sequence[Request]) -> Batch:
    width = rows[0].length
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    branching = any(len(row.branches) > 1 for row in rows)
    position = torch.zeros_like(ids) if branching else None
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1) if branching else None
    entries: list[tuple[int, int, int, int]] = []
    for r, row in enumerate(rows):
        ids[r, : row.length] = torch.tensor([*row.prompt, *(t for branch in row.branches for t in branch)])
        mask[r, : row.length] = 1
        n = len(row.prompt)
        starts, start = [], n
        for branch in row.branches:
            starts.append(start)
            start += len(branch)
        if position is not None and sees is not None:
            position[r, :n] = torch.arange(n)
            sees[r, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
            for start, branch in zip(starts, row.branches):
                end, m = start + len(branch), len(branch)
                position[r, start:end] = torch.arange(n, n + m)
                sees[r, start:end, :n] = True
                sees[r, start:end, start:end] = torch.ones(m, m, dtype=torch.bool).tril()
        for i, branch_index in row.members:
            request = requests[i]
            for t in range(request.scored_from, len(request.ids)):
                # A branch's first token is predicted at the prompt's end, the others within the branch.
                before = t - 1 if t <= n else starts[branch_index] + t - 1 - n
                entries.append((r * width + before, request.ids[t], i, t))
    flat, target, request_of, place = torch.tensor(entries).unbind(1)
    cells, cell = flat.unique(return_inverse=True)
    return Batch(ids, mask, position, sees, cells, cell, target, request_of, place)
