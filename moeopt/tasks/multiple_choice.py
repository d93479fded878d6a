"""Multiple choice by log-likelihood.

    {"prompt": "Question: Is ice cold?\\nAnswer:", "options": ["no", "yes"], "answer": 1}

The loss of an example is the mean negative log-likelihood, per token, of the right option given the prompt. The model's
choice is the option with the highest log-likelihood; the first of equals wins. With ``score="choice"`` the loss is
minus the log of the right option's share in the softmax over the options. `normalise` says what an option's
log-likelihood is divided by before the options are compared, in either case:

- "tokens": its number of tokens (the default), so that long options are not at a disadvantage;
- "none": nothing, as in the `acc` of lm-evaluation-harness;
- "characters": its number of characters, less one space before it, as in the harness's `acc_norm`.

Shots, chat templates and tokens: see `moeopt.tasks.prompting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import Example, Float64, Int64, Request, Scores, choice_loss, scored_options
from moeopt.tasks.delimiter import Delimiter
from moeopt.tasks.prompted import PromptedTask
from moeopt.tasks.rows import Data, Row, has_label, integer
from moeopt.tasks.splits import FRACTIONS

NORMALISE = ("tokens", "none", "characters")


class MultipleChoiceTask(PromptedTask):
    """A task of questions with at least two options each, built from examples that are already in splits.

    Args:
        name, search, dev, test, template: as for `PromptedTask`.
        normalise: how options are compared, see the top of this file; recorded unless it is "tokens".

    Raises:
        TaskError: if an example has fewer than two options, or splits overlap, or there are no examples.
    """

    def __init__(
        self,
        name: str,
        search: Iterable[Example] = (),
        dev: Iterable[Example] = (),
        test: Iterable[Example] = (),
        *,
        template: str = "",
        normalise: str = "tokens",
    ) -> None:
        if normalise not in NORMALISE:
            raise TaskError(f"normalise must be {', '.join(NORMALISE[:-1])} or {NORMALISE[-1]}, got {normalise!r}")
        super().__init__(name, search, dev, test, template=template)
        self.normalise = normalise
        for split in self._splits.names:
            for example in self._splits.examples(split):
                if len(example.options) < 2:
                    raise TaskError(f"task {name!r}: example {example.id!r} needs at least two options")

    def parts(self, example: Example) -> tuple[Example, ...]:
        """What is encoded and scored: the example itself, or several that share out its options, in their order.

        Overridden where an option's prompt is not that of the others, as in WinoGrande.
        """
        return (example,)

    @property
    def chooses(self) -> bool:
        return True

    def right(self, example: Example) -> tuple[int, ...]:
        """The options that count as right; the loss is that of the likeliest of them."""
        return (example.answer,)

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request an option. What is too long for `max_length` is shortened from its beginning, with a warning."""
        chosen = [(i, self.parts(example)) for i, example in enumerate(self._splits.first(split, limit))]
        every = [part for _, parts in chosen for part in parts]
        encoded = iter(self._prompting.encode(self.name, tokenizer, every, max_length))
        requests: list[Request] = []
        for i, parts in chosen:
            options = [option for _, part in zip(parts, encoded) for option in part.options]
            requests += [Request(i, j, tuple(ids), first) for j, (ids, first) in enumerate(options)]
        return requests

    def reduce(self, split: str, requests: Sequence[Request], log_likelihood: Float64, greedy: Int64) -> Scores:
        examples = self._splits.examples(split)
        rows = []
        for i, options in scored_options(requests, log_likelihood, greedy).items():
            right = self.right(examples[i])
            compared = self._compared(examples[i], [(total, length) for total, _, length in options])
            pick = int(np.argmax(compared))
            loss = -max(options[j][0] / options[j][2] for j in right)
            rows.append((loss, pick in right, choice_loss(compared, right), pick))
        losses, correct, choices = np.asarray(rows, np.float32).T[:3]
        return Scores(losses, np.ones_like(losses), correct, np.asarray([row[3] for row in rows]), choices)

    def chance(self, split: str, requests: Sequence[Request]) -> Float64:
        """The share of an example's options that are right."""
        examples = self._splits.examples(split)
        numbers = dict.fromkeys(request.example for request in requests)
        return np.asarray([len(self.right(examples[i])) / len(examples[i].options) for i in numbers])

    def _compared(self, example: Example, options: Sequence[tuple[float, int]]) -> list[float]:
        """What the choice is the largest of, from every option's (log-likelihood, tokens)."""
        if self.normalise == "none":
            return [total for total, _ in options]
        if self.normalise == "characters":
            options_of = [option for part in self.parts(example) for option in part.options]
            characters = [len(option.removeprefix(" ")) for option in options_of]
            return [total / max(n, 1) for (total, _), n in zip(options, characters, strict=True)]
        return [total / tokens for total, tokens in options]

    def describe(self) -> dict[str, Any]:
        normalise = {} if self.normalise == "tokens" else {"normalise": self.normalise}
        return self.facts("multiple_choice", self.template) | normalise | self._prompting.describe()


def multiple_choice_task(
    data: Data,
    *,
    fractions: Sequence[float] = FRACTIONS,
    delimiter: str | None = None,
    normalise: str = "tokens",
    config: str | None = None,
) -> MultipleChoiceTask:
    """Rows {"prompt", "options", "answer"[, "id"][, "group"]}; "answer" is an index from 0 or the text of an option.

    Rows of one "group", a text or a number, stay in one split, as do near-duplicates (`moeopt.tasks.likeness`).

    Args:
        data: a file of rows, a folder of them or a hub id: see `moeopt.tasks.rows.load`.
        fractions: of search, dev and test, where the data has no splits of its own.
        delimiter: put between prompt and option unless one of them has white space there; None: a space where prose
            has one, see `moeopt.tasks.delimiter`. How many rows got it is said in a warning.
        normalise: how options are compared, see the top of this file.
        config: configuration of a hub data set.
    """

    def to_example(row: Row) -> Example:
        prompt, options, answer = row.text("prompt"), row["options"], row["answer"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise TaskError(f"{row.where}: 'options' must be a list of at least two texts, got {options!r}")
        index = options.index(answer) if answer in options else integer(answer)
        if index is None or index >= len(options):
            raise TaskError(
                f"{row.where}: 'answer' must be an index below {len(options)} or one of the options, got {answer!r}"
            )
        return Example(str(row.values.get("id", row.where)), prompt, joiner.join(prompt, options), index)

    def labelled(row: Row) -> bool:
        options = row.values.get("options")
        return has_label(row, "answer") or (isinstance(options, list) and row.values.get("answer") in options)

    joiner = Delimiter(delimiter)
    how: dict[str, Any] = {"labelled": labelled, "delimiter": joiner, "fractions": fractions, "config": config}
    return MultipleChoiceTask.from_data("multiple_choice", data, to_example, **how, normalise=normalise)
