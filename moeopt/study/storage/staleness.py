"""Whose heartbeat stands still, by the clock of whoever looks: the clocks of two machines may differ by hours."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeopt.study.storage.resilient import ResilientStorage

logger = logging.getLogger("moeopt.study.storage")

clock = time.monotonic
"""Seconds; no correction of the time moves it."""


class Watch:
    """For how long the heartbeats of running trials were seen not to change.

    Args:
        gap: seconds between two looks that count at most: this process may have been frozen, and the others with it.
    """

    def __init__(self, gap: float) -> None:
        self._gap = gap
        self._looked: float | None = None
        self._beats: dict[int, tuple[datetime, float]] = {}
        self._lock = threading.Lock()

    def look(self, beats: Mapping[int, datetime]) -> None:
        """Note the heartbeats of all running trials, as the database has them now."""
        with self._lock:
            now = clock()
            passed = 0.0 if self._looked is None else min(now - self._looked, self._gap)
            self._looked = now
            before, self._beats = self._beats, {}
            for trial, beat in beats.items():
                last, silent = before.get(trial, (None, 0.0))
                self._beats[trial] = beat, silent + passed if beat == last else 0.0

    def silent(self, seconds: float) -> dict[int, datetime]:
        """The last heartbeat of each trial that was seen without another one for longer than this."""
        with self._lock:
            return {trial: beat for trial, (beat, silent) in self._beats.items() if silent > seconds}


def beat(reference: weakref.ref[ResilientStorage], interval: float) -> None:
    """Beat for all trials that a storage's process runs, and look at others' beats, as long as there is the storage."""
    delay = interval
    while True:
        time.sleep(delay)
        storage = reference()
        if storage is None:
            return
        delay = interval
        try:
            storage.beat()
        except Exception as error:  # an outage: the calls that wait for it tell of it
            logger.debug("no heartbeat: %s", error)
            storage.waiting.note(error)
            delay = min(interval, 1.0)
        del storage
