"""Stores of evaluations: what is put is got, whole, whatever becomes of the process, and what older versions put."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from moeopt.errors import NonFiniteLossError
from moeopt.evaluation import Evaluation
from moeopt.evaluation.store import EvaluationStore, FolderStore, Scored, StudyStore

Open = Callable[[], EvaluationStore]
ON = Scored("test", "examples:model")


@pytest.fixture(params=["study", "folder"])
def reopened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store anew."""
    if request.param == "folder":
        return lambda: FolderStore(tmp_path / "records.jsonl")
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="s", storage=storage)
    return lambda: StudyStore(optuna.load_study(study_name="s", storage=storage))


def evaluation(examples: int) -> Evaluation:
    scores = np.random.default_rng(0).random((3, examples), dtype=np.float32)
    return Evaluation(scores[0], scores[1], scores[2], 5, 7, 0.5, 1.25, {"f1": 0.25})


@pytest.mark.parametrize("examples", [3, 12_000])  # the latter take more than one attribute
def test_what_was_put_is_got(reopened: Open, examples: int) -> None:
    given = evaluation(examples)
    reopened().put("plan", ON, given)
    store = reopened()
    got = store.get("plan", ON)
    assert got is not None
    assert np.array_equal(got.scores, given.scores)
    assert (got.tokens, got.layer_tokens, got.seconds, got.active, got.metrics) == (5, 7, 0.5, 1.25, {"f1": 0.25})
    assert store.has("plan", ON)
    for plan, on in (("other", ON), ("plan", Scored("dev", ON.name)), ("plan", Scored("test", "other:model"))):
        assert not store.has(plan, on)
        assert store.get(plan, on) is None


def test_a_loss_that_is_not_finite_is_known_too(reopened: Open) -> None:
    reopened().put("plan", ON, NonFiniteLossError("overflow", layer=3))
    with pytest.raises(NonFiniteLossError, match="overflow"):
        reopened().get("plan", ON)


def test_records_of_the_first_versions_are_read(tmp_path: Path) -> None:
    given = evaluation(4)
    z = base64.b64encode(zlib.compress(given.scores.astype("<f4").tobytes())).decode()
    record: dict[str, Any] = {
        "kind": "evaluation", "plan": "plan", "split": "test", "examples": "examples", "model": "model", "tokens": 5,
        "layer_tokens": 7, "seconds": 0.5, "active": 1.25, "scores": {"shape": [3, 4], "z": z},
    }  # fmt: skip
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    got = FolderStore(tmp_path / "records.jsonl").get("plan", ON)
    assert got is not None
    assert np.array_equal(got.scores, given.scores)
    assert (got.tokens, got.layer_tokens, got.seconds, got.active) == (5, 7, 0.5, 1.25)


def test_a_torn_line_counts_as_not_written(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "records.jsonl")
    store.put("first", ON, evaluation(3))
    store.put("second", ON, evaluation(3))
    with (tmp_path / "records.jsonl").open("rb+") as file:
        file.truncate(file.seek(0, 2) - 20)
    store = FolderStore(tmp_path / "records.jsonl")
    store.put("third", ON, evaluation(3))
    names = ("first", "second", "third")
    assert [FolderStore(tmp_path / "records.jsonl").has(name, ON) for name in names] == [True, False, True]
