"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836), and ours in its YAML, as objectives.

    get("arc_easy")                                          # its data set from the hub
    get("arc_easy", data="arc/", num_fewshot=5)              # train.jsonl, validation.jsonl, test.jsonl
    get("eep_boolq", data="boolq.jsonl")                     # the prompt of EEP (arXiv 2407.00945)
    get("mmlu", subjects="stem,virology", held_out=True)     # test of all other subjects
    get("my_task", include_path="my_tasks/")                 # my_tasks/my_task.yaml

Prompts, few-shot examples and metrics come from the harness's own code, and token ids are the harness's, so that
log-likelihoods and metrics are those that `lm_eval` gives for the same documents, up to the rounding of the model's
dtype. (The harness takes the log-softmax in that dtype, moeopt in float32.) The ids are others where the harness's are
not those of context and continuation, as it loses characters to a token that spans the two, or scores the </s> that a
tokenizer ends every text with; see `moeopt.tasks.tokens`. A prompt that is too long loses its beginning as in the
harness, its begin-of-sequence token included.

The loss of a document is the mean negative log-likelihood, per token, of its right option (of the likeliest, where
several are right); `correct` is the metric reported, by default the task's first, such as `acc`. Where answers are
generated, the loss is that of the reference answer, and the metrics judge what the model writes, greedily.

Splits: what the harness calls training, validation and test documents become search, dev and test as in
`moeopt.tasks.splits`. Test documents (or where the task has none, validation documents) are what the harness reports
on, and get the few-shot examples that they get there. Prompts of search and dev show no document of a later split, nor
the answer to their own.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import SPLITS, Example, Request, Scores, choice_loss
from moeopt.tasks.generation import GenerationTask, Prompt
from moeopt.tasks.lm_eval.documents import Document, PromptOptions, Reader
from moeopt.tasks.lm_eval.loading import SEED, contained, is_number, judging, load, reason
from moeopt.tasks.lm_eval.local_data import Data
from moeopt.tasks.prompting import Prompting
from moeopt.tasks.splits import FRACTIONS, DividedTask, Splits, without_shared
from moeopt.tasks.tokens import Encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moeopt.tasks.lm_eval.loading import Harness

PREFIX = "lm_eval:"
"""What may stand before the name of a task of the harness."""
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "generate_until")
_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda option: len(option.encode())}
"""What an option's log-likelihood is divided by before options are compared, by metric; nothing for others."""


@dataclass(frozen=True, eq=False)
class HarnessScores(Scores):
    """Scores with the harness's own results of every example, by metric, and the task that each belongs to."""

    results: tuple[Mapping[str, Any], ...] = ()
    tasks: tuple[str, ...] = ()


