"""Standard output and error as consoles on which text is text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from moeopt.showing import visible

PIPE_WIDTH = 120


class Terminal(Console):
    """A console on which text is text: no markup, no emoji codes, and whatever controls a terminal is escaped."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, **options)

    def say(self, *lines: str, style: str | None = None) -> None:
        """Lines of text, each on one line however long it is."""
        self.print(*lines, sep="\n", style=style, soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def consoles() -> tuple[Terminal, Terminal]:
    """Standard output, and standard error for progress and errors; wide enough for a table when they are pipes."""
    out, err = Terminal(), Terminal(stderr=True)
    for console in (out, err):
        if not console.is_terminal:
            console.width = max(console.width, PIPE_WIDTH)
    return out, err
