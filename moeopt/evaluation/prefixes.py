"""Hidden states kept from one plan to the next, so that a plan starts where it parts from an earlier one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Key = tuple[int, int, bytes]
"""Rung, decoder layer, and digest of the plan's layers before it."""


@dataclass
class _Entry:
    states: list[Tensor]
    active: tuple[float, ...] = ()
    trails: set[bytes] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.states)


class PrefixCache:
    """Hidden states entering layers, of the best plan and of those last used, within a memory budget.

    A trail is what is kept of one plan; what two plans share is held once. When the budget is exceeded the trail that
    was longest unused goes, the best plan's last.

    Args:
        budget: bytes.
        device: where states are kept; None: where they were computed.
    """

    def __init__(self, budget: int, device: str | None = None) -> None:
        self.budget, self.device = budget, device
        self.nbytes = 0
        self._entries: dict[Key, _Entry] = {}
        self._trails: OrderedDict[bytes, set[Key]] = OrderedDict()
        self._best: tuple[float, bytes] | None = None

    def longest(self, keys: Iterable[Key]) -> tuple[int, Sequence[Tensor], tuple[float, ...]] | None:
        """Decoder layer, states, one tensor a batch, and what was noted of the layers before it, of the first of `keys`
        that is kept; None when none is."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                for trail in [trail for trail in self._trails if trail in entry.trails]:
                    self._trails.move_to_end(trail)
                return key[1], entry.states, entry.active
        return None

    def keep(self, trail: bytes, key: Key, states: Sequence[Tensor], active: tuple[float, ...] = ()) -> None:
        """Keep states under `key` for the plan named `trail`, with the experts a token ran in each MoE layer before."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self.placed(states), active)
            self.nbytes += entry.nbytes
        entry.trails.add(trail)
        self._trails.setdefault(trail, set()).add(key)
        self._trails.move_to_end(trail)
        self._shrink()

    def placed(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states where this cache keeps them."""
        return list(states) if self.device is None else [t.to(self.device) for t in states]

    def share(self, trail: bytes, keys: Iterable[Key]) -> None:
        """Let the plan named `trail` hold what is kept under these keys, too."""
        for key in keys:
            if key in self._entries:
                self._entries[key].trails.add(trail)
                self._trails.setdefault(trail, set()).add(key)

    def judge(self, trail: bytes, loss: float) -> None:
        """Say how good a plan turned out; the best one's states are the last to go."""
        if self._best is None or loss < self._best[0]:
            self._best = loss, trail

    def clear(self) -> None:
        """Free everything; which plan is best is forgotten, too."""
        self._entries.clear()
        self._trails.clear()
        self.nbytes, self._best = 0, None

    def _shrink(self) -> None:
        while self.nbytes > self.budget and self._trails:
            best = None if self._best is None else self._best[1]
            oldest = next((trail for trail in self._trails if trail != best), best)
            assert oldest is not None
            for key in self._trails.pop(oldest):
                entry = self._entries[key]
                entry.trails.discard(oldest)
                if not entry.trails:
                    self.nbytes -= entry.nbytes
                    del self._entries[key]