class PublishedTask(DividedTask):
    """What tasks of the harness share; subclasses say what is scored.

    Attributes:
        harness: the tasks; None where they are not at hand, as on a worker that has no more than what a study recorded.
        prompt_options: how contexts are written.
    """

    harness: Harness | None
    prompt_options: PromptOptions
    _documents: dict[str, Document]

    @classmethod
    def read(
        cls,
        name: str,
        harness: Harness,
        *,
        prompts: PromptOptions | None = None,
        fractions: Sequence[float] = FRACTIONS,
        most: int | None = None,
        only_test: bool = False,
        metric: str | None = None,
    ) -> PublishedTask:
        """The harness's tasks as one task of moeopt.

        Args:
            name: what studies record.
            harness: from `moeopt.tasks.lm_eval.loading.load`.
            prompts: how contexts are written; None: as the tasks say.
            fractions: of search, dev and test where the data has no splits of its own.
            most: read at most so many documents of each of the harness's splits, in their order.
            only_test: leave search and dev out.
            metric: that `correct` is; None for the first.

        Raises:
            TaskError: if a task can be no objective, tasks of options and of generated answers are mixed, or the data
                do not fit.
        """
        if most is not None and most < 1:
            raise TaskError(f"most must be at least 1, got {most}")
        prompts = prompts or PromptOptions()
        generates = {leaf.OUTPUT_TYPE == "generate_until" for leaf in harness.tasks.values()}
        if len(generates) > 1:
            raise TaskError(f"task {name!r} has tasks of options and of generated answers: make a mixture of them")
        documents: dict[str, Document] = {}
        parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
        origins: dict[str, str] = {}
        for leaf_name, leaf in harness.tasks.items():
            if leaf.OUTPUT_TYPE not in OUTPUT_TYPES or not hasattr(leaf, "fewshot_cfg"):
                raise TaskError(
                    f"lm_eval task {leaf_name!r} ({leaf.OUTPUT_TYPE}) neither scores given answers nor generates them,"
                    " so it is no objective; moeopt.evaluation.lm_eval_report reports on it"
                )
            reader = Reader(leaf_name, leaf, prompts)
            with _failing(leaf_name, "fails on its documents"):
                read = reader.parts(fractions, most)
            documents |= reader.documents
            origins.setdefault(reader.origin, leaf_name)
            for split, examples in read.items():
                parts[split] += examples
        kind: type[PublishedTask] = HarnessGenerationTask if generates == {True} else HarnessTask
        splits = without_shared(parts, name)
        task = kind._of(name, Splits(name, **{s: splits[s] if s == "test" or not only_test else () for s in SPLITS}))
        task.harness, task.prompt_options, task._documents = harness, prompts, documents
        task.origin = "; ".join(said if len(origins) == 1 else f"{leaf}: {said}" for said, leaf in origins.items())
        task._report(metric)
        return task

    @classmethod
    def _of(cls, name: str, splits: Splits) -> PublishedTask:
        task = cls.__new__(cls)
        task.name, task._splits, task.harness, task.prompt_options = name, splits, None, PromptOptions()
        return task

    @abstractmethod
    def _report(self, metric: str | None) -> None:
        """Choose the metric that is reported, from the results of the first document."""

    def _chosen_metric(self, names: Sequence[str], metric: str | None) -> str:
        if metric is None or metric in names:
            return metric or names[0]
        hint = nearest(metric, list(names))
        raise TaskError(f"task {self.name!r} has no metric {metric!r}{hint} (it has {', '.join(names)})")

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
            "name": self.name,
            "kind": "lm_eval",
            "fingerprint": self.fingerprint(),
            "examples": self._splits.counts(),
            "template": f"lm_eval {self.harness.version}",
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

    def aggregated(self, results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
        """The harness's metrics of documents' results; over several tasks, weighted by their documents."""
        assert self.harness is not None
        totals: dict[str, list[tuple[int, float]]] = {}
        for name, task in self.harness.tasks.items():
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
        if len(self.harness.tasks) > 1:
            means |= {f"{metric}_by_task": sum(x for _, x in parts) / len(parts) for metric, parts in totals.items()}
        return means


class HarnessTask(PublishedTask):
    """Tasks of the harness that choose among options, or score one, as one task of moeopt; see the top of this file."""

    metric = "acc"

    @classmethod
    def of_documents(cls, name: str, splits: Splits, documents: Mapping[str, Document]) -> HarnessTask:
        """A task without the harness's own: documents by the ids of the examples, each with its `rule`."""
        task = cls._of(name, splits)
        assert isinstance(task, HarnessTask)
        task._documents = dict(documents)
        return task

    def _report(self, metric: str | None) -> None:
        first = next(iter(self._documents.values()))
        answers = [(-1.0, False)] * len(first.pairs)
        try:
            with contained():
                results = self.leaf(first).process_results(first.doc, answers)
        except Exception:  # of a task with rules of its own for what the model says; they are asked again in `reduce`
            results = {}
        names = [name for name, value in results.items() if is_number(value)]
        self.metric = self._chosen_metric(["acc", *(name for name in names if name != "acc")], metric)

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
        """One request a context and continuation of the harness, of at most `max_length` tokens before the last.

        Raises:
            TaskError: if a continuation has no tokens or alone is too long; it names the example.
        """
        return list(self._encoded(self._splits.first(split, limit), tokenizer, max_length))

    def reduce(
        self,
        split: str,
        requests: Sequence[Request],
        log_likelihood: NDArray[np.float64],
        greedy: NDArray[np.int64],
    ) -> HarnessScores:
        examples = self._splits.examples(split)
        scored: dict[int, dict[int, tuple[float, bool, int]]] = {}
        for request, total, hits in zip(requests, log_likelihood, greedy, strict=True):
            answer = float(total), int(hits) == request.scored, request.scored
            scored.setdefault(request.example, {})[request.option] = answer
        losses, correct, chosen, choices, results, tasks = [], [], [], [], [], []
        for number, options in scored.items():
            document = self._documents[examples[number].id]
            answers = [options[j] for j in range(len(document.pairs))]
            lengths = self._lengths(document, len(examples[number].options))
            totals = [answers[j][0] / length for j, length in lengths]
            pick = int(np.argmax(totals))
            choices.append(choice_loss(totals, document.right))
            result = self._results(document, pick, [(total, hit) for total, hit, _ in answers])
            losses.append(min(-answers[j][0] / answers[j][2] for j in document.right))
            correct.append(float(result.get(self.metric, pick in document.right)))
            chosen.append(pick)
            results.append(result)
            tasks.append(document.task)
        return HarnessScores(
            np.asarray(losses, np.float32),
            np.ones(len(losses), np.float32),
            np.asarray(correct, np.float32),
            np.asarray(chosen) if self.chooses else None,
            np.asarray(choices, np.float32) if self.chooses else None,
            results=tuple(results),
            tasks=tuple(tasks),
        )

    def chance(self, split: str, requests: Sequence[Request]) -> NDArray[np.float64]:
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
        if not isinstance(scores, HarnessScores) or self.harness is None:
            return means
        return means | self.aggregated(scores.results, scores.tasks)


class HarnessGenerationTask(PublishedTask, GenerationTask):
    """Tasks of the harness whose answers are generated, as one task of moeopt; see the top of this file.

    Metrics are named as the harness's, with the filter of the answer behind a comma where it has a name:
    "exact_match,strict-match". Those that are no number a document, such as corpus BLEU, are left out.
    """

    _prompting = Prompting()

    def _report(self, metric: str | None) -> None:
        first = next(iter(self._documents.values()))
        assert self.harness is not None
        self.version = self.harness.version
        self._limits()
        with _failing(first.task, "cannot judge an answer"):
            names = list(self._judged(first, first.pairs[0][1].strip()))
        leaf = self.leaf(first)
        if not names:
            raise TaskError(
                f"lm_eval task {first.task!r} has no metric that is a number a document: it is no objective"
            )
        self.metric = self._chosen_metric(names, metric)
        if leaf.higher_is_better().get(self.metric.partition(",")[0]) is False:
            raise TaskError(f"the metric {self.metric!r} of lm_eval task {first.task!r} is the better the lower it is")
        settings = leaf.config.generation_kwargs or {}
        if settings.get("do_sample") or settings.get("temperature"):
            warnings.warn(f"task {self.name!r} samples its answers in the harness; here they are greedy", stacklevel=4)

    def _limits(self) -> None:
        self.template, self.judges, self.stop = "", {}, ()  # which every document has itself
        self.max_new_tokens = max(document.max_gen_toks for document in self._documents.values())

    @classmethod
    def of_documents(
        cls, name: str, splits: Splits, documents: Mapping[str, Document], metric: str, version: str
    ) -> HarnessGenerationTask:
        """A task without its data set: documents by the ids of the examples. What judges them is loaded when needed."""
        task = cls._of(name, splits)
        assert isinstance(task, HarnessGenerationTask)
        task._documents, task.metric, task.version = dict(documents), metric, version
        task._limits()
        return task

    @property
    def is_published(self) -> bool:
        """Whether what judges the answers is found by name, wherever lm-evaluation-harness is installed."""
        return self.harness is None or self.harness.include_path is None

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """One request an example, its reference behind its context, with what to generate from as `source`.

        Raises:
            TaskError: if a text has no tokens, or there is no room for a prompt; it names the example.
        """
        examples = self._splits.first(split, limit)
        requests = self._encoded(examples, tokenizer, max_length, self.max_new_tokens)
        documents = [self._documents[example.id] for example in examples]
        return [
            replace(request, source=Prompt(request.example, request.source, document.until, document.max_gen_toks))
            for request, document in zip(requests, documents)
        ]

    def prompts_of(self, requests: Sequence[Request]) -> list[Prompt]:
        return [request.source for request in requests]

    def judge(self, split: str, texts: Sequence[str], first: int = 0) -> dict[str, NDArray[np.float32]]:
        examples = self.examples(split)[first : first + len(texts)]
        documents = [self._documents[example.id] for example in examples]
        judged = [self._judged(document, text) for document, text in zip(documents, texts, strict=True)]
        names = [self.metric, *(name for name in judged[0] if name != self.metric)] if judged else []
        return {name: np.asarray([values[name] for values in judged], np.float32) for name in names}

    def leaf(self, document: Document) -> Any:
        if self.harness is None:
            docs: dict[str, list[Mapping[str, Any]]] = {}
            for document_of in self._documents.values():
                docs.setdefault(document_of.task, []).append(document_of.doc)
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


@contextmanager
def _failing(task: str, how: str) -> Iterator[None]:
    """Whatever the harness's code raises, as a `TaskError` that names the task."""
    try:
        with contained():
            yield
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"lm_eval task {task!r} {how} ({reason(error)})") from error


