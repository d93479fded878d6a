"""One store of evaluations: what a plan gave on a split is run once, and kept as soon as it is there.

A study keeps them beside its trials, which are closed once they have ended, in system attributes
`moeopt:<split>:<model and examples>:<plan>`; the folder of a comparison in `records.jsonl`, a line each. Both pack
losses, weights and correctness as a trial's are packed, with what they cost beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moeopt.errors import MoeoptError, NonFiniteLossError, StorageError
from moeopt.evaluation.evaluation import Evaluation
from moeopt.files import MALFORMED
from moeopt.models import describe, fingerprint
from moeopt.showing import line
from moeopt.study.storage.attributes import study_attributes, write_study
from moeopt.trials import genome

if TYPE_CHECKING:
    import optuna
    from torch import nn

    from moeopt.evaluation.evaluator import Evaluator
    from moeopt.plan import Plan

FULL = "full"
"""Stands for the model as it is, where a plan's fingerprint is asked for."""
COSTS = ("tokens", "layer_tokens", "seconds", "active")
LOOK, NOT_FINITE = "moeopt:look:", "not_finite"


class Scored(NamedTuple):
    """What plans are scored on: a split of a task, and a name of model, examples and score, as a store writes it."""

    split: str
    name: str


def scores_name(evaluator: Evaluator, model: str | None = None) -> str:
    """16 hex digits that name model, task, examples and score of what an evaluator gives.

    Args:
        evaluator: it.
        model: `moeopt.models.fingerprint` of its model, where that is known.
    """
    task = evaluator.task.fingerprint(evaluator.split)
    return digest(evaluator.fingerprint, task, model or fingerprint(evaluator.model))


def digest(*parts: object) -> str:
    """16 hex digits that name the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def plan_name(plan: Plan | None) -> str:
    """A plan's fingerprint; ``"full"`` for the model as it is."""
    return FULL if plan is None else plan.fingerprint


class EvaluationStore:
    """Evaluations by plan and by what they were scored on; in memory, where no subclass keeps them."""

    def __init__(self) -> None:
        self._attributes: dict[str, Any] = {}

    def get(self, plan: str, on: Scored) -> Evaluation | None:
        """What a plan gave, None where that is not known.

        Raises:
            NonFiniteLossError: when it gave no finite loss.
            StorageError: when what is stored is damaged.
        """
        key = self._key(plan, on)
        stored = self._attributes.get(key)
        if isinstance(stored, dict) and NOT_FINITE in stored:
            raise NonFiniteLossError(line(stored[NOT_FINITE], 1000), layer=None)
        return _unpacked(key, self._attributes)

    def put(self, plan: str, on: Scored, given: Evaluation | NonFiniteLossError) -> None:
        """Keep what a plan gave, or that its loss is not finite; whole or not at all."""
        key = self._key(plan, on)
        if isinstance(given, NonFiniteLossError):
            return self._write(plan, on, {key: {NOT_FINITE: str(given)}})
        attributes = genome.pack(key, given.scores.reshape(-1))
        attributes[key] |= {cost: getattr(given, cost) for cost in COSTS}
        attributes[key]["metrics"] = {name: float(value) for name, value in given.metrics.items()}
        return self._write(plan, on, attributes)

    def has(self, plan: str, on: Scored) -> bool:
        """Whether a plan was evaluated."""
        return self._key(plan, on) in self._attributes

    def scored(self, model: nn.Module, evaluators: Mapping[str, Evaluator]) -> dict[str, Scored]:
        """By split, what the evaluators of one model score."""
        name = fingerprint(model)  # once: of an offloaded model it reads every weight
        return {split: Scored(split, scores_name(each, name)) for split, each in evaluators.items()}

    def _key(self, plan: str, on: Scored) -> str:
        return f"moeopt:{on.split}:{on.name}:{plan}"

    def _write(self, plan: str, on: Scored, attributes: Mapping[str, Any]) -> None:
        self._attributes |= attributes


class StudyStore(EvaluationStore):
    """The evaluations that a study holds, as it was opened, and those added here.

    Args:
        study: where they are.
    """

    def __init__(self, study: optuna.Study) -> None:
        super().__init__()
        self._study = study
        self._attributes |= study_attributes(study)

    def look(self, plans: list[str], on: Scored) -> None:
        """Note, before it is done, that test is looked at for the sake of these plans."""
        key = f"{LOOK}{':'.join((on.name, *plans))}"
        if key not in self._attributes:
            self._write("", on, {key: datetime.now(UTC).isoformat(timespec="seconds")})

    @property
    def looks(self) -> int:
        """How often test was looked at."""
        return sum(key.startswith(LOOK) for key in self._attributes)

    def _write(self, plan: str, on: Scored, attributes: Mapping[str, Any]) -> None:
        write_study(self._study, attributes)
        super()._write(plan, on, attributes)


