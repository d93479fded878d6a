"""Questions that a model answers by writing.

    {"prompt": "Question: How many legs have three cats?\nAnswer:", "answer": ["12", "twelve"]}

Two metrics. The loss of an example, for the search, is the mean negative log-likelihood per token of the reference
answer given the prompt: smooth, and one teacher-forced pass. What is reported is a metric of the text that the model
really generates, greedily: exact match, F1, the last number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeopt.errors import TaskError, nearest
from moeopt.tasks.answers import METRICS, Judge
from moeopt.tasks.base import Example, Float32, Float64, Int64, Request, Scores
from moeopt.tasks.delimiter import Delimiter
from moeopt.tasks.prompted import PromptedTask
from moeopt.tasks.rows import Data, Row, has_label
from moeopt.tasks.splits import FRACTIONS

GREEDY = "greedy_match"
"""Name of the teacher-forced metric: the share of examples whose reference greedy decoding writes, to the token."""


@dataclass(frozen=True)
class Prompt:
    """What one example's answer is generated from.

    The answer ends before the first of the texts `stop`, at an end-of-sequence token, or after `max_new_tokens`.
    """

    example: int
    ids: tuple[int, ...]
    stop: tuple[str, ...]
    max_new_tokens: int


class GenerationTask(PromptedTask):
    """A task of prompts and accepted answers, built from examples that are already in splits.

    An example's options are the accepted answers as texts that continue its prompt; `options[answer]` is the one whose
    likelihood is the loss. A generated text is judged against `Example.references`, or the options where there are
    none.

    Args:
        name, search, dev, test, template: as for `PromptedTask`.
        judges: metrics by name, or a name of `moeopt.tasks.answers.METRICS`; the first is the one reported.
        stop: texts that end an answer and do not belong to it.
        max_new_tokens: most tokens of an answer.

    Raises:
        TaskError: if splits overlap, there are no examples, or an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        search: Iterable[Example] = (),
        dev: Iterable[Example] = (),
        test: Iterable[Example] = (),
        *,
        judges: Mapping[str, Judge] | str = "exact_match",
        stop: Sequence[str] | str = (),
        max_new_tokens: int = 64,
        template: str = "",
    ) -> None:
        super().__init__(name, search, dev, test, template=template)
        self.judges = judges_named(judges) if isinstance(judges, str) else dict(judges)
        if not self.judges:
            raise TaskError(f"task {name!r} needs at least one metric")
        self.metric = next(iter(self.judges))
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise TaskError(f"task {name!r}: stop must be non-empty texts, got {stop!r}")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise TaskError(f"task {name!r}: max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
        self.max_new_tokens = max_new_tokens

    @property
    def generates(self) -> bool:
        return True

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request an example: its reference answer behind its prompt, with that of `prompts` as `source`."""
        examples = self._splits.first(split, limit)
        references = [replace(example, options=(example.options[example.answer],), answer=0) for example in examples]
        encoded = self._prompting.encode(self.name, tokenizer, references, max_length, room=self.max_new_tokens)
        return [
            Request(i, example.answer, tuple(ids), first, source=tuple(prompt))
            for i, (example, (prompt, ((ids, first),))) in enumerate(zip(examples, encoded))
        ]

    def reduce(self, split: str, requests: Sequence[Request], log_likelihood: Float64, greedy: Int64) -> Scores:
        """`correct` is whether every token of the reference is the model's first choice: greedy decoding writes it."""
        tokens = np.asarray([request.scored for request in requests])
        losses = (-log_likelihood / tokens).astype(np.float32)
        return Scores(losses, np.ones_like(losses), (greedy == tokens).astype(np.float32))

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        """The teacher-forced metric; those of generated texts come from `judge`."""
        return {GREEDY: float(scores.correct.astype(np.float64).mean())}

    def prompts(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Prompt]:
        """What to generate from, for the first `limit` examples; raises as `requests`.

        A prompt that leaves no room for `max_new_tokens` (or for its reference) within `max_length` loses its
        beginning, with a warning.
        """
        return self.prompts_of(self.requests(split, tokenizer, limit, max_length))

    def prompts_of(self, requests: Sequence[Request]) -> list[Prompt]:
        """What to generate from, for the examples of requests that `requests` gave."""
        return [Prompt(request.example, request.source, self.stop, self.max_new_tokens) for request in requests]

    def judge(self, split: str, texts: Sequence[str], first: int = 0) -> dict[str, Float32]:
        """Metrics in [0, 1] of generated texts, each float32 (texts,), by name; the first is the reported one.

        Args:
            split: "search", "dev" or "test".
            texts: of example `first` of the split and those that follow it.
            first: position of the first text's example.
        """
        examples = self.examples(split)[first : first + len(texts)]
        accepted = [e.references or tuple((option.strip(),) for option in e.options) for e in examples]
        pairs = list(zip(texts, accepted, strict=True))
        return {name: np.asarray([judge(*pair) for pair in pairs], np.float32) for name, judge in self.judges.items()}

    def describe(self) -> dict[str, Any]:
        judging = {"metrics": list(self.judges), "stop": list(self.stop), "max_new_tokens": self.max_new_tokens}
        return self.facts("generation", self.template) | judging | self._prompting.describe()


def judges_named(metric: str) -> dict[str, Judge]:
    """A metric of `METRICS`, first; exact match and F1 come together."""
    if metric not in METRICS:
        raise TaskError(f"unknown metric {metric!r}{nearest(metric, list(METRICS))} (there are {', '.join(METRICS)})")
    return {name: METRICS[name] for name in (metric, *({"exact_match": ["f1"], "f1": ["exact_match"]}.get(metric, [])))}


def generation_task(
    data: Data,
    *,
    metric: str = "exact_match",
    stop: Sequence[str] | str = "\n",
    max_new_tokens: int = 64,
    fractions: Sequence[float] = FRACTIONS,
    delimiter: str | None = None,
    config: str | None = None,
) -> GenerationTask:
    """Rows {"prompt", "answer"[, "id"][, "group"]}; "answer" is a text, or a list of accepted ones.

    The first accepted answer is the reference. Rows of one "group", a text or a number, stay in one split, as do those
    of one prompt.

    Args:
        data: a file of rows, a folder of them or a hub id: see `moeopt.tasks.rows.load`.
        metric: "exact_match" or "f1" (both as in SQuAD), or "last_number".
        stop: a text, or several, before which an answer ends.
        max_new_tokens: most tokens of an answer.
        fractions, delimiter, config: as for `moeopt.tasks.multiple_choice.multiple_choice_task`.

    Raises:
        TaskError: naming file and line of whatever is missing or malformed.
    """

    def to_example(row: Row) -> Example:
        prompt, answer = row.text("prompt"), row["answer"]
        answers = [answer] if isinstance(answer, str) else answer
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise TaskError(f"{row.where}: 'answer' must be a text or a list of texts, not empty ones, got {answer!r}")
        joined = joiner.join(prompt, answers)
        return Example(str(row.values.get("id", row.where)), prompt, joined, 0, group=prompt)

    def labelled(row: Row) -> bool:
        return row.values.get("answer") == "-1" or has_label(row, "answer")  # which may be what is to be written

    judges, joiner = judges_named(metric), Delimiter(delimiter)
    how: dict[str, Any] = {"labelled": labelled, "delimiter": joiner, "fractions": fractions, "config": config}
    how |= {"judges": judges, "stop": stop, "max_new_tokens": max_new_tokens}
    return GenerationTask.from_data("generation", data, to_example, **how)
