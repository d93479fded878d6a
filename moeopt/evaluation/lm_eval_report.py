"""Reports of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836) on a live model under a plan."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing

from moeopt.errors import TaskError, nearest
from moeopt.models import evaluation_mode, lock_of, patched
from moeopt.statistics import Interval, bootstrap
from moeopt.tasks.lm_eval.loading import SEED, Harness, contained, is_number, load, reason
from moeopt.tasks.lm_eval.local_data import Data
from moeopt.tasks.tokens import Encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from moeopt.plan import Plan

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234}
"""The harness's defaults."""
PUBLISHED = ("version", "num_fewshot", "metrics", "stderr", "higher_is_better", "samples", "documents")
"""Attributes of a result that its JSON has."""
CORPUS = ("bleu", "chrf", "chrfpp", "ter")
"""Aggregations that are slow; the harness draws fewer bootstrap samples of them too."""


@dataclass(frozen=True, eq=False)
class HarnessResult:
    """What the harness says of one task or group.

    Attributes:
        name: of the task.
        version: the task's, as its metadata has it.
        num_fewshot: examples in front of every question; None for a group whose tasks differ.
        metrics: by the harness's own keys, metric and filter, such as "acc,none".
        stderr: the harness's standard errors by the same keys, where it gives one.
        higher_is_better: by metric key.
        samples: by metric key, one value a document, as the harness aggregates them; of a group, those of all tasks.
        documents: the harness's hash of every document, in the order of `samples`.
    """

    name: str
    version: Any
    num_fewshot: int | None
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    higher_is_better: Mapping[str, bool | None]
    samples: Mapping[str, tuple[Any, ...]]
    documents: tuple[str, ...]
    _weights: Mapping[str, NDArray[np.float64]] = field(repr=False)
    _aggregations: Mapping[str, Callable[[Sequence[Any]], float]] = field(repr=False)

    @property
    def main(self) -> str:
        """The key of the task's first metric."""
        return next(iter(self.metrics))

    def difference(
        self,
        other: HarnessResult,
        metric: str | None = None,
        *,
        draws: int = 10_000,
        seed: int = 0,
        level: float = 0.95,
    ) -> Interval:
        """This result minus another, with a percentile bootstrap interval over documents, the same ones for both.

        Args:
            other: of the same task and documents.
            metric: a key of `metrics`; None for the first.
            draws: bootstrap samples; at most 1,000, or 100 for BLEU and its like, where a metric is not a mean.
            seed: of the draws.
            level: of the interval.

        Raises:
            TaskError: if the documents differ, or there is no such metric with a value for every document.
        """
        key = self.main if metric is None else metric
        if key not in self.samples or key not in other.samples:
            raise TaskError(
                f"lm_eval task {self.name!r} has no {key!r} by document{nearest(key, list(self.samples))}"
                f" (it has {', '.join(self.samples) or 'none'})"
            )
        if self.documents != other.documents:
            raise TaskError(f"the results of {self.name!r} and {other.name!r} are not of the same documents")
        a, b = self.samples[key], other.samples[key]
        if key in self._weights:
            gain = np.asarray(a, np.float64) - np.asarray(b, np.float64)
            return bootstrap(gain, self._weights[key], draws=draws, seed=seed, level=level)
        aggregate = self._aggregations[key]
        rng = np.random.default_rng(seed)
        gains = [
            aggregate([a[i] for i in drawn]) - aggregate([b[i] for i in drawn])
            for drawn in rng.integers(len(a), size=(min(draws, 100 if aggregate.__name__ in CORPUS else 1000), len(a)))
        ]
        low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(aggregate(a) - aggregate(b)), float(low), float(high))


@dataclass(frozen=True, eq=False)
class HarnessReport:
    """What the harness says of a model.

    Attributes:
        results: by name of task or group; groups after their tasks.
        version: of the harness.
        limit: as given.
    """

    results: Mapping[str, HarnessResult]
    version: str
    limit: int | None

    def __getitem__(self, name: str) -> HarnessResult:
        if name not in self.results:
            raise TaskError(f"the report has no task {name!r}{nearest(name, list(self.results))}")
        return self.results[name]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        results = {
            name: {key: _plain(getattr(result, key)) for key in PUBLISHED} for name, result in self.results.items()
        }
        return {"lm_eval": self.version, "limit": self.limit, "results": results}


