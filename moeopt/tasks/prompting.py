"""How an example becomes tokens: solved examples before it (shots), a chat template around it.

Two shots and a question, with the default separator, and the option that is scored::

    Ice is frozen water.
    Question: is ice cold?
    Answer: yes

    Fire is hot.
    Question: is fire wet?
    Answer: no

    Snow falls in winter.
    Question: does snow fall?
    Answer: yes

A shot is a prompt with its right option, as in lm-evaluation-harness. Shots come from the search split, the same for
every example: the last of its fixed random order, at most one of a group. They leave the search split, with whatever
equals them, nearly or wholly, or is of their group, so that nothing shown is scored.

With `chat` the prompt is a user message, rendered by the tokenizer's chat template with its generation prompt, shots
are earlier turns, and the option, without leading white space, is the assistant's reply. What is scored is what the
template writes of the reply, up to its last character: white space that the template puts before it belongs to it, any
other text, such as an empty thought, to the prompt. The template writes the special tokens; none is added.

Tokens: prompt and option are encoded as one text, see `moeopt.tasks.tokens`. A begin-of-sequence token that the prompts
are written with stands before the first shot only. A text too long loses whole shots, the first ones, and only then the
beginning of its question.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example
from moeopt.tasks.likeness import families
from moeopt.tasks.splits import Splits
from moeopt.tasks.tokens import Encoder

SEPARATOR = "\n\n"
OPTIONS = ("shots", "chat", "system", "separator")
"""Options that `moeopt.tasks.get` gives every task of examples; see `checked`."""


class Encoded(NamedTuple):
    """Token ids of an example.

    `prompt` is what an answer is generated from. `options` are the prompt with each of its options, and where the
    scored tokens begin: mostly, not always, behind the same ids.
    """

    prompt: list[int]
    options: list[tuple[list[int], int]]


@dataclass(frozen=True)
class Prompting:
    """Shots and chat of a task; by default neither, and a prompt is its own text."""

    shots: tuple[Example, ...] = ()
    chat: bool = False
    system: str | None = None
    separator: str = SEPARATOR

    def encode(
        self, task: str, tokenizer: Any, examples: Sequence[Example], max_length: int | None, room: int = 0
    ) -> list[Encoded]:
        """Tokens of the examples, as the top of this file says; prompts that were shortened are counted in a warning.

        Args:
            task: its name, for messages.
            tokenizer: of transformers.
            examples: whose prompts and options to encode.
            max_length: most tokens of a prompt and its longest option; None for any number.
            room: tokens that are left behind a prompt at least, for what the model writes; 0 where it writes nothing.

        Raises:
            TaskError: if a prompt or an option has no tokens or does not fit, naming the example; if there is no chat
                template, or one that does not take these messages.
        """
        encoded, fewer, cut = [], 0, 0
        encoder = Encoder(tokenizer)
        for example in examples:
            try:
                tokens, shots, whole = self._fitting(encoder, example, max_length, room)
            except TaskError as error:
                raise TaskError(f"task {task!r}: {error}") from error
            if (room and not tokens.prompt) or not all(0 < first < len(ids) for ids, first in tokens.options):
                raise TaskError(f"task {task!r}: a text of example {example.id!r} has no tokens: {example!r}")
            encoded.append(tokens)
            fewer += shots < len(self.shots)
            cut += not whole
        for count, what in ((fewer, "lost shots, the first ones,"), (cut, "were cut at their beginning")):
            if count:
                warnings.warn(
                    f"task {task!r}: {count} of {len(examples)} prompts {what} to fit {max_length} tokens", stacklevel=3
                )
        return encoded

    def text(self, tokenizer: Any, example: Example) -> str:
        """What the model reads before it answers the example; the tokenizer is needed for `chat` only."""
        return self._render(tokenizer, self.shots, example.prompt, ())[0]

    def check(self, task: str, tokenizer: Any) -> None:
        """Raise TaskError unless the tokenizer has a chat template that takes such messages, where one is needed."""
        if self.chat:
            sample = Example("sample", "question", ("answer",), 0)
            self.encode(task, tokenizer, [*self.shots[:1], sample], None)

    def describe(self) -> dict[str, Any]:
        """JSON facts under "prompting"; nothing for prompts as they are."""
        facts: dict[str, Any] = {}
        if self.shots:
            shown = json.dumps([[shot.prompt, shot.options[shot.answer]] for shot in self.shots])
            facts = {"shots": len(self.shots), "shown": hashlib.sha256(shown.encode()).hexdigest()[:16]}
            facts |= {} if self.chat else {"separator": self.separator}
        if self.chat:
            facts |= {"chat": True, "system": self.system}
        return {"prompting": facts} if facts else {}

    def fingerprint(self, examples: str) -> str:
        """The fingerprint of examples, prompted so."""
        facts = self.describe()
        return hashlib.sha256(json.dumps([examples, facts]).encode()).hexdigest() if facts else examples

    def _fitting(
        self, encoder: Encoder, example: Example, max_length: int | None, room: int
    ) -> tuple[Encoded, int, bool]:
        """Tokens with as many shots as fit, how many these are, and whether the question is whole."""

        def tokens(shots: Sequence[Example], question: str) -> tuple[Encoded, int, int]:
            """With the tokens kept behind the prompt, and how many there are too many."""
            text, ends = self._render(encoder.tokenizer, shots, question, example.options)
            ids_of = Encoded(*encoder.continued(text, ends, special=not self.chat))
            behind = max(room, *(len(ids) - first for ids, first in ids_of.options))
            longest = max(len(ids_of.prompt) + room if room else 0, *(len(ids) for ids, _ in ids_of.options))
            return ids_of, behind, 0 if max_length is None else longest - max_length

        for first in range(len(self.shots) + 1):
            ids_of, behind, over = tokens(self.shots[first:], example.prompt)
            if over <= 0:
                return ids_of, len(self.shots) - first, True
        assert max_length is not None
        if not self.chat:
            start = len(encoder.start)
            left = max_length - behind - start
            if left >= 1:

                def cut(ids: list[int], first: int) -> tuple[list[int], int]:
                    """The last `left` tokens of the prompt, with what stands before every text."""
                    gone = max(0, first - start - left)
                    return ids[:start] + ids[start + gone :], first - gone

                prompt, _ = cut(ids_of.prompt, len(ids_of.prompt))
                return Encoded(prompt, [cut(*option) for option in ids_of.options]), 0, False
        else:
            low, high = 1, len(example.prompt)  # characters to cut: the fewest that do, from low to high
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if tokens((), example.prompt[middle:])[2] <= 0 else (middle + 1, high)
            if low < len(example.prompt):
                return tokens((), example.prompt[low:])[0], 0, False
        longest = max(len(ids) - first for ids, first in ids_of.options)
        what = f"an option of example {example.id!r} has {longest} tokens, which leaves"
        if behind > longest:
            what = f"{room} new tokens leave"
        raise TaskError(f"{what} no room for its prompt within {max_length}")

    def _render(
        self, tokenizer: Any, shots: Sequence[Example], question: str, options: Sequence[str]
    ) -> tuple[str, Sequence[str]]:
        """The prompt's text, and the texts that continue it."""
        if not self.chat:
            texts = [*(shot.prompt + shot.options[shot.answer] for shot in shots), question]
            bos = getattr(tokenizer, "bos_token", None) or ""
            return self.separator.join([texts[0], *(text.removeprefix(bos) for text in texts[1:])]), options
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for shot in shots:
            messages.append({"role": "user", "content": shot.prompt})
            messages.append({"role": "assistant", "content": shot.options[shot.answer].lstrip()})
        messages.append({"role": "user", "content": question})
        prompt = templated(tokenizer, messages, add_generation_prompt=True)
        if self.system is not None and self.system.strip() not in prompt:
            raise TaskError("the tokenizer's chat template leaves the system message out; put it into the prompts")
        borders, ends = set(), []
        for option in options:
            reply = option.lstrip()
            if not reply:
                raise TaskError(f"option {option!r} is white space, which is no reply in a chat")
            whole = templated(
                tokenizer, [*messages, {"role": "assistant", "content": reply}], continue_final_message=True
            )
            start = whole.rindex(reply.rstrip())
            spaced = whole.startswith(prompt) and not whole[len(prompt) : start].strip()
            border = len(prompt) if spaced else start
            borders.add(whole[:border])
            ends.append(whole[border:])
        if len(borders) > 1:
            raise TaskError("the tokenizer's chat template writes different prompts for the options of one question")
        return borders.pop() if borders else prompt, ends


