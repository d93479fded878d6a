"""Text to token ids."""

from __future__ import annotations

from typing import Any


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """The token ids of `text`, with the tokenizer's special tokens (such as a first <s>) if `special`."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def context_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-sequence token, or nothing."""
    return encode(tokenizer, "", special=True)[:1] if tokenizer.bos_token_id is not None else []
