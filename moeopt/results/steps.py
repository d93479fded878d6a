"""Steps of long work, told to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called before every step with the steps done, all of them, and what comes."""


class Steps:
    """Counts steps.

    Args:
        progress: told of each; None: nobody.
        total: how many there will be.
    """

    def __init__(self, progress: Progress | None, total: int = 0) -> None:
        self._progress, self._done, self.total = progress or (lambda done, total, what: None), 0, total

    def __call__(self, what: str) -> None:
        """Say what comes."""
        self._progress(min(self._done, self.total), self.total, what)
        self._done += 1

    def finish(self) -> None:
        """Say that every step is done."""
        self._progress(self.total, self.total, "done")
