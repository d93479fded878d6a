"""Whether the options of a question may share its prompt, in one row that branches behind it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from moeopt.evaluation.batches import Batch, pack
from moeopt.evaluation.runners import LayerMajor, Whole
from moeopt.evaluation.scoring import score

if TYPE_CHECKING:
    from moeopt.tasks import Request

WORTH = 0.02
"""Masks that branch take a slower path through attention: not for less than this share of the tokens."""
ALIKE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far the log-likelihood of a token may be off beyond four times what padding changes; 5e-3 in half precision."""


def may_branch(runner: LayerMajor | Whole, model: nn.Module, requests: Sequence[Request]) -> bool:
    """Whether branching saves tokens, and a model gives the likelihoods of separate rows; checked on one question."""
    plain, shared = (pack(requests, 1, branching=branching) for branching in (False, True))
    if sum(b.tokens for b in shared) > (1 - WORTH) * sum(b.tokens for b in plain):
        return False
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    windows = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation not in ("sdpa", "eager") or any(windows) or kinds != {"full_attention"}:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    branching = [batch for batch in shared if batch.sees is not None]
    if not branching:
        return True
    shortest = min(branching, key=lambda batch: batch.ids.numel())
    members = [requests[i] for i in shortest.request.unique().tolist()]
    packed = (pack(members, n, branching=b) for n, b in ((1, False), (1 << 20, False), (1, True)))
    try:
        alone, padded, together = (_likelihoods(runner, batches, len(members)) for batches in packed)
    except (RuntimeError, ValueError, TypeError):  # of a model that takes no such mask
        runner.clear()
        return False
    tokens = torch.tensor([request.scored for request in members])
    noise, off = (((packing - alone).abs() / tokens).max() for packing in (padded, together))
    return bool(off <= 4 * noise + ALIKE.get(model.dtype, 5e-3))  # type: ignore[call-overload]


def _likelihoods(runner: LayerMajor | Whole, batches: list[Batch], requests: int) -> torch.Tensor:
    likelihoods = torch.zeros(requests)
    for batch, logits_of in runner.run(-1, batches).outputs:
        likelihoods.index_add_(0, batch.request, score(batch, logits_of)[0])
    runner.clear()
    return likelihoods
