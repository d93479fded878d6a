"""Tasks of lm-evaluation-harness that choose among options, or score one that is to be written greedily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import Example, Float64, Int64, Request, Scores, choice_loss, scored_options
from moeopt.tasks.lm_eval.base import PublishedTask, aggregated
from moeopt.tasks.lm_eval.documents import Document
from moeopt.tasks.lm_eval.loading import contained, is_number, reason
from moeopt.tasks.splits import Splits

_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda option: len(option.encode())}
"""What an option's log-likelihood is divided by before options are compared, by metric; nothing for others."""


@dataclass(frozen=True, eq=False)
class HarnessScores(Scores):
    """Scores with the harness's own results of every example, by metric, and the task that each belongs to."""

    results: tuple[Mapping[str, Any], ...] = ()
    tasks: tuple[str, ...] = ()


class HarnessTask(PublishedTask):
    """See the top of `moeopt.tasks.lm_eval.task`.

    Args:
        metric: that `correct` is; None for `acc`.
        name, splits, documents, read: as for the class above; without `harness` each document has its `rule`.
    """

    def __init__(
        self, name: str, splits: Splits, documents: Mapping[str, Document], *, metric: str | None = None, **read: Any
    ) -> None:
        super().__init__(name, splits, documents, **read)
        self.metric = metric or "acc"
        if self.harness is None:
            return
        first = next(iter(self._documents.values()))
        try:
            with contained():
                results = self.leaf(first).process_results(first.doc, [(-1.0, False)] * len(first.pairs))
        except Exception:  # of a task with rules of its own for what the model says; they are asked again in `reduce`
            results = {}
        names = [key for key, value in results.items() if is_number(value)]
        self.metric = self._chosen_metric(["acc", *(key for key in names if key != "acc")], metric)

    @property
    def chooses(self) -> bool:
        return all(len(e.options) > 1 for split in self._splits.names for e in self._splits.examples(split))

    def rule(self, document: Document, example: Example) -> str:
        """The `Document.rule` that gives what the harness's own code does.

        Raises:
            TaskError: if none does.
        """
        if self.harness is None:
            assert document.rule is not None
            return document.rule
        n, total = len(example.options), len(document.pairs)
        fits = {"choice": True, "greedy": True}
        lengths = self._lengths(document, n)
        for pick in range(n):
            for hit in (False, True):
                answers = [(-1.0 * length if j == pick else -2.0 * length, hit and j == pick) for j, length in lengths]
                answers += [(-2.0, False)] * (total - n)
                try:
                    value = float(self._results(document, pick, answers).get(self.metric, pick in document.right))
                except Exception as error:
                    raise TaskError(f"task {self.name!r} has an accuracy of its own ({reason(error)})") from error
                fits["choice"] &= value == float(pick in document.right)
                fits["greedy"] &= value == float(answers[0][1])
        rule = next((name for name, fit in fits.items() if fit), None)
        if rule is None:
            raise TaskError(f"task {self.name!r} has an accuracy of its own")
        return rule

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request a context and continuation of the harness, of at most `max_length` tokens before the last."""
        return list(self._encoded(self._splits.first(split, limit), tokenizer, max_length))

    def reduce(self, split: str, requests: Sequence[Request], log_likelihood: Float64, greedy: Int64) -> HarnessScores:
        examples = self._splits.examples(split)
        rows, results, tasks = [], [], []
        for number, answers in scored_options(requests, log_likelihood, greedy).items():
            document = self._documents[examples[number].id]
            totals = [answers[j][0] / length for j, length in self._lengths(document, len(examples[number].options))]
            pick = int(np.argmax(totals))
            result = self._results(document, pick, [(total, hit) for total, hit, _ in answers])
            correct = float(result.get(self.metric, pick in document.right))
            loss = min(-answers[j][0] / answers[j][2] for j in document.right)
            rows.append((loss, correct, choice_loss(totals, document.right), pick))
            results.append(result)
            tasks.append(document.task)
        losses, corrects, choices = np.asarray(rows, np.float32).T[:3]
        chosen = np.asarray([row[3] for row in rows]) if self.chooses else None
        return HarnessScores(
            losses,
            np.ones_like(losses),
            corrects,
            chosen,
            choices if self.chooses else None,
            results=tuple(results),
            tasks=tuple(tasks),
        )

    def chance(self, split: str, requests: Sequence[Request]) -> Float64:
        """The share of a document's options that are right; NaN where there is but one, to be written greedily."""
        examples = self._splits.examples(split)
        chosen = [examples[i] for i in dict.fromkeys(request.example for request in requests)]
        counts = [(len(self._documents[example.id].right), len(example.options)) for example in chosen]
        return np.asarray([right / options if options > 1 else np.nan for right, options in counts])

    def _lengths(self, document: Document, options: int) -> list[tuple[int, float]]:
        """Every option's place, and what its log-likelihood is divided by before the options are compared."""
        if self.harness is None or self.metric not in _LENGTHS:
            return [(j, document.lengths[j] if document.lengths else 1.0) for j in range(options)]
        choices = self.leaf(document).doc_to_choice(document.doc)
        return [(j, float(_LENGTHS[self.metric](choice))) for j, choice in enumerate(choices)]

    def _results(self, document: Document, pick: int, answers: list[tuple[float, bool]]) -> Mapping[str, Any]:
        if self.harness is None:
            return {self.metric: float(answers[0][1] if document.rule == "greedy" else pick in document.right)}
        with contained():
            results: Mapping[str, Any] = self.leaf(document).process_results(document.doc, answers)
        return results

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        """All metrics of the harness, such as acc and acc_norm; over several tasks, weighted by their documents, and
        as `acc_by_task` the mean over the tasks."""
        means = super().metrics(split, scores)
        if isinstance(scores, HarnessScores) and self.harness is not None:
            means |= aggregated(self.harness, scores.results, scores.tasks)
        return means
