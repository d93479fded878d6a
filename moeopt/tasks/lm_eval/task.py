"""Any multiple-choice or log-likelihood task of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836).

    get("lm_eval:arc_easy")                                          # its data set from the hub
    get("lm_eval:arc_easy", data="arc/", num_fewshot=5)              # train.jsonl, validation.jsonl, test.jsonl
    get("lm_eval:my_task", include_path="my_tasks/")                 # my_tasks/my_task.yaml

Prompts, few-shot examples and metrics come from the harness's own code, and token ids are the harness's, so that
log-likelihoods and metrics are those that `lm_eval` gives for the same documents, up to the rounding of the model's
dtype. (The harness takes the log-softmax in that dtype, moeopt in float32.) The ids are others where the harness's are
not those of context and continuation, as it loses characters to a token that spans the two, or scores the </s> that a
tokenizer ends every text with; see `moeopt.tasks.tokens`. A prompt that is too long loses its beginning as in the
harness, its begin-of-sequence token included.

The loss of a document is the mean negative log-likelihood, per token, of its right option (of the likeliest, where
several are right); `correct` is the harness's `acc`.

Splits: what the harness calls training, validation and test documents become search, dev and test as in
`moeopt.tasks.splits`. Test documents (or where the task has none, validation documents) are what the harness reports
on, and get the few-shot examples that they get there. Prompts of search and dev show no
document of a later split, nor the answer to their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example, Request, Scores, choice_loss
from moeopt.tasks.lm_eval.documents import Document, Reader
from moeopt.tasks.lm_eval.loading import SEED, Data, contained, load, reason
from moeopt.tasks.splits import FRACTIONS, DividedTask, Splits, without_shared
from moeopt.tasks.tokens import Encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moeopt.tasks.lm_eval.loading import Harness

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True, eq=False)
class HarnessScores(Scores):
    """Scores with the harness's own results of every example, by metric, and the task that each belongs to."""

    results: tuple[Mapping[str, Any], ...] = ()
    tasks: tuple[str, ...] = ()


class HarnessTask(DividedTask):
    """Tasks of the harness as one task of moeopt; see the top of this file.

    Args:
        name: what studies record.
        harness: from `moeopt.tasks.lm_eval.loading.load`.
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
        origins: dict[str, str] = {}
        for leaf_name, leaf in harness.tasks.items():
            if leaf.OUTPUT_TYPE not in OUTPUT_TYPES or not hasattr(leaf, "fewshot_cfg"):
                raise TaskError(
                    f"lm_eval task {leaf_name!r} ({leaf.OUTPUT_TYPE}) does not score given answers, so it is no"
                    " objective; moeopt.evaluation.lm_eval_report reports on it"
                )
            reader = Reader(leaf_name, leaf)
            try:
                with contained():
                    own = reader.parts(fractions, most)
            except TaskError:
                raise
            except Exception as error:
                raise TaskError(f"lm_eval task {leaf_name!r} fails on its documents ({reason(error)})") from error
            self._documents |= reader.documents
            origins.setdefault(reader.origin, leaf_name)
            for split, examples in own.items():
                parts[split] += examples
        self._splits = Splits(name, **without_shared(parts, name))
        self.origin = "; ".join(said if len(origins) == 1 else f"{leaf}: {said}" for said, leaf in origins.items())

    @classmethod
    def of_documents(cls, name: str, splits: Splits, documents: Mapping[str, Document]) -> HarnessTask:
        """A task without the harness's own: documents by the ids of the examples, each with its `rule`."""
        task = cls.__new__(cls)
        task.name, task._harness, task._documents, task._splits = name, None, dict(documents), splits
        return task

    @property
    def chooses(self) -> bool:
        return all(len(e.options) > 1 for split in self._splits.names for e in self._splits.examples(split))

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
        encoder = Encoder(tokenizer)
        for i, j, (context, continuation) in pairs:
            _, ((ids, first),) = encoder.continued(context, [continuation])
            if not 0 < first < len(ids):
                raise TaskError(f"task {self.name!r}: a text of example {chosen[i].id!r} has no tokens")
            gone = 0 if max_length is None else max(0, len(ids) - max_length - 1)
            if gone >= first:
                raise TaskError(
                    f"task {self.name!r}: option {j} of example {chosen[i].id!r} has {len(ids) - first} tokens, which"
                    f" leaves no room for its prompt within {max_length}"
                )
            if gone:
                cut.add(i)
            requests.append(Request(i, j, tuple(ids[gone:]), first - gone))
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
        losses, correct, chosen, choices, results, tasks = [], [], [], [], [], []
        for number, options in scored.items():
            document = self._documents[examples[number].id]
            answers = [options[j] for j in range(len(document.pairs))]
            totals = [total for total, *_ in answers[: len(examples[number].options)]]
            pick = int(np.argmax(totals))
            choices.append(choice_loss(totals, document.right))
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
                try:
                    value = float(aggregate(values))
                except (ValueError, TypeError) as error:
                    raise TaskError(f"lm_eval task {name!r} cannot aggregate {metric!r} ({reason(error)})") from error
                totals.setdefault(metric, []).append((len(values), value))
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


def lm_eval_task(
    name: str,
    data: Data | None = None,
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    most: int | None = None,
    trust_remote_code: bool = False,
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
        trust_remote_code: whether tasks in `include_path` may run Python.

    Raises:
        TaskError: if the harness is not installed, the task is unknown, does not score given answers, or cannot be
            loaded.
    """
    sources = {} if data is None else {name: data}
    harness = load(
        [name],
        include_path=include_path,
        data=sources,
        num_fewshot=num_fewshot,
        trust_remote_code=trust_remote_code,
    )
    return HarnessTask(f"lm_eval:{name}", harness, fractions=fractions, most=most)
