"""Random search: every proposal is a fresh draw from the space."""

from __future__ import annotations

from typing import Any

from moeopt.samplers.base import GenomeSampler, Observation, Proposal


class RandomSampler(GenomeSampler):
    """Independent draws of `Space.sample`: uniform prunings, or Gaussian steps around a `MergeSpace`'s plan."""

    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        return Proposal(self.space.sample(self.rng(slot, attempt)), "random")

    def settings(self) -> dict[str, Any]:
        return self.named_settings("random")
