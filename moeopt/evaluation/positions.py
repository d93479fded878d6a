"""Where tokens are scored, each place once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from moeopt.evaluation.batches import Batch
    from moeopt.tasks import Request


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of requests: what stands before a scored token, in an example.

    Options that share what stands before a token share its position, which is counted for the first of them. However
    the requests are packed into batches, a position keeps its number.

    Args:
        first: by request, what to add to a place in it for the number of an entry of the next two, (requests,).
        number: the position, (scored tokens of all requests,).
        owned: whether it is counted there, (scored tokens of all requests,).
        counts: positions counted for each request, (requests,).
    """

    first: Tensor
    number: Tensor
    owned: Tensor
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Positions:
        first: list[int] = []
        number: list[int] = []
        owned: list[bool] = []
        counts: list[int] = []
        total = 0
        for _, group in groupby(requests, lambda request: request.example):
            contexts: dict[tuple[int, int], int] = {}  # context and next token -> the longer context
            positions: dict[int, int] = {}
            for request in group:
                first.append(len(number) - request.scored_from)
                before, context = len(positions), 0
                for place, token in enumerate(request.ids[:-1], 1):
                    context = contexts.setdefault((context, token), len(contexts) + 1)
                    if place >= request.scored_from:
                        owned.append(context not in positions)
                        number.append(total + positions.setdefault(context, len(positions)))
                counts.append(len(positions) - before)
            total += len(positions)
        return cls(torch.tensor(first), torch.tensor(number), torch.tensor(owned), np.asarray(counts))

    def of_entries(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The position of each entry of a batch, and whether it is counted there; both (scored,)."""
        entry = self.first[batch.request] + batch.place
        return self.number[entry], self.owned[entry]