def _source(task: Any) -> list[Any]:
    """The data set of the hub that a task reads, or how its local files are written."""
    local = (task.get_config("metadata") or {}).get("local_data")
    return [task.DATASET_PATH, task.DATASET_NAME] if local is None else [local, None]


def lm_eval_task(
    name: str,
    data: Data | None = None,
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool | None = None,
    metric: str | None = None,
    subjects: str | Iterable[str] | None = None,
    held_out: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    most: int | None = None,
    config: str | None = None,
    trust_remote_code: bool = False,
) -> PublishedTask:
    """A task, group or tag of lm-evaluation-harness, or one of ours in its YAML, as an objective.

    Args:
        name: as on the harness's command line; "lm_eval:" may stand before it.
        data: a file of rows in its data set's own schema, for the split that the harness evaluates, or a folder with a
            file for every split; or a hub id. None: what the task says, usually a hub data set.
        include_path: a folder with tasks of one's own.
        num_fewshot: examples in front of every question; None for what the task says.
        apply_chat_template: whether the tokenizer's chat template writes the prompts.
        system_instruction: a text in front of all, the system message of a chat.
        fewshot_as_multiturn: whether the examples are turns of the chat rather than one message; None: they are.
        metric: what `correct` is, by the harness's name; None for `acc`, or the first of generated answers. With
            "acc_norm" the options are compared, also by ``score="choice"``, per character, with "acc_bytes" per byte.
        subjects: of a group, such as `mmlu`, the tasks, groups or tags to take, also as one text with commas between.
        held_out: the test split of what is not among `subjects`, and nothing else.
        fractions: of search, dev and test where the data has no splits of its own.
        most: read at most so many documents of each of the harness's splits, in their order; they are rendered one by
            one, which takes about a millisecond.
        config: another configuration of the hub data set than the task's.
        trust_remote_code: whether tasks in `include_path` may run Python.

    Raises:
        TaskError: if the harness is not installed, the task is unknown, can be no objective, or cannot be loaded.
    """
    multiturn = apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn
    prompts = PromptOptions(apply_chat_template, system_instruction, multiturn)
    if fewshot_as_multiturn and not apply_chat_template:
        raise TaskError("fewshot_as_multiturn is of chats: it needs apply_chat_template=True")
    if not isinstance(held_out, bool):
        raise TaskError(f"held_out must be true or false, got {held_out!r}")
    short = name.removeprefix(PREFIX)
    harness = load(
        [short],
        include_path=include_path,
        data={} if data is None else {short: data},
        config=config,
        subjects=_subjects(subjects),
        held_out=held_out,
        num_fewshot=num_fewshot,
        trust_remote_code=trust_remote_code,
    )
    return PublishedTask.read(
        name, harness, prompts=prompts, fractions=fractions, most=most, only_test=held_out, metric=metric
    )


def _subjects(subjects: str | Iterable[str] | None) -> list[str]:
    if subjects is None:
        return []
    names = subjects.split(",") if isinstance(subjects, str) else subjects
    if not isinstance(names, Iterable):
        raise TaskError(f"subjects must be names with commas between them or a list of names, got {subjects!r}")
    listed = [str(name).strip().lower().replace(" ", "_") for name in names]
    if not listed:
        raise TaskError("subjects must name at least one subject or category")
    return listed
