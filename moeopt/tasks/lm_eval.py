"""Any multiple-choice or log-likelihood task of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836).

    get("lm_eval:arc_easy")                                          # its data set from the hub
    get("lm_eval:arc_easy", data="arc/", num_fewshot=5)              # train.jsonl, validation.jsonl, test.jsonl
    get("lm_eval:my_task", include_path="my_tasks/")                 # my_tasks/my_task.yaml

Prompts, few-shot examples, token ids and metrics come from the harness's own code, so that log-likelihoods and metrics
are those that `lm_eval` gives for the same documents, up to the rounding of the model's dtype. (The harness takes the
log-softmax in that dtype, moeopt in float32.) A prompt that is too long loses its beginning as in the harness, its
begin-of-sequence token included.

The loss of a document is the mean negative log-likelihood, per token, of its right option (of the likeliest, where
several are right); `correct` is the harness's `acc`.

Splits: what the harness calls training, validation and test documents become search, dev and test as in
`moeopt.tasks.splits`. Test documents (or where the task has none, validation documents) are what the harness reports
on, and get the few-shot examples that they get there. Prompts of search and dev show no
document of a later split, nor the answer to their own.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example, Request, Scores
from moeopt.tasks.harness import SEED, Data, contained, harness_version, load, reason
from moeopt.tasks.splits import FRACTIONS, DividedTask, Splits, from_own, without_repeats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moeopt.tasks.harness import Harness

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")
Pair = tuple[str, str]
"""A context and its continuation, as the harness scores them."""


@dataclass(frozen=True, eq=False)
class Document:
    """A document of the harness: the task it belongs to, what is scored, and which of the options are right.

    `rule` says when a document whose task is not at hand counts as right: "choice", when a right option is chosen, or
    "greedy", when greedy decoding writes the first one.
    """

    task: str
    doc: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    right: tuple[int, ...]
    rule: str | None = None


@dataclass(frozen=True, eq=False)
class HarnessScores(Scores):
    """Scores with the harness's own results of every example, by metric, and the task that each belongs to."""

    results: tuple[Mapping[str, Any], ...] = ()
    tasks: tuple[str, ...] = ()


