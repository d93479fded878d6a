"""Multiple choice by log-likelihood.

    {"prompt": "Question: Is ice cold?\\nAnswer:", "options": ["no", "yes"], "answer": 1}

The loss of an example is the mean negative log-likelihood, per token, of the right option given the prompt. The model's
choice is the option with the highest mean log-likelihood, so that long options are not at a disadvantage; the first of
equals wins.

Shots, chat templates and tokens: see `moeopt.tasks.prompting`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import Example, Request, Scores, Task
from moeopt.tasks.prompting import SEPARATOR, Prompting, checked, draw
from moeopt.tasks.rows import Data, Row, load, own_examples
from moeopt.tasks.splits import FRACTIONS, Splits, divide, from_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray


class MultipleChoiceTask(Task):
    """A task of questions with at least two options each, built from examples that are already in splits.

    Args:
        name: what studies record.
        search, dev, test: examples; a split may be empty, the same example may not be in two of them.
        template: name and version of whatever wrote the prompts; recorded with the results.

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
    ) -> None:
        self.name = name
        self.template = template
        self._splits = Splits(name, search, dev, test)
        self._prompting = Prompting()
        for split in self._splits.names:
            for example in self._splits.examples(split):
                if len(example.options) < 2:
                    raise TaskError(f"task {name!r}: example {example.id!r} needs at least two options")

    @classmethod
    def from_rows(
        cls,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        to_example: Callable[[Mapping[str, Any]], Example],
        *,
        fractions: Sequence[float] = FRACTIONS,
        template: str = "",
    ) -> MultipleChoiceTask:
        """A task from any rows, divided into search, dev and test by a hash of each example.

        Raises:
            TaskError: also when `to_example` fails on a row; it names the row.
        """
        examples = []
        for number, row in enumerate(rows):
            try:
                examples.append(to_example(row))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise TaskError(f"task {name!r}, row {number}: {type(error).__name__}: {error}") from error
        return cls(name, **divide(examples, fractions), template=template)

    @property
    def splits(self) -> tuple[str, ...]:
        return self._splits.names

    def examples(self, split: str) -> tuple[Example, ...]:
        return self._splits.examples(split)

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request an option. What is too long for `max_length` is shortened from its beginning, with a warning.

        Raises:
            TaskError: if a prompt or an option has no tokens, or an option alone is too long; it names the example.
        """
        encoded = self._prompting.encode(self.name, tokenizer, self._splits.first(split, limit), max_length)
        return [
            Request(i, j, (*one.prompt, *option), len(one.prompt))
            for i, one in enumerate(encoded)
            for j, option in enumerate(one.options)
        ]

    def prompted(
        self, *, shots: int = 0, chat: bool = False, system: str | None = None, separator: str = SEPARATOR
    ) -> MultipleChoiceTask:
        count, prompting = checked(shots, chat, system, separator)
        if self._prompting != Prompting():
            raise TaskError(f"task {self.name!r} has shots or chat already")
        task = copy.copy(self)
        shown, task._splits = draw(self._splits, count)
        task._prompting = replace(prompting, shots=shown)
        return task

    def check(self, tokenizer: Any) -> None:
        self._prompting.check(self.name, tokenizer)

    def reduce(
        self,
        split: str,
        requests: Sequence[Request],
        log_likelihood: NDArray[np.float64],
        greedy: NDArray[np.int64],
    ) -> Scores:
        examples = self._splits.examples(split)
        means: dict[int, list[float]] = {}
        for request, total in zip(requests, log_likelihood, strict=True):
            means.setdefault(request.example, []).append(float(total) / (len(request.ids) - request.scored_from))
        answers = {i: examples[i].answer for i in means}
        losses = [-options[answers[i]] for i, options in means.items()]
        chosen = np.asarray([np.argmax(options) for options in means.values()])
        correct = chosen == np.asarray(list(answers.values()))
        return Scores(
            np.asarray(losses, np.float32), np.ones(len(means), np.float32), correct.astype(np.float32), chosen
        )

    def fingerprint(self, split: str | None = None) -> str:
        return self._prompting.fingerprint(self._splits.fingerprint(split))

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "multiple_choice",
            "fingerprint": self.fingerprint(),
            "examples": self._splits.counts(),
            "template": self.template,
            **self._prompting.describe(),
        }


def multiple_choice_task(
    data: Data, *, fractions: Sequence[float] = FRACTIONS, delimiter: str = " ", config: str | None = None
) -> MultipleChoiceTask:
    """Rows {"prompt", "options", "answer"[, "id"]}; "answer" is an index from 0 or the text of an option.

    Args:
        data: JSONL or parquet file, folder of them or hub id: see `moeopt.tasks.rows.load`.
        fractions: of search, dev and test, where the data has no splits of its own.
        delimiter: put between prompt and option unless one of them has white space there.
        config: configuration of a hub data set.
    """

    def to_example(row: Row) -> Example:
        prompt, options, answer = row.text("prompt"), row["options"], row["answer"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise TaskError(f"{row.where}: 'options' must be a list of at least two texts, got {options!r}")
        if answer in options:
            answer = options.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
            raise TaskError(
                f"{row.where}: 'answer' must be an index below {len(options)} or one of the options, got {answer!r}"
            )
        joined = [o if o[0].isspace() or prompt[-1:].isspace() else delimiter + o for o in options]
        return Example(str(row.values.get("id", row.where)), prompt, tuple(joined), answer)

    own = own_examples(load(data, config), to_example, lambda row: row.values.get("answer") is not None)
    return MultipleChoiceTask("multiple_choice", **from_own(own, fractions), template="verbatim v1")
