"""Tasks of lm-evaluation-harness whose answers are generated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import Float32, Request
from moeopt.tasks.generation import GenerationTask, Prompt
from moeopt.tasks.lm_eval.base import PublishedTask
from moeopt.tasks.lm_eval.documents import Document
from moeopt.tasks.lm_eval.loading import contained, failing, is_number, judging
from moeopt.tasks.prompting import Prompting
from moeopt.tasks.splits import Splits


class HarnessGenerationTask(PublishedTask, GenerationTask):
    """See the top of `moeopt.tasks.lm_eval.task`.

    Metrics are named as the harness's, with the filter of the answer behind a comma where it has a name:
    "exact_match,strict-match". Those that are no number a document, such as corpus BLEU, are left out.

    Args:
        metric: the one that is reported; None for the first.
        version: of the harness, where `harness` is None: what judges the answers is then loaded when needed.
        name, splits, documents, read: as for `PublishedTask`.
    """

    _prompting = Prompting()
    template, stop = "", ()  # which every document has itself

    def __init__(
        self,
        name: str,
        splits: Splits,
        documents: Mapping[str, Document],
        *,
        metric: str | None = None,
        version: str = "",
        **read: Any,
    ) -> None:
        PublishedTask.__init__(self, name, splits, documents, **read)
        self.judges = {}
        self.max_new_tokens = max(document.max_gen_toks for document in documents.values())
        self.version = version if self.harness is None else self.harness.version
        self.metric = self._reported(metric) if self.harness else metric or ""

    def _reported(self, metric: str | None) -> str:
        """The metric that is reported, of those of the first document."""
        first = next(iter(self._documents.values()))
        with failing(first.task, "cannot judge an answer"):
            names = list(self._judged(first, first.pairs[0][1].strip()))
        leaf = self.leaf(first)
        if not names:
            raise TaskError(
                f"lm_eval task {first.task!r} has no metric that is a number a document: it is no objective"
            )
        metric = self._chosen_metric(names, metric)
        if leaf.higher_is_better().get(metric.partition(",")[0]) is False:
            raise TaskError(f"the metric {metric!r} of lm_eval task {first.task!r} is the better the lower it is")
        settings = leaf.config.generation_kwargs or {}
        if settings.get("do_sample") or settings.get("temperature"):
            warnings.warn(f"task {self.name!r} samples its answers in the harness; here they are greedy", stacklevel=4)
        return metric

    @property
    def is_published(self) -> bool:
        """Whether what judges the answers is found by name, wherever lm-evaluation-harness is installed."""
        return self.harness is None or self.harness.include_path is None

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request an example, its reference behind its context, with what to generate from as `source`."""
        examples = self._splits.first(split, limit)
        requests = self._encoded(examples, tokenizer, max_length, self.max_new_tokens)
        documents = [self._documents[example.id] for example in examples]
        return [
            replace(request, source=Prompt(request.example, request.source, document.until, document.max_gen_toks))
            for request, document in zip(requests, documents)
        ]

    def prompts_of(self, requests: Sequence[Request]) -> list[Prompt]:
        return [request.source for request in requests]

    def judge(self, split: str, texts: Sequence[str], first: int = 0) -> dict[str, Float32]:
        examples = self.examples(split)[first : first + len(texts)]
        documents = [self._documents[example.id] for example in examples]
        judged = [self._judged(document, text) for document, text in zip(documents, texts, strict=True)]
        names = [self.metric, *(name for name in judged[0] if name != self.metric)] if judged else []
        return {name: np.asarray([values[name] for values in judged], np.float32) for name in names}

    def leaf(self, document: Document) -> Any:
        if self.harness is None:
            docs: dict[str, list[Mapping[str, Any]]] = {}
            for recorded in self._documents.values():
                docs.setdefault(recorded.task, []).append(recorded.doc)
            self.harness = judging(docs, self.version)
        return super().leaf(document)

    def _judged(self, document: Document, text: str) -> dict[str, float]:
        """The metrics of an answer that are numbers, as the harness filters and judges it."""
        from lm_eval.api.instance import Instance

        leaf = self.leaf(document)
        values: dict[str, float] = {}
        instance = Instance("generate_until", document.doc, ("", {}), 0, (document.task, 0, 1), resps=[text])
        with contained():
            for filtering in leaf._filters:
                filtering.apply([instance])
                results = leaf.process_results(document.doc, [instance.filtered_resps[filtering.name]])
                ending = "" if filtering.name == "none" else f",{filtering.name}"
                values |= {f"{name}{ending}": float(x) for name, x in results.items() if is_number(x)}
        return values
