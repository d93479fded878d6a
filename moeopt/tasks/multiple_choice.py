"""Multiple choice by log-likelihood.

    {"prompt": "Question: Is ice cold?\\nAnswer:", "options": ["no", "yes"], "answer": 1}

The loss of an example is the mean negative log-likelihood, per token, of the right option given the prompt. The model's
choice is the option with the highest mean log-likelihood, so that long options are not at a disadvantage; the first of
equals wins. How texts become tokens is in `moeopt.tasks.tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import Example, Request, Scores, Task
from moeopt.tasks.rows import Data, Row, examples_of, load, own_examples
from moeopt.tasks.splits import FRACTIONS, Splits, divide, from_own
from moeopt.tasks.tokens import encode_examples

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
        examples = examples_of(name, rows, to_example)
        return cls(name, **divide(examples, fractions), template=template)

    @property
    def splits(self) -> tuple[str, ...]:
        return self._splits.names

    def examples(self, split: str) -> tuple[Example, ...]:
        return self._splits.examples(split)

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request an option. A prompt too long for `max_length` loses its beginning, with a warning.

        Raises:
            TaskError: if a prompt or an option has no tokens, or an option alone is too long; it names the example.
        """
        chosen = self._splits.first(split, limit)
        encoded = encode_examples(self.name, tokenizer, chosen, lambda e: e.options, max_length=max_length)
        return [
            Request(i, j, (*prompt, *option), len(prompt))
            for i, (prompt, options) in enumerate(encoded)
            for j, option in enumerate(options)
        ]

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
        return self._splits.fingerprint(split)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "multiple_choice",
            "fingerprint": self.fingerprint(),
            "examples": self._splits.counts(),
            "template": self.template,
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
