"""Plan files and EEP's `.pth` files of any bytes: a plan, or one error that names the file, and nothing is run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import Evil, changed, damaged, evil_pth, refused, safetensors_bytes
from hypothesis import given
from hypothesis import strategies as st
from profiles import fuzzing

from moeopt.errors import PlanError
from moeopt.plan import LayerPlan, Plan


def plan() -> Plan:
    rng = np.random.default_rng(0)
    w_em, w_rm = rng.random((2, 2, 3)).astype(np.float32)
    return Plan(
        (LayerPlan(3, 2, kept=(0, 2)), LayerPlan(3, 2, w_em=w_em, w_rm=w_rm, router="prob", negative="eep", skip=0.5))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def bytes_of_plan(folder: Path) -> bytes:
    plan().save(folder / "good.safetensors")
    return (folder / "good.safetensors").read_bytes()


def loads(folder: Path, data: bytes) -> None:
    path = folder / "plan-\x1b[31m.safetensors"
    path.write_bytes(data)
    before = sorted(folder.iterdir())

    def load() -> None:
        loaded = Plan.load(path)
        assert loaded.layers
        again = folder / "again.safetensors"
        loaded.save(again)
        assert Plan.load(again) == loaded
        again.unlink()

    refused(load, repr(str(path))[1:-1])
    assert sorted(folder.iterdir()) == before


@fuzzing(150)
@given(st.data())
def test_plan_files_of_any_bytes(folder: Path, data: st.DataObject) -> None:
    loads(folder, data.draw(damaged(bytes_of_plan(folder))))


@fuzzing(200)
@given(st.data())
def test_plan_files_of_any_header(folder: Path, data: st.DataObject) -> None:
    good = bytes_of_plan(folder)
    length = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    if data.draw(st.booleans()):
        records = json.loads(header["__metadata__"]["layers"])
        header["__metadata__"]["layers"] = json.dumps(data.draw(changed({"": records}))[""])
        loads(folder, safetensors_bytes(header, body))
    else:
        loads(folder, safetensors_bytes(data.draw(changed(header)), body))


TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
RECORDS = [{"experts": 3, "k": 2, "kept": None, "router": "prob", "negative": "clamp"}]


def with_records(records: Any, tensors: dict[str, Any] | None = None, version: str = "1") -> dict[str, Any]:
    layers = records if isinstance(records, str) else json.dumps(records)
    return {**(tensors or {}), "__metadata__": {"format": "moeopt-plan", "version": version, "layers": layers}}


HEADERS: dict[str, Any] = {
    "overlapping": with_records(RECORDS, {"layers.0.w_em": TENSOR, "layers.0.w_rm": TENSOR}),
    "beyond the end": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "data_offsets": [0, 1 << 60]}}),
    "backwards": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "data_offsets": [24, 0]}}),
    "huge shape": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "shape": [1 << 31, 1 << 31]}}),
    "overflowing shape": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "shape": [1 << 32, 1 << 32, 2]}}),
    "negative shape": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "shape": [-2, -3]}}),
    "other dtype": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "dtype": "F8_E4M3", "shape": [24]}}),
    "bfloat16": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "dtype": "BF16", "shape": [4, 3]}}),
    "integers": with_records(RECORDS, {"layers.0.w_em": {**TENSOR, "dtype": "I32"}}),
    "deep": with_records("[" * 200_000),
    "deep record": with_records([{**RECORDS[0], "kept": json.loads("[" * 500 + "]" * 500)}]),
    "integer bomb": with_records('[{"experts": ' + "9" * 100_000 + "}]"),
    "infinite": with_records('[{"experts": Infinity, "k": 1, "kept": [0], "router": "rows", "negative": "clamp"}]'),
    "giant n": with_records([{**RECORDS[0], "experts": 10**12, "kept": [0, 1], "router": "rows"}]),
    "large n": with_records([{**RECORDS[0], "experts": 1 << 20, "kept": [0, 1], "router": "rows"}]),
    "not a list": with_records({"experts": 3}),
    "null": with_records("null"),
    "strings": with_records(["a", "b"]),
    "unknown key": with_records([{**RECORDS[0], "__class__": "os.system"}]),
    "surrogate": with_records('[{"experts": "\\ud800"}]'),
    "number version": {"__metadata__": {"format": "moeopt-plan", "version": "9" * 5000, "layers": "[]"}},
    "no metadata": {"layers.0.w_em": TENSOR},
}


@pytest.mark.parametrize("what", HEADERS)
def test_plan_headers_that_lie(what: str, folder: Path) -> None:
    path = folder / "plan.safetensors"
    data = np.eye(2, 3, dtype="<f4").tobytes() if "layers.0.w_em" in HEADERS[what] else b""
    path.write_bytes(safetensors_bytes(HEADERS[what], data))
    error = refused(lambda: Plan.load(path), str(path))
    assert error is not None or what == "integers", what


def test_a_header_of_duplicate_keys_or_giant_length_is_refused(folder: Path) -> None:
    path = folder / "plan.safetensors"
    good = bytes_of_plan(folder)
    for data in (
        struct.pack("<Q", 1 << 62) + good[8:],
        safetensors_bytes(b'{"a":' + json.dumps(TENSOR).encode() + b',"a":' + json.dumps(TENSOR).encode() + b"}", b""),
        b"",
        good[:7],
        b"\0" * 4096,
    ):
        path.write_bytes(data)
        assert isinstance(refused(lambda: Plan.load(path), str(path)), PlanError)
    path.unlink()
    path.mkdir()
    assert isinstance(refused(lambda: Plan.load(path), str(path)), PlanError)
    path.rmdir()


def eep_solution() -> dict[str, torch.Tensor]:
    matrices = torch.eye(4)[:2]
    return {"layers.0": matrices, "transfer.0": matrices, "others": matrices, "others_transfer": matrices}


def eep_bytes(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(eep_solution(), file, **options)
    return file.getvalue()


@fuzzing(120)
@given(st.data())
def test_eep_files_of_any_bytes(folder: Path, data: st.DataObject) -> None:
    path = folder / "solution.pth"
    old = data.draw(st.booleans())
    path.write_bytes(data.draw(damaged(eep_bytes(_use_new_zipfile_serialization=not old))))
    refused(lambda: Plan.from_eep(path, 2), str(path))


KEYS = st.one_of(
    st.sampled_from(["layers.0", "layers.[0-1]", "layers.[1-0]", "transfer.[0-9999999999]", "others", "layers.-1"]),
    st.from_regex(r"(layers|transfer)\.(\d{1,30}|\[\d{1,5}-\d{1,25}\])", fullmatch=True),
    st.text(max_size=10),
)
TENSORS = st.one_of(
    st.builds(
        lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
        st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1e30]),
    ),
    st.just(torch.zeros(1).expand(100_000, 100_000)),
    st.just(torch.eye(3).to_sparse()),
    st.just(torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)),
    st.just(torch.empty(3, 3, device="meta")),
)


@fuzzing(120)
@given(st.dictionaries(KEYS, TENSORS, max_size=5), st.booleans(), st.sampled_from([1, 2, 4]))
def test_eep_files_of_any_tensors(folder: Path, content: dict[str, torch.Tensor], filled: bool, n_layers: int) -> None:
    path = folder / "solution.pth"
    torch.save({**(eep_solution() if filled else {}), **content}, path)
    refused(lambda: Plan.from_eep(path, n_layers), str(path), most=256 << 20)


def test_a_malicious_pickle_is_not_run(folder: Path) -> None:
    canary, path = folder / "owned", folder / "solution.pth"
    proof = folder / "proof"
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()
    bodies = [evil_pth(canary, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    bodies += [pickle.dumps({"layers.0": Evil(canary)}, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    bodies += [b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."]
    for body in bodies:
        path.write_bytes(body)
        assert isinstance(refused(lambda: Plan.from_eep(path, 2), str(path)), PlanError)
        assert not canary.exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(folder: Path) -> None:
    path = folder / "solution.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(b"\0" * (1 << 20))
    refused(lambda: Plan.from_eep(path, 2), str(path))


def test_numpy_arrays_are_not_taken_for_tensors(folder: Path) -> None:
    path = folder / "solution.pth"
    torch.save({"layers.0": np.eye(3), "transfer.0": np.eye(3)}, path)
    assert isinstance(refused(lambda: Plan.from_eep(path, 1), str(path)), PlanError)
