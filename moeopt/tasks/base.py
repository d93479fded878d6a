"""What a task is: examples in three splits, token sequences to score, and how scores become losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import TaskError
from moeopt.showing import listed
from moeopt.tasks.likeness import group_names, question

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
SPLITS = ("search", "dev", "test")
"""What a search sees, what chooses among its results, and what judges the choice."""


@dataclass(frozen=True)
class Example:
    """One item of a task: `options` are texts that continue `prompt` verbatim, `options[answer]` is the right one.

    A document of a text task is an example with an empty prompt and a single option. Examples of the same `group`, such
    as questions about one passage, stay in the same split; it is a text or a number, or several of them in a tuple.
    `references` are the accepted answers as a generated one is judged against them, each in its parts (a list of names
    has several), where that is not the text of the options: the number that a worked solution ends in.

    Raises:
        TaskError: if a field has the wrong type, there is no option or an empty one, or `answer` is not an index.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    group: str | float | tuple[str | float, ...] | None = None
    references: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if isinstance(self.references, str) or any(isinstance(parts, str) or not parts for parts in self.references):
            raise TaskError(f"example {self.id!r}: references must be tuples of texts, got {self.references!r}")
        object.__setattr__(self, "references", tuple(map(tuple, self.references)))
        try:
            groups = group_names(self.group)
        except TaskError as error:
            raise TaskError(f"example {self.id!r}: {error}") from None
        object.__setattr__(self, "group", groups if len(groups) > 1 else groups[0] if groups else None)
        for text in (self.prompt, *self.options, *groups, *(part for parts in self.references for part in parts)):
            if not isinstance(text, str):
                raise TaskError(f"example {self.id!r}: expected text, got {text!r}")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise TaskError(f"example {self.id!r}: {text[:60]!r} has a lone surrogate, which is not valid text")
        if not self.options or not all(self.options):
            raise TaskError(f"example {self.id!r}: options must be non-empty texts, got {self.options!r}")
        if isinstance(self.answer, bool) or not isinstance(self.answer, int):
            raise TaskError(f"example {self.id!r}: answer must be an integer, got {self.answer!r}")
        if not 0 <= self.answer < len(self.options):
            raise TaskError(f"example {self.id!r}: answer {self.answer} is not one of {len(self.options)} options")

    @cached_property
    def likeness(self) -> str:
        """What near-duplicates have in common: 64 hexadecimal digits, see `moeopt.tasks.likeness`."""
        return question(self.prompt, self.options)


@dataclass(frozen=True)
class Request:
    """One token sequence: the tokens `ids[scored_from:]` are scored, each given all tokens before it.

    `example` is the position of the example among those evaluated, `option` the option scored. `source` is whatever the
    task wants back with it in `reduce`.

    Raises:
        TaskError: unless `0 < scored_from < len(ids)`.
    """

    example: int
    option: int
    ids: tuple[int, ...]
    scored_from: int
    source: Any = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.scored_from < len(self.ids):
            raise TaskError(
                f"a request of example {self.example}, option {self.option}, scores tokens from {self.scored_from} of"
                f" {len(self.ids)} on; there must be one before them, and one of them"
            )

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.scored_from


@dataclass(frozen=True, eq=False)
class Scores:
    """Per example, float32 (examples,): loss, weight in the means, and correctness in [0, 1].

    `chosen`, int64 (examples,), is the option that the model chose, where it chooses among options, and `choice`,
    float32 (examples,), the loss of that choice, see `choice_loss`; of a mixture's examples that have no options it is
    their loss. `members` are the scores of the tasks that a mixture is made of.
    """

    losses: Float32
    weights: Float32
    correct: Float32
    chosen: Int64 | None = None
    choice: Float32 | None = None
    members: Mapping[str, Scores] | None = None


def scored_options(
    requests: Sequence[Request], log_likelihood: Float64, greedy: Int64
) -> dict[int, list[tuple[float, bool, int]]]:
    """By example, of its options in their order: log-likelihood, whether greedy decoding writes it, and its tokens."""
    options: dict[int, list[tuple[float, bool, int]]] = {}
    for request, total, hits in zip(requests, log_likelihood, greedy, strict=True):
        options.setdefault(request.example, []).append((float(total), int(hits) == request.scored, request.scored))
    return options


def choice_loss(compared: Sequence[float], right: Sequence[int]) -> float:
    """- log of the right options' share in the softmax over all options: what accuracy is made of, but smooth.

    What all options share, such as how likely the model holds any answer, does not change it.

    Args:
        compared: (options,) log-likelihoods, normalised as the options are compared.
        right: the options that count as right; their shares add up.
    """
    values = np.asarray(compared, np.float64)
    return float(np.logaddexp.reduce(values) - np.logaddexp.reduce(values[list(right)]))


