"""The legs of a study, each a model judged on test: finished ones are read back, and all are compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

import moeopt
from moeopt.evaluation import Evaluation
from moeopt.files import write_atomically
from moeopt.plan import Plan
from moeopt.report.tables import json_text, table
from moeopt.statistics import paired_bootstrap
from moeopt.tasks import Task


@dataclass(frozen=True)
class Leg:
    """What is known of a finished leg.

    Args:
        name: unique within the study.
        evaluation: on test.
        facts: JSON; what it was made with, and what that cost.
    """

    name: str
    evaluation: Evaluation
    facts: dict[str, Any]


class Legs:
    """A folder with a JSON file a leg, which is made again only when its settings are others.

    Args:
        folder: made where there is none.
        settings: JSON, of all legs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: dict[str, Any], make: Callable[[], tuple[Evaluation, Any]]) -> Leg:
        """A leg, from its file or from `make`, which gives an evaluation and JSON facts."""
        path, wanted = self.folder / f"{name}.json", json.loads(json.dumps(self.settings | settings))
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["settings"] == wanted:
                return _read(name, record)
        begun = time.perf_counter()
        evaluation, facts = make()
        record = {
            "settings": wanted,
            "facts": {"seconds": round(time.perf_counter() - begun, 1), **facts},
            "scores": evaluation.scores.tolist(),
        }
        write_atomically(path, json_text(record).encode())
        return _read(name, record)


def _read(name: str, record: dict[str, Any]) -> Leg:
    losses, weights, correct = np.asarray(record["scores"], np.float32)
    return Leg(name, Evaluation(losses, weights, correct, 0, 0, 0.0), record["facts"])


def judge(
    model: PreTrainedModel, tokenizer: Any, task: Task, limit: int | None, plan: Plan | None = None
) -> Evaluation:
    """The evaluation of a model on test, as it is or under a plan."""
    return moeopt.Evaluator(model, tokenizer, task, split="test", limit=limit).evaluate(plan)


def compare(
    title: str,
    legs: Sequence[Leg],
    against: Iterable[tuple[str, Callable[[Leg], Leg | None]]],
    facts: Iterable[tuple[str, Callable[[Leg], str]]],
) -> None:
    """Print a table with a line a leg.

    Args:
        title: of the table.
        legs: its lines.
        against: heads, and which leg each is compared with there: differences of test losses with their 95% intervals.
        facts: further columns.
    """

    def difference(other: Callable[[Leg], Leg | None]) -> Callable[[Leg], str]:
        def cell(leg: Leg) -> str:
            base = other(leg)
            return "" if base is None or base is leg else str(paired_bootstrap(leg.evaluation, base.evaluation))

        return cell

    columns: list[tuple[str, Callable[[Leg], str]]] = [
        ("", lambda leg: leg.name),
        *facts,
        ("loss", lambda leg: f"{leg.evaluation.loss:.4f}"),
        ("right", lambda leg: f"{leg.evaluation.accuracy:.3f}"),
        *((head, difference(other)) for head, other in against),
    ]
    Console(width=200).print(table(title, columns, legs))
