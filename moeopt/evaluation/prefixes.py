"""Hidden states kept from one plan to the next, so that a plan starts where it parts from an earlier one."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeopt.models.devices import is_cuda

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
        self._streams: dict[torch.device, Any] = {}
        self._pins = True

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
        """The states where this cache keeps them.

        From a GPU to memory they are copied on a stream of their own, while the GPU goes on: they may be read by
        `arriving` alone, and must not be written. A layer that writes into what enters it is none of `layerwise`'s.
        """
        if self.device is None:
            return list(states)
        to_memory = torch.device(self.device).type == "cpu"
        return [self._copied_out(t) if to_memory and is_cuda(t.device) else t.to(self.device) for t in states]

    def arriving(self, states: Sequence[Tensor], device: torch.device | None) -> Iterator[Tensor]:
        """The states in turn, for a layer on `device`; to a GPU the next one is copied while this one is used."""
        if device is None or not is_cuda(device):
            for stream in self._streams.values():
                stream.synchronize()  # what is still on its way to memory
            yield from states
            return
        here = torch.cuda.current_stream(device)
        side = self._stream(device)

        def begun(state: Tensor) -> tuple[Tensor, Any]:
            if state.device.type != "cpu":
                return state, None
            with torch.cuda.stream(side):  # behind the copy out, which is on this stream, too
                copied = state.to(device, non_blocking=True)
                return copied, side.record_event()

        coming = begun(states[0])
        for place in range(len(states)):
            state, arrived = coming
            if place + 1 < len(states):
                coming = begun(states[place + 1])
            if arrived is not None:
                here.wait_event(arrived)
                state.record_stream(here)  # else its memory could be used again while the layer reads it
            yield state

    def _copied_out(self, state: Tensor) -> Tensor:
        try:
            target = pinned_like(state) if self._pins else None
        except RuntimeError as error:
            self._pins, target = False, None
            warnings.warn(f"hidden states are kept in memory that is not pinned: {error}", stacklevel=2)
        if target is None:
            return state.to("cpu")
        side = self._stream(state.device)
        side.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(side):
            target.copy_(state, non_blocking=True)
        state.record_stream(side)
        return target

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

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


def pinned_like(state: Tensor) -> Tensor:
    """Memory of the host that a GPU copies to and from by itself, for a tensor like this."""
    return torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