def lm_eval_report(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: str | Sequence[str] | Harness,
    plan: Plan | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    data: Mapping[str, Data] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    chat_template: bool = False,
    unsafe_code: bool = False,
    trust_remote_code: bool = False,
    bootstrap_iters: int = 100_000,
) -> HarnessReport:
    """Runs lm-evaluation-harness on a model under a plan; nothing is written, and every kind of task works.

    The model is handed to the harness as it lives, so that the numbers are those of `lm_eval` on a checkpoint that was
    exported with the plan, up to the rounding of batches. Model, tokenizer and global random states are left as found.
    A tokenizer that ends every text with </s> does not here, with a warning: the harness scores that </s>, or writes
    answers behind it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags, as on the harness's command line; or what
            `moeopt.tasks.lm_eval.loading.load` gave, whose options then hold.
        plan: what is in force meanwhile; None for the model as it is.
        limit: evaluate the first so many documents of each task; None for all.
        num_fewshot, include_path, data, unsafe_code, trust_remote_code: see `moeopt.tasks.lm_eval.loading.load`.
        batch_size: sequences a forward pass.
        max_length: most tokens a sequence; None for the model's.
        chat_template: whether prompts are written with the tokenizer's chat template, few-shot examples as turns.
        bootstrap_iters: draws for the standard errors of metrics that are not means; 0: no standard errors.

    Raises:
        TaskError: if the harness is not installed, a task is unknown, cannot be loaded or fails, or the tokenizer can
            do no other than end every text with </s>.
        PlanError: if the plan does not fit the model.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit must be at least 1, got {limit}")
    if batch_size < 1:
        raise TaskError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(tasks, Harness):
        names = [tasks] if isinstance(tasks, str) else tasks
        tasks = load(
            names,
            include_path=include_path,
            data=data,
            num_fewshot=num_fewshot,
            unsafe_code=unsafe_code,
            trust_remote_code=trust_remote_code,
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.tasks.values():
        task.set_fewshot_seed(SEED)
    with ExitStack() as stack:
        for context in (contained(), _own_seeds(), lock_of(model), evaluation_mode(model)):
            stack.enter_context(context)
        if plan is not None:
            stack.enter_context(patched(model, plan))
        lm = HFLM(
            pretrained=model,
            tokenizer=_open_ended(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )
        try:
            raw = evaluate(
                lm=lm,
                task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                confirm_run_unsafe_code=unsafe_code,
            )
        except (AssertionError, KeyError, IndexError, TypeError, ValueError) as error:
            raise TaskError(f"lm_eval cannot run {', '.join(tasks.names)} ({reason(error)})") from error
        results = {name: _result(name, raw, task) for name, task in tasks.tasks.items()}
        for name, group in tasks.groups.items():
            if name in raw.get("groups", {}):
                results[name] = _group_result(group, raw, results)
    return HarnessReport(results, tasks.version, limit)


def _open_ended(tokenizer: Any) -> Any:
    """A copy of the tokenizer that puts nothing behind a text."""
    copied = copy.deepcopy(tokenizer)
    encoder = Encoder(copied)
    if encoder.end:
        start, end = (copied.convert_ids_to_tokens(ids) for ids in (encoder.start, encoder.end))
        if not hasattr(copied, "backend_tokenizer"):
            raise TaskError(
                f"the tokenizer ends every text with {end}, which lm_eval would score, or write answers behind: load it"
                " with add_eos_token=False"
            )
        copied.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*start, "$A"], special_tokens=list(zip(start, encoder.start))
        )
        warnings.warn(
            f"the tokenizer ends every text with {end}: left out here; `lm_eval` itself scores it, or writes answers"
            " behind it",
            stacklevel=3,
        )
    return copied


def _result(name: str, raw: Mapping[str, Any], task: Any) -> HarnessResult:
    aggregations = task.aggregation()
    samples: dict[str, list[Any]] = {}
    documents: dict[str, str] = {}
    for row in raw["samples"][name]:
        documents.setdefault(row["doc_id"], row["doc_hash"])
        for metric in row["metrics"]:
            samples.setdefault(f"{metric},{row['filter']}", []).append(row[metric])
    metrics, stderr = _numbers(raw["results"][name])
    values = {key: tuple(samples[key]) for key in metrics if key in samples}
    chosen = {key: aggregations.get(key.partition(",")[0], np.mean) for key in values}
    return HarnessResult(
        name,
        task.VERSION,
        raw["n-shot"].get(name),
        metrics,
        stderr,
        _directions(raw, name, metrics),
        values,
        tuple(documents.values()),
        {key: np.ones(len(values[key])) for key, function in chosen.items() if _is_mean(function, values[key])},
        chosen,
    )


def _group_result(group: Any, raw: Mapping[str, Any], results: Mapping[str, HarnessResult]) -> HarnessResult:
    """A group's own means; by document where it is a mean of means over its tasks' documents."""
    members = [results[task.task_name] for task in group.get_all_tasks()]
    metrics, stderr = _numbers(raw["groups"][group.name])
    by_size = {part.metric: part.weight_by_size for part in group.aggregate_metric_list or ()}
    samples, weights = {}, {}
    for key in metrics:
        if all(key in member._weights for member in members):
            samples[key] = tuple(value for member in members for value in member.samples[key])
            parts = [
                member._weights[key] / (1 if by_size[key.partition(",")[0]] else len(member.documents))
                for member in members
            ]
            weights[key] = np.concatenate(parts)
    return HarnessResult(
        group.name,
        group.version,
        raw["n-shot"].get(group.name),
        metrics,
        stderr,
        _directions(raw, group.name, metrics),
        samples,
        tuple(document for member in members for document in member.documents),
        weights,
        {},
    )


def _numbers(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and standard errors of a row of the harness's results, by key "metric,filter"."""
    metrics, stderr = {}, {}
    for key, value in row.items():
        if "," in key and is_number(value):
            metric, _, name = key.partition(",")
            if metric.endswith("_stderr"):
                stderr[f"{metric.removesuffix('_stderr')},{name}"] = float(value)
            else:
                metrics[key] = float(value)
    return metrics, stderr


def _plain(value: Any) -> Any:
    """A value of a result, a number, text or a nest of them, as JSON knows it."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _directions(raw: Mapping[str, Any], name: str, metrics: Mapping[str, float]) -> dict[str, bool | None]:
    better = raw["higher_is_better"].get(name) or {}
    return {key: better.get(key.partition(",")[0]) for key in metrics}


def _is_mean(aggregate: Callable[[Sequence[Any]], float], values: Sequence[Any]) -> bool:
    return aggregate.__name__ == "mean" and all(is_number(value) for value in values)


@contextmanager
def _own_seeds() -> Iterator[None]:
    """The harness's seeds; afterwards the global random states are what they were (Python's: see `contained`)."""
    arrays = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])  # noqa: NPY002
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            np.random.set_state(arrays)  # noqa: NPY002
