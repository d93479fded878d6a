"""What tokens pick of a set of experts without one of them, or with one more: no set is ranked anew."""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.methods.kept_sets import KeptSet, masks
from moeopt.methods.layer_activations import TINY, LayerActivations


class Toggling:
    """A set of experts of which each of some is taken out, or each of some others put in, for every token of a batch.

    What a token picks then differs by one expert from what it picks of the set. Where the order of choice changes with
    the set (a softmax that is corrected, groups that are chosen first), it is taken to be that of the set.

    Args:
        acts: what the layer saw.
        base: the set.
        experts: those taken out, all of the set, or put in, none of it.
        active: how many of a set run.
        dtype: to compute in.

    Attributes:
        picks: experts of the set that run, largest first, and one more where one is taken out, int64 (tokens, m).
        scores: of the picks, over those of the set where it is a softmax, (tokens, m).
        toggled: likewise of those taken out or put in, (tokens, experts).
        stay: the picks beside which one that is put in would run.
        takes_out: whether experts are taken out.
        share: what scores are multiplied with so that they are over the toggled set, (tokens, experts).
    """

    def __init__(
        self, acts: LayerActivations, base: KeptSet, experts: Tensor, active: int, dtype: torch.dtype = torch.float32
    ) -> None:
        device = acts.logits.device
        experts, inside = experts.to(device), masks([base], acts.layer.n)[0].to(device)
        softmax, scores = acts.rule.score != "sigmoid", acts.probabilities.to(dtype)
        if softmax:
            scores = scores / (scores * inside).sum(-1, keepdim=True).clamp_min(TINY)
        choice = scores if acts.correction is None else scores + acts.correction
        ranked = choice.masked_fill(~inside, -torch.inf)
        self.takes_out, self._fills_up = int(experts[0]) in base, active > len(base)
        self.picks = ranked.topk(min(active + self.takes_out, len(base))).indices
        self.scores, self.toggled = scores.gather(1, self.picks), scores[:, experts]
        self.stay = self.picks if self._fills_up else self.picks[:, :-1]
        left = 1 - self.toggled if self.takes_out else 1 + self.toggled
        self.share = 1 / left.clamp_min(TINY) if softmax else torch.ones_like(left)
        if self.takes_out:  # one of the picks, or else the last of them, which is one too many
            places = torch.arange(self.picks.shape[1], device=device).expand_as(self.picks)
            place = torch.full(scores.shape, self.picks.shape[1] - 1, device=device)
            self._place = place.scatter(1, self.picks, places)[:, experts]
        else:
            self._enters = choice[:, experts] > ranked.gather(1, self.picks[:, -1:])

    def summed(self, every: Tensor, without: Tensor, added: Tensor) -> Tensor:
        """A sum over the picks as it is once an expert is toggled, (tokens, experts, ...).

        Args:
            every: over all picks, (tokens, 1, ...).
            without: over the picks but each one, (tokens, m, ...).
            added: what those put in bring to the sum over `stay`, (tokens, experts, ...).
        """
        if self.takes_out:
            place = self._place.view(*self._place.shape, *(1,) * (without.ndim - 2))
            return without.gather(1, place.expand(-1, -1, *without.shape[2:]))
        if self._fills_up:
            return every + added
        enters = self._enters.view(*self._enters.shape, *(1,) * (without.ndim - 2))
        return torch.where(enters, without[:, -1:] + added, every)
