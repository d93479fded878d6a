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
ALIKE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far the log-likelihood of a token may be off; 0.25 in half precision."""


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
    shortest = min((batch for batch in shared if batch.sees is not None), key=lambda batch: batch.ids.numel())
    members = [requests[i] for i in shortest.request.unique().tolist()]
    alone, together = (_likelihoods(runner, pack(members, 1, branching=b), len(members)) for b in (False, True))
    tokens = torch.tensor([len(request.ids) - request.scored_from for request in members])
    return bool(((alone - together).abs() / tokens).max() < ALIKE.get(model.dtype, 0.25))  # type: ignore[call-overload]


def _likelihoods(runner: LayerMajor | Whole, batches: list[Batch], requests: int) -> torch.Tensor:
    found = torch.zeros(requests)
    for batch, logits_of in runner.run(-1, batches).outputs:
        found.index_add_(0, batch.request, score(batch, logits_of)[0])
    runner.clear()
    return found
