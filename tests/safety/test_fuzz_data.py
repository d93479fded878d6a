"""Task files, comparison ledgers and other JSON of any form: an object, or one error that names the file."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import JSON, changed, damaged, refused
from hypothesis import given
from hypothesis import strategies as st
from profiles import fuzzing

import moeopt
from moeopt import tasks
from moeopt.cli import arguments
from moeopt.errors import TaskError
from moeopt.evaluation import Evaluation
from moeopt.evaluation.store import Scored
from moeopt.exporting import verify
from moeopt.results.method_comparison.checks import ComparisonError, check_folder
from moeopt.results.method_comparison.folder import Workspace

ROWS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"prompt": "1+1=", "options": ["2", "3"], "answer": 0},
    "generation": {"prompt": "1+1=", "answer": ["2", "two"]},
    "boolq": {"passage": "Cats purr.", "question": "do cats purr", "answer": True, "label": 1},
    "arc_easy": {"id": "1", "question": "Who?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "squad": {"id": "1", "title": "t", "context": "Cats purr.", "question": "Who?", "answers": {"text": ["Cats"]}},
    "gsm8k": {"question": "1+1?", "answer": "It is #### 2"},
    "wsc": {"text": "Mark told Pete lies", "span1_text": "Mark", "span2_text": "He", "span1_index": 0, "span2_index": 3,
            "label": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def several(row: dict[str, Any]) -> bytes:
    return b"".join(json.dumps({**row, "id": str(i), "n": i}).encode() + b"\n" for i in range(12))


def reads(name: str, path: Path, **options: Any) -> None:
    def read() -> None:
        task = tasks.get(name, str(path), **options)
        task.describe()
        for split in task.splits:
            task.fingerprint(split)
            assert task.examples(split)

    refused(read, "", most=128 << 20)


@pytest.mark.parametrize("name", ROWS)
@fuzzing(20)
@given(data=st.data())
def test_rows_of_any_form(name: str, folder: Path, data: st.DataObject) -> None:
    path = folder / f"{name}.jsonl"
    rows = [{**ROWS[name], "id": str(i)} for i in range(6)]
    rows[2] = data.draw(changed({"": ROWS[name]}))[""]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    reads(name, path)


@fuzzing(80)
@given(st.data())
def test_rows_of_any_bytes(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ROWS)))
    path = folder / "bytes.jsonl"
    path.write_bytes(data.draw(damaged(several(ROWS[name]))))
    reads(name, path)


@fuzzing(50)
@given(st.data())
def test_parquet_of_any_bytes(folder: Path, data: st.DataObject) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = folder / "bytes.parquet"
    if not (folder / "good").exists():
        pq.write_table(pa.Table.from_pylist([ROWS["multiple_choice"]] * 20), folder / "good")
    path.write_bytes(data.draw(damaged((folder / "good").read_bytes())))
    reads("multiple_choice", path)


@fuzzing(40)
@given(st.data())
def test_texts_of_any_bytes(folder: Path, data: st.DataObject) -> None:
    path = folder / "text.txt"
    path.write_bytes(data.draw(damaged(b"the old cat sat on the mat. " * 40)))
    reads("text", path)


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"a": ' * 100_000, '{"prompt": ' + "9" * 100_000 + "}", '{"prompt": "\\ud800", "answer": "x"}'],
)
def test_lines_that_json_cannot_hold_are_named(line: str, folder: Path) -> None:
    path = folder / "lines.jsonl"
    path.write_text(f"{json.dumps(ROWS['generation'])}\n{line}\n")
    with pytest.raises(TaskError, match=r"lines\.jsonl, line 2"):
        tasks.get("generation", str(path))


@fuzzing(60)
@given(st.data())
def test_mixtures_of_any_form(folder: Path, data: st.DataObject) -> None:
    (folder / "a.jsonl").write_bytes(several(ROWS["multiple_choice"]))
    entry = {"task": "multiple_choice", "data": "a.jsonl", "weight": 2, "name": "a", "options": {"shots": 1}}
    mixture = {"tasks": [entry, {**entry, "name": "b"}]}
    path = folder / "mixture.json"
    text = json.dumps(data.draw(changed(mixture))).encode()
    path.write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    reads("mixture", path)


ON = Scored("dev", "e:m")


def ledger(folder: Path) -> dict[str, Any]:
    about = {"model": {"name": "m"}, "task": {"name": "t"}, "calibration": {"name": "t"}}
    ones = np.ones(3, dtype=np.float32)
    workspace = Workspace(folder, about)
    workspace.evaluations.put("p", ON, Evaluation(ones, ones, ones, 3, 6, 0.1, 2.0))
    workspace.close()
    return about


@fuzzing(100)
@given(st.data())
def test_ledgers_of_any_form(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    about = ledger(folder)
    record = json.loads((folder / "records.jsonl").read_text())
    text = json.dumps(data.draw(changed(record))).encode()
    (folder / "records.jsonl").write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    workspace = Workspace(folder, about)
    evaluation = workspace.evaluations.get("p", ON)
    assert evaluation is None or evaluation.loss is not None
    workspace.close()


@pytest.mark.slow
def test_a_ledger_bomb_counts_as_not_written(tmp_path: Path) -> None:
    about = ledger(tmp_path)
    record = json.loads((tmp_path / "records.jsonl").read_text())
    for shape in ([3, 3], [3, 1 << 24], [3, 1 << 60], [-3, -3], [3.0, 1]):
        z = base64.b64encode(zlib.compress(b"\0" * (1 << 28), 9)).decode()
        line = json.dumps({**record, "scores": {"shape": shape, "z": z}})
        (tmp_path / "records.jsonl").write_text("[" * 100_000 + "\n" + line)
        refused(lambda: Workspace(tmp_path, about).close(), "")
        assert Workspace(tmp_path, about).evaluations.get("p", ON) is None


def test_a_newer_comparison_is_refused_naming_both_versions(tmp_path: Path) -> None:
    about = ledger(tmp_path)
    manifest = json.loads((tmp_path / "comparison.json").read_text())
    (tmp_path / "comparison.json").write_text(json.dumps({**manifest, "version": 2, "moeopt": "7.8.9"}))
    with pytest.raises(ComparisonError, match=rf"7\.8\.9.*version 2.*{moeopt.__version__}"):
        check_folder(tmp_path, about)
    del manifest["moeopt"]  # as 0.1.0 wrote it
    (tmp_path / "comparison.json").write_text(json.dumps(manifest))
    check_folder(tmp_path, about)


@fuzzing(60)
@given(JSON, st.sampled_from(["config.json", "moeopt.json"]))
def test_checkpoints_of_any_json(folder: Path, content: Any, name: str) -> None:
    place = folder / "checkpoint"
    place.mkdir(exist_ok=True)
    moeopt.Plan.identity(2, 4, 2).save(place / "plan.safetensors")
    (place / "config.json").write_text("{}")
    (place / name).write_text(json.dumps(content))
    refused(lambda: arguments.quick_shape(str(place)), str(place))
    if name == "moeopt.json":
        refused(lambda: verify(place), str(place))