def checked(
    shots: int = 0, chat: bool = False, system: str | None = None, separator: str = SEPARATOR
) -> tuple[int, Prompting]:
    """How many shots to draw, and the rest, from options as users give them.

    Args:
        shots: solved examples before every prompt.
        chat: whether prompts are messages of the tokenizer's chat template.
        system: the system message of a chat.
        separator: text between shots that are no chat.

    Raises:
        TaskError: naming an option that is of the wrong type, or has nothing to act on.
    """
    for name, value, holds, what in (
        ("shots", shots, type(shots) is int and shots >= 0, "an integer of at least 0"),
        ("chat", chat, isinstance(chat, bool), "true or false"),
        ("system", system, system is None or (isinstance(system, str) and system.strip()), "a text"),
        ("separator", separator, isinstance(separator, str), "a text"),
    ):
        if not holds:
            raise TaskError(f"{name} must be {what}, got {value!r}")
    if system is not None and not chat:
        raise TaskError("a system message needs chat=True")
    if separator != SEPARATOR and (chat or not shots):
        raise TaskError("a separator stands between shots that are no chat: give shots, without chat")
    return shots, Prompting((), chat, system, separator)


def draw(splits: Splits, count: int) -> tuple[tuple[Example, ...], Splits]:
    """So many shots of the search split, and the splits without them; the choice is told at the top of this file.

    Fewer shots are the last ones of more, and the first examples of the split are the same for all numbers of shots.

    Raises:
        TaskError: if there are too few examples to show so many and still score one.
    """
    if count == 0:
        return (), splits
    pool = {split: splits.examples(split) if split in splits.names else () for split in SPLITS}
    shots: list[Example] = []
    shown: set[str] = set()
    named = families(pool["search"])
    for example, family in zip(reversed(pool["search"]), reversed(named)):
        if len(shots) < count and family not in shown:
            shots.insert(0, example)
            shown.add(family)
    search = [example for example, family in zip(pool["search"], named) if family not in shown]
    if len(shots) < count or not search:
        raise TaskError(
            f"task {splits.task!r} cannot show {count} shots: they leave its search split, whose {len(pool['search'])}"
            f" examples give at most {max(0, len(shots) - (not search))} that may be shown"
        )
    return tuple(shots), Splits(splits.task, search, pool["dev"], pool["test"])


def templated(tokenizer: Any, messages: Sequence[dict[str, str]], **how: bool) -> str:
    """The conversation as the tokenizer's chat template writes it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise TaskError("the tokenizer has no chat template, which chat=True needs; leave chat out for a base model")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))
    except Exception as error:  # a template raises what it likes
        roles = " and ".join(dict.fromkeys(message["role"] for message in messages))
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TaskError(f"the tokenizer's chat template refuses {roles} messages: {reason}") from error
