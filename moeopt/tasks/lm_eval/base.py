"""What tasks of lm-evaluation-harness share, whether they choose among options or write: documents and their tokens."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Example, Request
from moeopt.tasks.lm_eval.documents import Document, PromptOptions
from moeopt.tasks.lm_eval.loading import SEED, Harness, reason
from moeopt.tasks.splits import DividedTask, Splits
from moeopt.tasks.tokens import Encoder


class PublishedTask(DividedTask):
    """Tasks of the harness as one of moeopt; subclasses say what is scored.

    Args:
        name: what studies record.
        splits: the examples.
        documents: of the examples, by their ids.
        harness: the tasks; None where they are not at hand, as on a worker that has no more than what a study recorded.
        prompts: how contexts are written.
        origin: which split was read from where, in words.
    """

    def __init__(
        self,
        name: str,
        splits: Splits,
        documents: Mapping[str, Document],
        *,
        harness: Harness | None = None,
        prompts: PromptOptions | None = None,
        origin: str = "",
    ) -> None:
        self.name, self.harness, self.origin = name, harness, origin
        self._splits, self._documents = splits, dict(documents)
        self.prompt_options = prompts or PromptOptions()

    def leaf(self, document: Document) -> Any:
        """The harness's task of a document."""
        assert self.harness is not None
        return self.harness.tasks[document.task]

    def prompted(self, **options: Any) -> Self:
        raise TaskError(
            f"task {self.name!r} is written by lm-evaluation-harness: give num_fewshot or apply_chat_template to"
            " `moeopt.tasks.get`"
        )

    def check(self, tokenizer: Any) -> None:
        if self.prompt_options.apply_chat_template:
            split = self.splits[0]
            list(self._encoded(self._splits.first(split, 1), tokenizer, None))

    def _chosen_metric(self, names: Sequence[str], metric: str | None) -> str:
        if metric is None or metric in names:
            return metric or names[0]
        hint = nearest(metric, list(names))
        raise TaskError(f"task {self.name!r} has no metric {metric!r}{hint} (it has {', '.join(names)})")

    def _encoded(
        self, examples: Sequence[Example], tokenizer: Any, max_length: int | None, room: int = 0
    ) -> Iterator[Request]:
        """One request a context and continuation; `source` is the context's ids, of at most `max_length - room`.

        Raises:
            TaskError: if a continuation has no tokens or alone is too long; it names the example.
        """
        encoder, cut = Encoder(tokenizer), set()
        spare = 0 if room else 1  # the last token is scored, but not read
        for i, example in enumerate(examples):
            for j, (context, continuation) in enumerate(self._documents[example.id].pairs):
                try:
                    text = context if isinstance(context, str) else context.text(tokenizer)
                except TaskError as error:
                    raise TaskError(f"task {self.name!r}: {error}") from error
                prompt, ((ids, first),) = encoder.continued(text, [continuation])
                if not 0 < first < len(ids):
                    raise TaskError(f"task {self.name!r}: a text of example {example.id!r} has no tokens")
                gone = less = 0
                if max_length is not None:
                    gone = max(0, len(ids) - max_length - spare, first + room - max_length if room else 0)
                    less = max(0, len(prompt) + room - max_length)
                if gone >= first or (room and less >= len(prompt)):
                    what = f"option {j} of example {example.id!r} has {len(ids) - first} tokens, which leaves"
                    if max_length is not None and room >= max_length:
                        what = f"{room} new tokens leave"
                    raise TaskError(f"task {self.name!r}: {what} no room for its prompt within {max_length}")
                if gone:
                    cut.add(i)
                yield Request(i, j, tuple(ids[gone:]), first - gone, source=tuple(prompt[less:]))
        if cut:
            warnings.warn(
                f"task {self.name!r}: {len(cut)} of {len(examples)} prompts were cut at their beginning to fit"
                f" {max_length} tokens",
                stacklevel=3,
            )

    def fingerprint(self, split: str | None = None) -> str:
        examples, facts = self._splits.fingerprint(split), self.prompt_options.describe()
        return hashlib.sha256(json.dumps([examples, facts]).encode()).hexdigest() if facts else examples

    def describe(self) -> dict[str, Any]:
        assert self.harness is not None
        return {
            **self.facts("lm_eval", f"lm_eval {self.harness.version}"),
            "tasks": {
                name: {
                    "version": task.VERSION,
                    "output_type": task.OUTPUT_TYPE,
                    "num_fewshot": task.get_config("num_fewshot"),
                    "data_set": _source(task),
                }
                for name, task in self.harness.tasks.items()
            },
            "fewshot_seed": SEED,
            **({} if self.metric == "acc" else {"metric": self.metric}),
            **self.prompt_options.describe(),
        }


def aggregated(harness: Harness, results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """The harness's metrics of documents' results; over several tasks, weighted by their documents."""
    totals: dict[str, list[tuple[int, float]]] = {}
    for name, task in harness.tasks.items():
        mine = [result for result, owner in zip(results, tasks) if owner == name]
        for metric in mine[0] if mine else ():
            values = [result[metric] for result in mine]
            aggregate = task.aggregation().get(metric, np.mean)
            try:
                value = float(aggregate(values))
            except (ValueError, TypeError) as error:
                raise TaskError(f"lm_eval task {name!r} cannot aggregate {metric!r} ({reason(error)})") from error
            totals.setdefault(metric, []).append((len(values), value))
    means = {metric: sum(n * x for n, x in parts) / sum(n for n, _ in parts) for metric, parts in totals.items()}
    if len(harness.tasks) > 1:
        means |= {f"{metric}_by_task": sum(x for _, x in parts) / len(parts) for metric, parts in totals.items()}
    return means


def _source(task: Any) -> list[Any]:
    """The data set of the hub that a task reads, or how its local files are written."""
    local = (task.get_config("metadata") or {}).get("local_data")
    return [task.DATASET_PATH, task.DATASET_NAME] if local is None else [local, None]