class FolderStore(EvaluationStore):
    """The evaluations in a file of JSON objects, a line each, among records of other kinds.

    Lines are appended by one write, so that two processes keep each other's. One that cannot be read, such as the last
    after a crash, counts as not written, and so does a damaged evaluation.

    Args:
        path: the file; made if it is not there.

    Attributes:
        records: those of other kinds that were there.

    Raises:
        OSError: when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        content = path.read_bytes() if path.exists() else b""
        self._file = path.open("ab", buffering=0)
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")
        self.records: list[dict[str, Any]] = []
        for text in content.splitlines():
            try:
                record = json.loads(text)
                if record["kind"] == "evaluation":
                    self._take(record)
                else:
                    self.records.append(record)
            except (*MALFORMED, MoeoptError):
                continue

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which says its kind."""
        self._file.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def scored(self, model: nn.Module, evaluators: Mapping[str, Evaluator]) -> dict[str, Scored]:
        about = describe(model)
        name = digest(about["config_hash"], about["weights"])
        examples = {split: digest(e.fingerprint, e.task.fingerprint(split)) for split, e in evaluators.items()}
        return {split: Scored(split, f"{examples[split]}:{name}") for split in evaluators}

    def _take(self, record: dict[str, Any]) -> None:
        key = self._key(record["plan"], Scored(record["split"], f"{record['examples']}:{record['model']}"))
        head = record["scores"]
        if "z" in head and "v" not in head:  # as the first versions wrote it: of two dimensions, costs beside it
            costs = {cost: record[cost] for cost in COSTS}
            head = {"v": 1, "dtype": "<f4", "metrics": {}, **costs, **head, "shape": [math.prod(head["shape"])]}
        pieces = {name.removeprefix("scores"): record[name] for name in record if name.startswith("scores.")}
        attributes = {key: head, **{key + piece: text for piece, text in pieces.items()}}
        if NOT_FINITE not in head:
            _unpacked(key, attributes)
        self._attributes |= attributes

    def _write(self, plan: str, on: Scored, attributes: Mapping[str, Any]) -> None:
        key, (examples, model) = self._key(plan, on), on.name.split(":")
        named = {"kind": "evaluation", "plan": plan, "split": on.split, "examples": examples, "model": model}
        self.append(named | {f"scores{name.removeprefix(key)}": value for name, value in attributes.items()})
        super()._write(plan, on, attributes)


def _unpacked(key: str, attributes: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation under a key; raises StorageError where it is damaged."""
    scores = genome.unpack(key, attributes)
    if scores is None:
        return None
    head = attributes[key]
    try:
        losses, weights, correct = scores.reshape(3, -1)
        tokens, layer_tokens, seconds, active = (float(head[cost]) for cost in COSTS)
        if not (np.isfinite([tokens, layer_tokens]).all() and np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError("costs or weights are not finite and positive")
        metrics = {str(name): float(value) for name, value in head["metrics"].items()}
    except MALFORMED as error:
        raise StorageError(f"attribute {key!r} is damaged: {error}") from None
    return Evaluation(losses, weights, correct, int(tokens), int(layer_tokens), seconds, active, metrics)


class StoredEvaluators:
    """Evaluators of a model on several splits, each asked once for a plan: the rest is from the store.

    Args:
        evaluators: by split.
        store: what is known.

    Attributes:
        on: names what each of them scores.
        evaluated, layer_tokens: evaluations made here, and their cost.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator], store: EvaluationStore) -> None:
        self.evaluators, self.store = evaluators, store
        self.on = store.scored(next(iter(evaluators.values())).model, evaluators)
        self.evaluated = self.layer_tokens = 0

    def evaluate(self, plan: Plan | None, split: str) -> Evaluation:
        """What a plan gives on a split.

        Raises:
            NonFiniteLossError: when that is no finite loss.
        """
        name, on = plan_name(plan), self.on[split]
        evaluation = self.store.get(name, on)
        if evaluation is not None:
            return evaluation
        for other, evaluator in self.evaluators.items():
            if other != split:
                evaluator.clear(keep_teacher=True)
        self.evaluated += 1
        try:
            evaluation = self.evaluators[split].evaluate(plan)
        except NonFiniteLossError as error:
            self.store.put(name, on, error)
            raise
        self.store.put(name, on, evaluation)
        self.layer_tokens += evaluation.layer_tokens
        return evaluation
