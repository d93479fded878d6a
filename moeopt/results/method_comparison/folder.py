"""The folder of a comparison: every evaluation and every method's plan, kept as soon as it is there.

`comparison.json` says of which model and tasks the folder is, `plans/` holds the plans, and `records.jsonl` a line for
each evaluation (`moeopt.evaluation.store`) and for each plan: which question it answers, its file, what it cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeopt import __version__
from moeopt.errors import PlanError
from moeopt.evaluation.store import EvaluationStore, FolderStore
from moeopt.files import MALFORMED, write_atomically
from moeopt.plan import Plan
from moeopt.results.method_comparison.checks import FORMAT, MANIFEST, VERSION, ComparisonError, check_folder

RECORDS, PLANS = "records.jsonl", "plans"
COSTS = ("layer_tokens", "sequences", "tokens")


@dataclass(frozen=True)
class MadePlan:
    """A plan that a method made, what that cost, and the sequences and tokens it was made from."""

    plan: Plan
    layer_tokens: int
    sequences: int
    tokens: int


class Workspace:
    """What a comparison knows already; in a folder, or in memory only.

    Args:
        folder: made if it is not there; None: memory.
        about: descriptions of model, task and calibration task.

    Attributes:
        evaluations: what plans gave.

    Raises:
        ComparisonError: as `check_folder`, or when nothing can be written there.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder, self._plans = folder, dict[str, MadePlan]()
        self.evaluations: EvaluationStore = EvaluationStore()
        if folder is None:
            return
        check_folder(folder, about)
        try:
            (folder / PLANS).mkdir(parents=True, exist_ok=True)
            if not (folder / MANIFEST).exists():
                manifest = {"format": FORMAT, "version": VERSION, "moeopt": __version__, **about}
                write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            self.evaluations = FolderStore(folder / RECORDS)
        except OSError as error:
            raise ComparisonError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
        for record in self.evaluations.records:
            with suppress(*MALFORMED, PlanError):  # damaged, or its plan is deleted
                if record["kind"] == "plan":
                    self._take(folder, record)

    def close(self) -> None:
        """Close the file of records."""
        if isinstance(self.evaluations, FolderStore):
            self.evaluations.close()

    def plan(self, question: str) -> MadePlan | None:
        """The plan that was made in answer to this question."""
        return self._plans.get(question)

    def keep_plan(self, made: MadePlan, question: str, file: str, about: Mapping[str, Any] | None = None) -> None:
        """Keep a plan, with what its file says about it."""
        self._plans[question] = made
        if self._folder is not None and isinstance(self.evaluations, FolderStore):
            made.plan.save(self._folder / PLANS / file, about=about)
            cost = {name: getattr(made, name) for name in COSTS}
            named = {"kind": "plan", "of": question, "fingerprint": made.plan.fingerprint, "file": file}
            self.evaluations.append(named | cost)

    def _take(self, folder: Path, record: dict[str, Any]) -> None:
        self._plans.pop(record["of"], None)
        plan, costs = Plan.load(folder / PLANS / Path(record["file"]).name), map(record.__getitem__, COSTS)
        if plan.fingerprint == record["fingerprint"]:
            self._plans[record["of"]] = MadePlan(plan, *map(int, costs))
