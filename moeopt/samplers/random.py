"""Random search: every proposal is a fresh draw from the space."""

from __future__ import annotations

from moeopt.samplers.base import GenomeSampler, Proposal
from moeopt.samplers.history import Observation


class RandomSampler(GenomeSampler):
    """Independent draws of `Space.sample`: uniform prunings, or Gaussian steps around a `MergeSpace`'s plan."""

    name = "random"
    operators = ("random",)
    several = True

    def propose(self, history: list[Observation], slot: int, attempt: int) -> Proposal:
        return Proposal(self.space.sample(self.rng(slot, attempt)), "random")
