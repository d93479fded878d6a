"""What a comparison knows already: every evaluation and every method's plan, kept in its folder as soon as it is there.

`comparison.json` says of which model and tasks the folder is. `records.jsonl` holds one record a line::

    {"kind": "evaluation", "plan": "9f...", "split": "dev", "examples": "4c...", "model": "77...", "scores": {...}, ...}
    {"kind": "plan", "of": "a0...", "fingerprint": "9f...", "file": "naee-keep4-k2.safetensors", "layer_tokens": ...}

A line is appended by one write, so that two comparisons in one folder keep each other's. One that cannot be read, such
as the last after a crash, counts as not written.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeopt import __version__
from moeopt.errors import PlanError
from moeopt.evaluation import Evaluation
from moeopt.files import MALFORMED, write_atomically
from moeopt.plan import Plan
from moeopt.results.method_comparison.checks import FORMAT, MANIFEST, VERSION, ComparisonError, check_folder
from moeopt.trials.genome import LARGEST

RECORDS, PLANS = "records.jsonl", "plans"


@dataclass(frozen=True)
class Known:
    """A plan that a method found, what that cost, and the sequences and tokens it was found on."""

    plan: Plan
    layer_tokens: int
    sequences: int
    tokens: int


class Ledger:
    """Evaluations and plans by what they are of; in a folder, or in memory only.

    Args:
        folder: made if it is not there; None: memory.
        of: descriptions of model, task and calibration task.

    Raises:
        ComparisonError: as `check_folder`, or when nothing can be written there.
    """

    def __init__(self, folder: Path | None, of: Mapping[str, Any]) -> None:
        self.folder = folder
        self._evaluations: dict[tuple[str, ...], Evaluation] = {}
        self._plans: dict[str, Known] = {}
        if folder is None:
            return
        check_folder(folder, of)
        try:
            (folder / PLANS).mkdir(parents=True, exist_ok=True)
            if not (folder / MANIFEST).exists():
                manifest = {"format": FORMAT, "version": VERSION, "moeopt": __version__, **of}
                write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            content = (folder / RECORDS).read_bytes() if (folder / RECORDS).exists() else b""
            self._file = (folder / RECORDS).open("ab", buffering=0)
            if content and not content.endswith(b"\n"):
                self._file.write(b"\n")
        except OSError as error:
            raise ComparisonError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
        for line in content.splitlines():
            try:
                self._take(json.loads(line))
            except (*MALFORMED, zlib.error, AssertionError):  # torn, or of somebody else
                continue

    def close(self) -> None:
        """Close the file of records."""
        if self.folder is not None:
            self._file.close()

    def evaluation(self, *of: str) -> Evaluation | None:
        """What evaluating a plan gave: of plan, split, examples and model."""
        return self._evaluations.get(of)

    def keep_evaluation(self, evaluation: Evaluation, *of: str) -> None:
        self._evaluations[of] = evaluation
        e = evaluation
        costs = {"tokens": e.tokens, "layer_tokens": e.layer_tokens, "seconds": e.seconds, "active": e.active}
        names = dict(zip(("plan", "split", "examples", "model"), of))
        self._append({"kind": "evaluation", **names, **costs, "scores": _packed(e.scores)})

    def plan(self, of: str) -> Known | None:
        """The plan that was found for this question."""
        return self._plans.get(of)

    def keep_plan(self, known: Known, of: str, file: str, about: Mapping[str, Any] | None = None) -> None:
        self._plans[of] = known
        if self.folder is not None:
            known.plan.save(self.folder / PLANS / file, about=about)
        cost = {"layer_tokens": known.layer_tokens, "sequences": known.sequences, "tokens": known.tokens}
        self._append({"kind": "plan", "of": of, "fingerprint": known.plan.fingerprint, "file": file, **cost})

    def _append(self, record: dict[str, Any]) -> None:
        if self.folder is not None:
            self._file.write(json.dumps(record).encode() + b"\n")

    def _take(self, record: dict[str, Any]) -> None:
        if record["kind"] == "evaluation":
            losses, weights, correct = _unpacked(record["scores"])
            costs = int(record["tokens"]), int(record["layer_tokens"]), float(record["seconds"])
            of = tuple(record[key] for key in ("plan", "split", "examples", "model"))
            self._evaluations[of] = Evaluation(losses, weights, correct, *costs, float(record["active"]))
        elif record["kind"] == "plan":
            assert self.folder is not None
            self._plans.pop(record["of"], None)
            try:
                plan = Plan.load(self.folder / PLANS / Path(record["file"]).name)
            except PlanError:  # deleted
                return
            if plan.fingerprint == record["fingerprint"]:
                numbers = (int(record[key]) for key in ("layer_tokens", "sequences", "tokens"))
                self._plans[record["of"]] = Known(plan, *numbers)


def _packed(scores: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = np.ascontiguousarray(scores, dtype="<f4")
    return {"shape": list(data.shape), "z": base64.b64encode(zlib.compress(data.tobytes())).decode()}


def _unpacked(record: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    size = math.prod(record["shape"])
    if not 0 <= size <= LARGEST:
        raise ValueError(f"{size} numbers")
    data = zlib.decompressobj().decompress(base64.b64decode(record["z"]), 4 * size + 1)
    scores = np.frombuffer(data, dtype="<f4").reshape(record["shape"]).astype(np.float32)
    if not (np.isfinite(scores[1]) & (scores[1] > 0)).all():
        raise ValueError("the weights of examples are not all positive")
    return scores
