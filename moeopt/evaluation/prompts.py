"""Prompts as a model reads them: decoded from the token ids that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeopt.tasks import Request


def decoded(tokenizer: Any, request: Request) -> tuple[str, str]:
    """A request's prompt and the text that is scored behind it, special tokens included.

    The two are cut from the text of all its tokens, as some tokenizers decode an option alone without its space.
    """

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole, prompt = text(request.ids), text(request.ids[: request.scored_from])
    border = next((i for i, (a, b) in enumerate(zip(whole, prompt)) if a != b), min(len(whole), len(prompt)))
    return whole[:border], whole[border:]