class HarnessTask(DividedTask):
    """Tasks of the harness as one task of moeopt; see the top of this file.

    Args:
        name: what studies record.
        harness: from `moeopt.tasks.harness.load`.
        fractions: of search, dev and test where the data has no splits of its own.
        most: read at most so many documents of each of the harness's splits, in their order.

    Raises:
        TaskError: if a task does not score options, or a document has no right one.
    """

    metric = "acc"

    def __init__(
        self, name: str, harness: Harness, *, fractions: Sequence[float] = FRACTIONS, most: int | None = None
    ) -> None:
        if most is not None and most < 1:
            raise TaskError(f"most must be at least 1, got {most}")
        self.name = name
        self._harness: Harness | None = harness
        self._documents: dict[str, Document] = {}
        parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for leaf_name, leaf in harness.tasks.items():
            if leaf.OUTPUT_TYPE not in OUTPUT_TYPES or not hasattr(leaf, "fewshot_cfg"):
                raise TaskError(
                    f"lm_eval task {leaf_name!r} ({leaf.OUTPUT_TYPE}) does not score given answers, so it is no"
                    " objective; moeopt.evaluation.lm_eval_report reports on it"
                )
            try:
                with contained():
                    own = self._parts_of(leaf_name, leaf, fractions, most)
            except TaskError:
                raise
            except Exception as error:
                raise TaskError(f"lm_eval task {leaf_name!r} fails on its documents ({reason(error)})") from error
            for split, examples in own.items():
                parts[split] += examples
        self._splits = Splits(name, **without_repeats(parts))

    @classmethod
    def of_documents(cls, name: str, splits: Splits, documents: Mapping[str, Document]) -> HarnessTask:
        """A task without the harness's own: documents by the ids of the examples, each with its `rule`."""
        task = cls.__new__(cls)
        task.name, task._harness, task._documents, task._splits = name, None, dict(documents), splits
        return task

    def rule(self, document: Document, example: Example) -> str:
        """The `Document.rule` that gives what the harness's own code does.

        Raises:
            TaskError: if none does.
        """
        if self._harness is None:
            assert document.rule is not None
            return document.rule
        leaf, n, total = self._harness.tasks[document.task], len(example.options), len(document.pairs)
        fits = {"choice": True, "greedy": True}
        for pick in range(n):
            for hit in (False, True):
                answers = [(-1.0 if j == pick else -2.0, hit and j == pick) for j in range(total)]
                try:
                    with contained():
                        found = float(leaf.process_results(document.doc, answers).get("acc", pick in document.right))
                except Exception as error:
                    raise TaskError(f"task {self.name!r} has an accuracy of its own ({reason(error)})") from error
                fits["choice"] &= found == float(pick in document.right)
                fits["greedy"] &= found == float(answers[0][1])
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
        chosen = self._splits.first(split, limit)
        pairs = [(i, j, pair) for i, e in enumerate(chosen) for j, pair in enumerate(self._documents[e.id].pairs)]
        requests, cut = [], set()
        for (i, j, _), (context, continuation) in zip(pairs, _encode(tokenizer, [pair for *_, pair in pairs])):
            ids = (*context, *continuation)
            if not context or not continuation:
                raise TaskError(f"task {self.name!r}: a text of example {chosen[i].id!r} has no tokens")
            room = len(ids) if max_length is None else max_length + 1
            if len(continuation) >= room:
                raise TaskError(
                    f"task {self.name!r}: option {j} of example {chosen[i].id!r} has {len(continuation)} tokens, which"
                    f" leaves no room for its prompt within {max_length}"
                )
            if len(ids) > room:
                cut.add(i)
            requests.append(Request(i, j, ids[-room:], min(len(ids), room) - len(continuation)))
        if cut:
            warnings.warn(
                f"task {self.name!r}: {len(cut)} of {len(chosen)} prompts were cut at their beginning to fit"
                f" {max_length} tokens",
                stacklevel=2,
            )
        return requests

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
        losses, correct, chosen, results, tasks = [], [], [], [], []
        for number, options in scored.items():
            document = self._documents[examples[number].id]
            answers = [options[j] for j in range(len(document.pairs))]
            pick = int(np.argmax([total for total, *_ in answers[: len(examples[number].options)]]))
            found = self._results(document, pick, [(total, hit) for total, hit, _ in answers])
            losses.append(min(-answers[j][0] / answers[j][2] for j in document.right))
            correct.append(float(found.get("acc", pick in document.right)))
            chosen.append(pick)
            results.append(found)
            tasks.append(document.task)
        return HarnessScores(
            np.asarray(losses, np.float32),
            np.ones(len(losses), np.float32),
            np.asarray(correct, np.float32),
            np.asarray(chosen) if all(len(examples[number].options) > 1 for number in scored) else None,
            results=tuple(results),
            tasks=tuple(tasks),
        )

    def _results(self, document: Document, pick: int, answers: list[tuple[float, bool]]) -> Mapping[str, Any]:
        if self._harness is None:
            return {"acc": float(answers[0][1] if document.rule == "greedy" else pick in document.right)}
        with contained():
            found: Mapping[str, Any] = self._harness.tasks[document.task].process_results(document.doc, answers)
        return found

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        """All metrics of the harness, such as acc and acc_norm; over several tasks, weighted by their documents."""
        found = super().metrics(split, scores)
        if not isinstance(scores, HarnessScores) or self._harness is None:
            return found
        totals: dict[str, list[tuple[int, float]]] = {}
        for name, task in self._harness.tasks.items():
            mine = [result for result, owner in zip(scores.results, scores.tasks) if owner == name]
            for metric in mine[0] if mine else ():
                values = [result[metric] for result in mine]
                aggregate = task.aggregation().get(metric, np.mean)
                totals.setdefault(metric, []).append((len(values), float(aggregate(values))))
        return found | {
            metric: sum(n * value for n, value in parts) / sum(n for n, _ in parts) for metric, parts in totals.items()
        }

    def describe(self) -> dict[str, Any]:
        assert self._harness is not None
        tasks = self._harness.tasks
        return {
            "name": self.name,
            "kind": "lm_eval",
            "fingerprint": self.fingerprint(),
            "examples": self._splits.counts(),
            "template": f"lm_eval {self._harness.version}",
            "tasks": {
                name: {
                    "version": task.VERSION,
                    "output_type": task.OUTPUT_TYPE,
                    "num_fewshot": task.get_config("num_fewshot"),
                    "data_set": [task.DATASET_PATH, task.DATASET_NAME],
                }
                for name, task in tasks.items()
            },
            "fewshot_seed": SEED,
        }

    def _parts_of(self, name: str, leaf: Any, fractions: Sequence[float], most: int | None) -> dict[str, list[Example]]:
        """The examples of one task of the harness by split; keeps their documents."""
        roles = {"train": "training", "validation": "validation", "test": "test"}
        sources = {leaf.get_config(f"{role}_split"): own for own, role in roles.items()}
        own = {
            split: {
                f"{name} {split} {i}": doc
                for i, doc in enumerate(islice(getattr(leaf, f"{roles[split]}_docs")(), most))
            }
            for source, split in sources.items()
            if source is not None
        }
        plain = {
            split: [self._example(name, leaf, key, doc, 0) for key, doc in docs.items()] for split, docs in own.items()
        }
        parts = from_own(plain, fractions)
        shots = int(leaf.get_config("num_fewshot"))
        return self._with_shots(name, leaf, shots, own.get("test") or own["validation"], parts) if shots else parts

    def _with_shots(
        self, name: str, leaf: Any, shots: int, evaluated: Mapping[str, Any], parts: Mapping[str, Sequence[Example]]
    ) -> dict[str, list[Example]]:
        """The same examples with few-shot prompts: those of test as the harness draws them for all it evaluates."""
        sampler, pool = leaf.sampler, list(leaf.sampler.df)
        leaf.set_fewshot_seed(SEED)
        drawn = {key: self._example(name, leaf, key, doc, shots) for key, doc in evaluated.items()}
        found = {"test": [drawn[example.id] for example in parts["test"]]}
        split_of = {_key(self._documents[e.id].doc): split for split, examples in parts.items() for e in examples}
        try:
            for split, later in (("search", ("dev", "test")), ("dev", ("test",))):
                shown = [doc for doc in pool if split_of.get(_key(doc)) not in later]
                own = {_key(doc) for doc in shown} & {_key(self._documents[e.id].doc) for e in parts[split]}
                if parts[split] and len(shown) < shots + bool(own):
                    raise TaskError(
                        f"lm_eval task {name!r} has too few documents outside {' and '.join(later)} to show {shots} of"
                        f" them in the prompts of {split} ({len(shown)}): lower num_fewshot"
                    )
                sampler.replace_df(shown)
                leaf.set_fewshot_seed(SEED)
                leaf.sampler = _WithoutOwn(sampler, own)
                found[split] = []
                for example in parts[split]:
                    doc = leaf.sampler.doc = self._documents[example.id].doc
                    found[split].append(self._example(name, leaf, example.id, doc, shots))
                leaf.sampler = sampler
        finally:
            leaf.sampler = sampler.replace_df(pool)
        return found

    def _example(self, name: str, leaf: Any, key: str, doc: Any, shots: int) -> Example:
        context = leaf.fewshot_context(doc, num_fewshot=shots, gen_prefix=leaf.doc_to_prefix(doc))
        built = leaf.construct_requests(
            doc=doc, ctx=context, metadata=(name, 0, 1), apply_chat_template=False, chat_template=None
        )
        pairs = tuple((str(one.args[0]), str(one.args[1])) for one in (built if isinstance(built, list) else [built]))
        choices = [pairs[0][1]] if leaf.OUTPUT_TYPE == "loglikelihood" else leaf.doc_to_choice(doc)
        right = (0,) if leaf.OUTPUT_TYPE == "loglikelihood" else _right(leaf, doc, choices)
        if not right:
            raise TaskError(f"lm_eval task {name!r}: {key!r} has no right option among {choices!r}: {doc!r}")
        self._documents[key] = Document(name, doc, pairs, right)
        contexts, continuations = zip(*pairs[: len(choices)])
        if len(set(contexts)) == 1:
            return Example(key, contexts[0], continuations, right[0])
        return Example(key, "", tuple(a + b for a, b in zip(contexts, continuations)), right[0])