class Task(ABC):
    """Examples with scores. The evaluator calls `requests` once, then `reduce` after every plan.

    Implement it directly, or build a `MultipleChoiceTask` or `TextTask` from your own rows. Splits never overlap, and
    `examples(split)` is in a fixed random order, so that the first n of it are a fair sample and samples are nested.
    """

    name: str
    metric: str = "accuracy"
    """What the mean of `Scores.correct` is called."""
    unit: str = "examples"
    """What `examples` gives; in other units, such as documents, it is not what a limit counts."""
    origin: str = ""
    """Which split was read from where, in words."""
    recorded: bool = False
    """Whether it is what a study recorded of its task: what the whole one lacks was said when the study was made."""

    @property
    def chooses(self) -> bool:
        """Whether `reduce` gives `Scores.choice`, which ``score="choice"`` minimises."""
        return False

    @property
    def generates(self) -> bool:
        """Whether its metric is that of text which the model writes: ``score="metric"`` then lets it."""
        return False

    @property
    def members(self) -> Mapping[str, Task]:
        """The tasks that a mixture is made of, by name; of any other task none."""
        return {}

    def places(self, requests: Sequence[Request]) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Of a mixture's tasks, by name: where their examples stand, and their weight over that in their own task."""
        return {}

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits that have examples, among "search", "dev" and "test"."""

    @abstractmethod
    def examples(self, split: str) -> tuple[Example, ...]:
        """The examples of a split; raises `TaskError` when it is unknown or empty. Needs no tokenizer."""

    @abstractmethod
    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """The sequences to score, of at most `max_length` tokens, for the first `limit` examples (or windows).

        Raises:
            TaskError: naming the example of which a text has no tokens, or does not fit.
        """

    @abstractmethod
    def reduce(self, split: str, requests: Sequence[Request], log_likelihood: Float64, greedy: Int64) -> Scores:
        """Per-example scores from per-request ones.

        `log_likelihood` (requests,) is the summed natural-log likelihood of the scored tokens, `greedy` (requests,) how
        many of them are the model's first choice.
        """

    def weights(self, split: str, tokenizer: Any, max_length: int | None = None) -> Float32:
        """The weights that `reduce` gives all examples of a split, float32 (examples,), in their order.

        One each, unless a task says otherwise; mixtures ask for them.
        """
        return np.ones(len(self.examples(split)), np.float32)

    def chance(self, split: str, requests: Sequence[Request]) -> Float64:
        """How likely a blind pick is right on each example of the requests, float64 (examples,).

        NaN, as by default, where the model does not choose among options.
        """
        return np.full(len({request.example for request in requests}), np.nan)

    def solutions(self, split: str, requests: Sequence[Request]) -> list[Request]:
        """Those of the requests that end in the right answer: the text that one-shot methods calibrate on."""
        if not any(request.option for request in requests):
            return list(requests)
        examples = self.examples(split)
        return [request for request in requests if request.option == examples[request.example].answer]

    def prompted(
        self, *, shots: int = 0, chat: bool = False, system: str | None = None, separator: str = "\n\n"
    ) -> Task:
        """The task with `shots` solved examples before every prompt, or as a `chat`; see `moeopt.tasks.prompting`.

        Raises:
            TaskError: if the task has no prompts, there are too few examples to show, or an option is not one.
        """
        raise TaskError(f"task {self.name!r} has no prompts of its own: it takes neither shots nor chat")

    def shown(self) -> tuple[Example, ...]:
        """The solved examples that stand before every prompt."""
        return ()

    @property
    def summary(self) -> str:
        """How many examples each split has, and where they were read from, in one line."""
        counts = listed(f"{split} {len(self.examples(split)):,}" for split in self.splits)
        shots = f", {len(self.shown())} more of search are shown as shots" if self.shown() else ""
        return f"{counts} {self.unit}{shots}" + (f" ({self.origin})" if self.origin else "")

    def check(self, tokenizer: Any) -> None:  # noqa: B027
        """Raise `TaskError` if the tokenizer cannot serve the task, such as one without a chat template."""

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        """The numbers that are published for the task, by name, from the scores of the first examples of a split.

        Overridden where they are not plain means, such as a macro F1.
        """
        return {self.metric: float(np.average(scores.correct.astype(np.float64), weights=scores.weights))}

    @abstractmethod
    def fingerprint(self, split: str | None = None) -> str:
        """SHA-256, in hexadecimal, of the examples of one split, or of all splits."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON facts that decide the scores: name, kind, fingerprint, examples a split, prompt template."""
