"""Text to token ids.

`prompt + option` is encoded as one text, with special tokens, wherever the prompt's own tokens are a prefix of that for
every option, which is the usual case; otherwise a token would span the border, and each option is encoded on its own
and appended to the prompt's tokens. Either way the option's tokens are the option's, and nothing else.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from moeopt.errors import TaskError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moeopt.tasks.base import Example


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """The token ids of `text`, with the tokenizer's special tokens (such as a first <s>) if `special`."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def context_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-sequence token, or nothing."""
    return encode(tokenizer, "", special=True)[:1] if tokenizer.bos_token_id is not None else []


def encode_examples(
    task: str,
    tokenizer: Any,
    examples: Sequence[Example],
    options_of: Callable[[Example], Sequence[str]],
    *,
    max_length: int | None,
    room: int = 0,
) -> list[tuple[list[int], list[list[int]]]]:
    """For every example the token ids of its prompt and of each of `options_of(example)`.

    A prompt that leaves less than `room` tokens of `max_length`, or than its longest option has, loses its beginning
    (but not its begin-of-sequence token), with one warning for all.

    Raises:
        TaskError: if a text has no tokens, or there is no room for a single token of a prompt.
    """
    encoded = []
    cut = 0
    bos = context_prefix(tokenizer)
    for example in examples:
        prompt, options = _encode(tokenizer, example.prompt, options_of(example))
        longest = max(map(len, options))
        if not prompt or not min(map(len, options)):
            raise TaskError(f"task {task!r}: a text of example {example.id!r} has no tokens: {example!r}")
        behind = max(longest, room)
        if max_length is not None and len(prompt) + behind > max_length:
            head = bos if prompt[: len(bos)] == bos else []
            left = max_length - behind - len(head)
            if left < 1:
                what = f"an option of example {example.id!r} has {longest} tokens, which leaves"
                if room > longest:
                    what = f"{room} new tokens leave"
                raise TaskError(f"task {task!r}: {what} no room for its prompt within {max_length}")
            prompt = head + prompt[-left:]
            cut += 1
        encoded.append((prompt, options))
    if cut:
        warnings.warn(
            f"task {task!r}: {cut} of {len(examples)} prompts were cut at their beginning to fit {max_length} tokens",
            stacklevel=3,
        )
    return encoded


def _encode(tokenizer: Any, prompt: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    ids = encode(tokenizer, prompt, special=True)
    whole = [encode(tokenizer, prompt + option, special=True) for option in options]
    if all(each[: len(ids)] == ids for each in whole):
        return ids, [each[len(ids) :] for each in whole]
    return ids, [encode(tokenizer, option, special=False) for option in options]
