"""A model held against itself without a plan, for when there are no answers.

At a position, p is what the full model says of the next token and q what the model under a plan does, both over the
whole vocabulary. With q = p both losses are 0.

- `kl`: KL(p || q) = sum_v p_v log(p_v / q_v), in nats.
- `acceptance`: sum_v max(p_v - q_v, 0) = 1 - sum_v min(p_v, q_v), their total variation distance: 1 minus the rate at
  which speculative decoding accepts a token that is drawn from q (Leviathan et al. 2023, arXiv 2211.17192, Theorem 3.5
  and Corollary 3.6).

Of p only the likeliest tokens S are kept, the fewest whose probability reaches `top_p`, with the mass of all others as
one more outcome, o; p and q are compared on S and o. Both losses are f-divergences, so that merging outcomes can only
lessen them: what is found is a lower bound of the loss, and 1 minus it an upper bound of acceptance, by the
data-processing inequality. For total variation the bound is off by at most p_o <= 1 - top_p, for KL by p_o KL(p(. | o)
|| q(. | o)). With `top_p=1` nothing is merged and both are exact.

KL is summed as q_v - p_v - p_v log(q_v / p_v) over S and o, which is the same as p and q sum to 1. No term is negative,
and every one is 0 where p = q, so that rounding makes neither loss less than 0, nor anything of equal logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.errors import ModelError
from moeopt.evaluation.positions import Positions
from moeopt.evaluation.scoring import blocks
from moeopt.tasks import Request, Scores

if TYPE_CHECKING:
    from moeopt.evaluation.batches import Batch

LABEL_FREE = ("kl", "acceptance")
"""Scores that need no answers."""

MEMORY = 1 << 30
FEW = 64
"""Tokens that are looked for first; four times as many where they do not reach `top_p`."""
TOKEN_BYTES, POSITION_BYTES = 8, 16


@dataclass(frozen=True)
class Compression:
    """How much is kept of what the full model says.

    On a model of 0.7 billion parameters and 49,152 tokens, Python code, a plan of KL 0.0155: top_p 0.9999 keeps 110 kB
    a position and finds the KL 0.02% too small, 0.999 44 kB and 0.2%, 0.99 11 kB and 2%, 0.9 1.2 kB and 15%. Models
    with less in the tail keep less.

    Args:
        top_p: the probability that the kept tokens of a position must reach; 1 keeps all of them.
        memory: bytes for what is kept of all positions. Where it is short, the kept tokens of a position are at most
            its even share of it, and a warning says what probability they reach.
        device: where it is kept, and losses are summed.

    Raises:
        ValueError: naming an argument that is out of range.
    """

    top_p: float = 0.999
    memory: int = MEMORY
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.memory < 1:
            raise ValueError(f"the memory of a compression must be at least 1 byte, got {self.memory!r}")


class Teacher:
    """What the full model says at every scored position of a task, and how far another model is from it.

    A position is a place in an example behind which a token is scored. Options that share what stands before it share
    the position, which counts once. Nothing is asked of which option is right.

    Args:
        rungs: the requests of each rung, those of an example together.
        vocabulary: tokens that the model knows.
        compression: what is kept.
        score: which of the two distances is the loss.

    Attributes:
        positions: how many there are, in all rungs.
        most: tokens kept of a position at most.
        layer_tokens, seconds: what running the full model has cost.

    Raises:
        ValueError: if not even one token a position fits into the memory, or not all of them and `top_p` is 1.
    """

    columns = 3

    def __init__(
        self, rungs: Sequence[Sequence[Request]], vocabulary: int, compression: Compression, score: str
    ) -> None:
        self.compression, self.score = compression, score
        self._rungs = [Positions.of(requests) for requests in rungs]
        self._counts = np.concatenate([rung.counts for rung in self._rungs])
        self.positions = int(self._counts.sum())
        share = (compression.memory // self.positions - POSITION_BYTES) // TOKEN_BYTES
        self.most = min(vocabulary, share)
        least = vocabulary if compression.top_p == 1 else 1
        if self.most < least:
            needed = self.positions * (POSITION_BYTES + TOKEN_BYTES * least)
            raise ValueError(
                f"top_p={compression.top_p:g} needs {needed} bytes for {self.positions} positions, and the memory of "
                f"the compression is {compression.memory}: give more, a smaller top_p or a limit"
            )
        self.layer_tokens, self.seconds, self._vocabulary = 0, 0.0, vocabulary
        self._by_rung: dict[int, _Distributions] = {}
        self._state: object = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self._by_rung.values())

    @property
    def tokens_kept(self) -> float:
        """Tokens kept of a position, the mean over the rungs that were run; NaN before."""
        return _ratio(sum(len(part.tokens) for part in self._by_rung.values()), self._positions_run)

    @property
    def rest(self) -> float:
        """Probability of the tokens of a position that are not kept, the mean over the rungs that were run."""
        return _ratio(
            sum(float(part.rest.double().exp().sum()) for part in self._by_rung.values()), self._positions_run
        )

    def __str__(self) -> str:
        return (
            f"{self._positions_run:,} positions in {self.seconds:.1f} s, {self.tokens_kept:.0f} tokens of each kept in "
            f"{self.nbytes / 2**20:.1f} MiB, {self.rest:.2g} of the probability left out"
        )

    @property
    def _positions_run(self) -> int:
        return sum(len(part.start) for part in self._by_rung.values())

    def knows(self, rung: int, state: object) -> bool:
        """Whether the rung was learnt from the model in this state; what is of another one is forgotten."""
        if state != self._state:
            self.forget()
            self._state = state
        return rung in self._by_rung

    def forget(self) -> None:
        """Free everything that is known."""
        self._by_rung.clear()

    def learn(self, rung: int, outputs: Iterable[tuple[Batch, Callable[[slice], Tensor]]]) -> None:
        """Take what the full model gives for the batches of a rung.

        Raises:
            ModelError: if a logit is NaN or +infinite.
        """
        parts: list[tuple[Tensor, ...]] = []
        for batch, logits_of in outputs:
            position, owned = self._rungs[rung].of_entries(batch)
            for logits, row, entry in blocks(batch, logits_of):
                mine = owned[entry]
                if mine.any():
                    parts.append((position[entry[mine]], *self._noted(logits, row[mine])))
        order, length, tokens, log_p, rest = (torch.cat(column) for column in zip(*parts))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        start = length.cumsum(0) - length
        device = self.compression.device
        columns = start[place], length[place].int(), rest[place], tokens.int(), log_p
        self._by_rung[rung] = _Distributions(*(column.to(device) for column in columns))
        if 1 - self.compression.top_p < self.rest and self.most < self._vocabulary:
            warnings.warn(
                f"the {self.most} likeliest tokens of a position that fit into {self.compression.memory} bytes have "
                f"{1 - self.rest:.4f} of the probability on average, less than top_p={self.compression.top_p:g}",
                stacklevel=2,
            )

    def read(
        self, rung: int, batch: Batch, logits_of: Callable[[slice], Tensor]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What a batch under a plan gives at its positions, each once.

        Returns:
            The request that each position is counted for, (positions,); KL, total variation distance, and whether the
            full model's first choice is among those of this one, (3, positions).
        """
        full = self._by_rung[rung]
        position, owned = self._rungs[rung].of_entries(batch)
        requests, values = [batch.request[:0]], [torch.empty(3, 0, dtype=torch.float64)]
        for logits, row, entry in blocks(batch, logits_of):
            mine = owned[entry]
            if mine.any():
                entry, row = entry[mine], row[mine]
                requests.append(batch.request[entry])
                values.append(full.compare(logits, row, position[entry]).cpu())
        return torch.cat(requests).numpy(), torch.cat(values, 1).numpy()

    def reduce(self, requests: Sequence[Request], sums: NDArray[np.float64]) -> tuple[Scores, dict[str, float]]:
        """Scores of examples, and the means over their positions by name, from sums over the positions of requests.

        Args:
            requests: the first so many of all rungs.
            sums: (3, requests), of what `read` gives.
        """
        counts = self._counts[: len(requests)]
        _, example = np.unique([request.example for request in requests], return_inverse=True)
        kl, distance, agreement = (np.bincount(example, weights=row) for row in sums)
        weights = np.bincount(example, weights=counts)
        losses = (kl if self.score == "kl" else distance) / weights
        means = [float(total.sum() / weights.sum()) for total in (kl, distance, agreement)]
        metrics = {"kl": means[0], "acceptance": 1 - means[1], "agreement": means[2]}
        columns = [column.astype(np.float32) for column in (losses, weights, agreement / weights)]
        return Scores(columns[0], columns[1], columns[2]), metrics

    def itself(self, requests: Sequence[Request]) -> tuple[Scores, dict[str, float]]:
        """What `reduce` gives for the full model: it is at no distance from itself, and makes the same choices."""
        none = np.zeros(len(requests))
        return self.reduce(requests, np.stack([none, none, self._counts[: len(requests)]]))

    def _noted(self, logits: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Of some rows of logits: tokens kept, (rows,), those of all rows, their log-probabilities, the rests'."""
        logits = logits[row.to(logits.device)].float()
        index, length = self._likeliest(logits)
        first = logits.argmax(1, keepdim=True)  # of equally likely ones the lowest, however they were sorted
        index = torch.cat([first, torch.where(index == first, index[:, :1], index)[:, 1:]], 1)
        within = torch.arange(index.shape[1], device=index.device) < length[:, None]
        index = torch.where(within, index, first)
        log_p, rest, _ = _log_probabilities(logits, index)
        if rest.isnan().any():
            raise ModelError("the full model gives logits that are not finite: no plan can be held against it")
        return tuple(t.cpu() for t in (length, index[within], log_p[within], rest))

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens by falling probability, (rows, most of any row), and how many of them each row needs, (rows,)."""
        if self.compression.top_p == 1:
            index = logits.argsort(1, descending=True)
            return index, torch.full((len(index),), index.shape[1], device=index.device)
        most = min(self.most, logits.shape[1])
        total, few = logits.logsumexp(1, keepdim=True), min(FEW, most)
        while True:
            values, index = logits.topk(few)
            short = (values - total).double().exp().cumsum(1) < self.compression.top_p
            if few == most or not short[:, -1].any():
                break
            few = min(4 * few, most)
        length = (short.sum(1) + 1).clamp(max=few)
        return index[:, : int(length.max())], length


@dataclass(frozen=True, eq=False)
class _Distributions:
    """What is kept of the positions of a rung.

    Args:
        start, length, rest: by position, where its tokens begin in the next two, how many there are (int64, int32),
            and the log-probability of all others (float32); each (positions,).
        tokens: by falling probability, int32 (tokens of all positions,).
        log_p: their log-probabilities, float32 (tokens of all positions,).
    """

    start: Tensor
    length: Tensor
    rest: Tensor
    tokens: Tensor
    log_p: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.start, self.length, self.rest, self.tokens, self.log_p))

    def compare(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """What `Teacher.read` gives, (3, rows), for some rows of logits at these positions."""
        position = position.to(self.start.device)
        length = self.length[position, None]
        step = torch.arange(int(length.max()), device=length.device)
        within = step < length
        at = self.start[position, None] + step.minimum(length - 1)
        index = self.tokens[at].long().to(logits.device)
        log_q, rest, first = _log_probabilities(logits[row.to(logits.device)].float(), index)
        log_p = torch.cat([self.log_p[at], self.rest[position, None]], 1).double()
        log_q = torch.cat([log_q, rest[:, None]], 1).to(log_p)
        log_q[:, :-1] = torch.where(within, log_q[:, :-1], log_p[:, :-1])
        p, q = log_p.exp(), log_q.exp()
        kl = (q - p - torch.where(p > 0, p * (log_q - log_p), 0.0)).sum(1)
        distance = (p - q).clamp_min(0).sum(1)
        return torch.stack([kl, distance, first.to(kl)])


def _log_probabilities(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens `index`, (rows, kept), of all others together, and whether none is likelier than
    the first of `index`, both (rows,). The logits, float32 (rows, vocabulary), are overwritten."""
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, index)
    mass = logits.exp_()
    total = mass.sum(1, keepdim=True).log()
    rest = mass.scatter_(1, index, 0.0).sum(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    return chosen - total, (rest.log() - total).squeeze(1), chosen[:, 0] == 0


def _ratio(total: float, count: int) -> float:
    return total / count if count else float("nan")
