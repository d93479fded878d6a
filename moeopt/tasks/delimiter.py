"""What stands between the prompt and the options, or answers, of rows of one's own.

White space that a row has there is all there is: "Answer: " and "yes", "Answer:" and " yes" stay as they are. Where it
has none, the delimiter that was asked for is put; by default a space, and only where prose has one: behind a word, a
number or a mark that ends something, and not before such a mark. So "Ice is" and "cold" are "Ice is cold", while "2+2="
and "4", "f(" and "x" stay together, as do scripts without spaces between words.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from moeopt.errors import TaskError

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Chinese and Japanese, and the wide forms of marks and letters."""
_END = r".,:;?!%…)\]}»”’"
_BEHIND = re.compile(rf"([^\W_{_UNSPACED}]|[{_END}]|(?<=\S)[\"']|(?<=[.:?!])\*\*)\Z")
_BEFORE = re.compile(rf"[^{_END}{_UNSPACED}]")


class Delimiter:
    """Joins rows, and counts those that got a space by default.

    Args:
        text: what is put between; None for a space where prose has one.

    Raises:
        TaskError: if it is no text.
    """

    def __init__(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise TaskError(f"delimiter must be a text, got {text!r}")
        self.text = text
        self.rows, self.spaced, self.example = 0, 0, ""

    def join(self, prompt: str, options: Sequence[str]) -> tuple[str, ...]:
        """A row's options as texts that continue its prompt verbatim."""
        bare = [] if prompt[-1:].isspace() else [option for option in options if not option[0].isspace()]
        prose = _BEHIND.search(prompt) and any(map(_BEFORE.match, bare))
        between = self.text if self.text is not None else " " if prose else ""
        self.rows += 1
        if self.text is None and prose:
            self.spaced += 1
            self.example = self.example or f"{prompt[-20:]} {bare[0][:20]}"
        return tuple(between + option if option in bare else option for option in options)

    def say(self, task: str) -> None:
        """Warn, once for all rows, if some got a space that is not in them."""
        if self.spaced:
            warnings.warn(
                f"task {task!r}: {self.spaced} of {self.rows} rows have no white space between prompt and answer, and"
                f" got a space, as in {self.example!r}; delimiter='' leaves rows as they are",
                stacklevel=3,
            )