class _WithoutOwn:
    """A few-shot sampler of the harness that never draws `doc`, the document that the prompt asks about."""

    def __init__(self, sampler: Any, keys: set[str]) -> None:
        self.sampler, self.keys, self.doc = sampler, keys, None

    def sample(self, n: int, **_: Any) -> Any:
        return self.sampler.sample(n, eval_doc=self.doc if _key(self.doc) in self.keys else None)


def _key(doc: Any) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=repr).encode()).hexdigest()


def _right(leaf: Any, doc: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """The right options: all that the harness counts as such."""
    gold = leaf.doc_to_text(doc) if leaf.multiple_input else leaf.doc_to_target(doc)
    if isinstance(gold, str):
        return (choices.index(gold),) if gold in choices else ()
    return tuple(int(g) for g in (gold if isinstance(gold, list) else [gold]) if 0 <= g < len(choices))


def _encode(tokenizer: Any, pairs: Iterable[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of contexts and continuations, by the harness's own code."""
    harness_version()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    class Encoder(HFLM):  # type: ignore[misc, no-any-unimported]
        """Gives back what would be run."""

        def __init__(self) -> None:
            super(HFLM, self).__init__()
            self.tokenizer, self.backend = tokenizer, "causal"
            self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return [(context, continuation) for _, context, continuation in requests]

    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    encoded: list[tuple[list[int], list[int]]] = Encoder().loglikelihood(requests, disable_tqdm=True)
    return encoded


def lm_eval_task(
    name: str,
    data: Data | None = None,
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    most: int | None = None,
) -> HarnessTask:
    """A task, group or tag of lm-evaluation-harness as an objective.

    Args:
        name: as on the harness's command line.
        data: local data in its data set's own schema: a .jsonl, .json or .parquet file for the split that the harness
            evaluates, or a folder with a file for every split. None: what the task says, usually a hub data set.
        include_path: a folder with tasks of one's own.
        num_fewshot: examples in front of every question; None for what the task says.
        fractions: of search, dev and test where the data has no splits of its own.
        most: read at most so many documents of each of the harness's splits, in their order; they are rendered one by
            one, which takes about a millisecond.

    Raises:
        TaskError: if the harness is not installed, the task is unknown, does not score given answers, or cannot be
            loaded.
    """
    sources = {} if data is None else {name: data}
    harness = load([name], include_path=include_path, data=sources, num_fewshot=num_fewshot)
    return HarnessTask(f"lm_eval:{name}", harness, fractions=fractions, most=most)
