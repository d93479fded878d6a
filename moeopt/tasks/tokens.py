"""Text to token ids: what a model reads of a prompt, and of a text that continues it.

Prompt and continuation are encoded as one text, so that the ids decode to that text and to nothing else, whatever the
tokenizer: one that puts a space before any text it encodes on its own would put one between them. What is scored is, as
in lm-evaluation-harness, whatever stands behind the tokens of the prompt without the white space at its end: that
belongs to the continuation's first token ("Answer: " and "yes" are "Answer:" and " yes"). Where these are not the first
tokens of the whole, because a token spans the border, it is every token that has a character of the continuation: of
"hello wor" and "ld" the token " world".

What the tokenizer puts before every text, such as <s>, stands there once, also if the text begins with it. What it
would put behind one, such as </s>, stands nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeopt.errors import TaskError

_PROBE = "a1"


class Encoder:
    """The token ids of texts, by one tokenizer of transformers; see the top of this file.

    Attributes:
        start: what the tokenizer puts before every text, such as the id of <s>; often nothing.
        end: what it would put behind every text, such as the id of </s>; mostly nothing.

    Raises:
        TaskError: if the tokenizer's special tokens change the other tokens of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare, full = self._ids(_PROBE), self._ids(_PROBE, special=True)
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
        if at is None:
            raise TaskError(f"the tokenizer encodes {_PROBE!r} as {bare}, and with special tokens as {full}")
        if not bare:  # of a vocabulary without these characters
            at = len(full) - (full[-1:] == [tokenizer.eos_token_id])
        self.start, self.end = full[:at], full[at + len(bare) :]

    def __call__(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, behind `start` if `special`."""
        return [*self.start, *self.body(text)] if special else self._ids(text)

    def body(self, text: str) -> list[int]:
        """The ids of a text without `start`, which a text may bring itself."""
        ids = self._ids(text)
        return ids[_shared(ids, self.start) :]

    def continued(
        self, prompt: str, continuations: Sequence[str], special: bool = True
    ) -> tuple[list[int], list[tuple[list[int], int]]]:
        """The ids of a prompt, and those of it with each text that continues it, with where the scored ones begin.

        Where one token is the whole prompt and more, and `start` is empty, nothing would stand before what is scored:
        then the continuation has tokens of its own behind those of the prompt. Behind an empty prompt the tokenizer's
        begin- or end-of-sequence token stands, as in lm-evaluation-harness; if there is neither, scored is from 0.

        Args:
            prompt: any text.
            continuations: texts that follow it.
            special: whether `start` stands before the prompt, and white space at its end may be scored; a chat
                template writes both itself.
        """
        whole = self(prompt, special)
        stripped = (
            prompt.rstrip() if special else prompt
        )  # white space alone stays, where nothing else would stand there
        bare = whole if stripped == prompt or not (stripped or self.start) else self(stripped)
        encoded = []
        for text in continuations:
            ids = self(prompt + text, special)
            first = len(bare) if ids[: len(bare)] == bare else self._border(whole, ids)
            encoded.append((ids, first) if first else self._apart(whole, text, ids))
        return whole, encoded

    def _apart(self, prompt: list[int], text: str, ids: list[int]) -> tuple[list[int], int]:
        """As `continued`, where no id stands before the first that is scored."""
        for lead in ("", "\n"):  # on its own, or where that would put a space before it, as the start of a line
            apart = [*prompt, *self._ids(lead + text)[len(self._ids(lead)) :]]
            if prompt and self._text(apart) == self._text(ids):
                return apart, len(prompt)
        names = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        before = [i for i in names if i is not None][:1]
        return [*before, *ids[_shared(ids, before) :]], len(before)

    def _border(self, prompt: list[int], ids: list[int]) -> int:
        """How many of the ids are the prompt's alone, although its own are others."""
        first, text = _shared(prompt, ids), self._text(prompt)
        while first < len(ids) and text.startswith(self._text(ids[: first + 1])):
            first += 1
        return first

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))
