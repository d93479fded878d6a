"""Verification: what a checkpoint holds and computes, against the patched original."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeopt.errors import ExportError, ModelError
from moeopt.exporting.exporter import prepare
from moeopt.exporting.folders import SOURCE, locate
from moeopt.exporting.quantised import OF_INPUTS
from moeopt.exporting.reloading import compute
from moeopt.exporting.source import Source
from moeopt.exporting.stock import ACTIVE_KEYS, EXPERT_KEYS, Form, chosen_form, read_config
from moeopt.exporting.unread import disagreeing
from moeopt.exporting.writing import write_json
from moeopt.files import MALFORMED
from moeopt.models import Admitted, admit, load_model, load_tokenizer, patched
from moeopt.models.gate import CODE, CUSTOM, auto_class, code_for
from moeopt.models.quantisation import DEQUANTISING, StoredQuantised
from moeopt.models.weight_files import INDEX, weight_files
from moeopt.plan import Plan
from moeopt.showing import first_line, listed, shown
from moeopt.spaces.serving import PREDICTION_KEY

SMALLEST_EPSILON = 2.0**-20
"""Of float32, whose sums depend on how a library splits them, more bits than the last are not asked for."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        form: "stock" or "custom".
        tensors: how many tensors were compared.
        differing: names of those that are not, bit for bit, what the plan makes of the full checkpoint.
        config: where config.json disagrees with the numbers of experts in the file, or with what export writes there.
        remarks: what is said of tensors that no class reads.
        tokens: positions whose logits were compared.
        difference: largest absolute difference of their logits.
        tolerance: what rounding may make of it, epsilon * sqrt(layers) * largest absolute logit, where epsilon is that
            of the coarsest dtype that merged weights are stored or the model computes in, and at least 2**-20.
        top_1: fraction of positions with the same likeliest token.
        generated: tokens of the greedy continuation that was compared.
        same_generation: whether it was the same, or parted where two tokens are likeliest up to `tolerance`.
        failure: why the checkpoint did not even load, else None.
    """

    form: str
    tensors: int
    differing: tuple[str, ...]
    tokens: int = 0
    difference: float = math.inf
    tolerance: float = 0.0
    top_1: float = 0.0
    generated: int = 0
    same_generation: bool = False
    failure: str | None = None
    config: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is the patched original, up to rounding."""
        return not self.differing and not self.config and self.difference <= self.tolerance and self.same_generation

    def lines(self) -> list[str]:
        """The same for people."""
        lines = [
            f"form            {self.form}",
            f"tensors         {self.tensors - len(self.differing)} of {self.tensors} bit for bit as the plan makes them"
            + (f"; not {listed(self.differing)}" if self.differing else ""),
            f"config          {listed(self.config) or 'agrees with every number of experts in the file'}",
            *(f"not read        {remark}" for remark in self.remarks),
        ]
        if self.failure is not None:
            lines.append(f"loading         fails: {self.failure}")
        else:
            lines += [
                f"logits          largest difference {self.difference:.3g} at {self.tokens} positions "
                f"(rounding may make {self.tolerance:.3g})",
                f"likeliest token the same at {100 * self.top_1:.1f}%",
                f"generation      {'the same' if self.same_generation else 'differs'}, {self.generated} tokens",
            ]
        return [*lines, f"verified        {'yes' if self.ok else 'NO'}"]


def verify(
    folder: str | Path,
    *,
    model: str | Path | None = None,
    plan: Plan | None = None,
    texts: Sequence[str] = (),
    sequences: int = 2,
    length: int = 32,
    new_tokens: int = 16,
    seed: int = 0,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Hold an exported checkpoint against the original under its plan.

    What `moeopt.export` wrote says itself which these are, in `moeopt.json` and `plan.safetensors`. A checkpoint that
    another export target wrote may do without: give `model` and `plan`.

    Its tensors are compared bit for bit with those that the plan makes of the full checkpoint. Then the original is
    loaded and patched, and the checkpoint is loaded as anyone would, in a fresh process in which moeopt cannot be
    imported; their logits on random tokens and on `texts` are compared, and a greedy continuation, in the dtype of the
    checkpoint and with the same experts implementation. The two are never in memory at the same time.

    Args:
        folder: the checkpoint, a folder or hub name.
        model: the full model, a folder or hub name; None: where it was when it was exported, or what the checkpoint
            names on the hub.
        plan: what the checkpoint should be; None: what its `plan.safetensors` says.
        texts: compared beside the random tokens, cut to 8 times `length`.
        sequences, length: how many sequences of random tokens, and how long.
        new_tokens: of the continuation.
        seed: of the random tokens.
        device_map: where accelerate puts the weights; None: the CPU.
        trust_remote_code: whether code in the checkpoint may run that is not, byte for byte, what moeopt ships, and
            code that comes with the full model.

    Raises:
        ExportError: when the folder is no checkpoint, nothing says which plan or full model it is of, the original is
            gone, or the checkpoint brings code that is not moeopt's.
        ModelError: when the original cannot be loaded and is not quantised; where it is, `Verification.failure` says
            why not, and tensors and config are compared.
    """
    folder = locate(folder)
    plan, source_folder, form = _read(folder, plan, model)
    config = read_config(folder)
    if not trust_remote_code:
        _admitted(folder)
    full = locate(source_folder)
    with Source(full) as source, Source(folder) as written:
        prepared = prepare(source, plan, chosen_form(plan, full, form)[0], trust_remote_code=trust_remote_code)
        layout = prepared.layout
        differing = set(layout.tensors.keys() ^ written.tensors.keys())
        for name in layout.tensors.keys() & written.tensors.keys():
            right, there = layout.tensors[name], written.tensors[name]
            if (right.dtype, right.shape) != (there.dtype, there.shape):
                differing.add(name)
        for name, at, piece in layout.parts(prepared.source):
            if name not in differing and written.read_bytes(name, at, len(piece)) != bytes(piece):
                differing.add(name)
        wrong = [*_changed(prepared.config, read_config(full), config), *disagreeing(config, written.tensors)]
        if prepared.needs_trust:
            code = [name for name in prepared.files if name.endswith(".py")]
            wrong += [f"{name} is not the original's" for name in code if not _same(full / name, folder / name)]
    stored_as = StoredQuantised.read(full)
    compared = Verification(
        form, len(layout.tensors), tuple(sorted(differing)), config=tuple(wrong), remarks=tuple(prepared.unread.lines())
    )
    stored = max((torch.finfo(kind).eps for kind in layout.merged_dtypes), default=0.0)
    try:
        expected = _expected(full, plan, texts, sequences, length, new_tokens, seed, device_map, trust_remote_code)
    except ModelError as error:
        if stored_as.method is None:
            raise
        return replace(compared, failure=f"the original, so that nothing is computed: {first_line(error)}")
    options = {"device_map": device_map, "new_tokens": new_tokens, "unread": prepared.ignored}
    options["dequantised_by"] = DEQUANTISING.get(StoredQuantised.read(folder).method or "")
    options["beside"] = list(OF_INPUTS)
    with tempfile.TemporaryDirectory() as scratch:
        place, trusted = (folder, True) if trust_remote_code else _settings(folder, Path(scratch) / "checkpoint")
        options |= {"trust_remote_code": trusted, "auto_class": auto_class(read_config(place)).__name__}
        got = _reloaded(place, expected.request, Path(scratch), options)
    if isinstance(got, str):
        return replace(compared, failure=got)
    return _compared(compared, expected, got, max(stored, expected.epsilon))


@dataclass(frozen=True)
class _Expected:
    """What the patched original computes for the sequences of a request, and how its dtype rounds."""

    request: dict[str, Tensor]
    results: dict[str, Tensor]
    epsilon: float
    layers: int


def _read(folder: Path, plan: Plan | None, model: str | Path | None) -> tuple[Plan, str, Form]:
    """The plan, where the full model is, and the form; what is not given is in the files that `export` writes."""
    path = folder / "moeopt.json"
    if plan is not None and model is not None:
        custom = str(read_config(folder).get("model_type")).startswith(CUSTOM)
        return plan, str(model), "custom" if custom else "stock"
    if not path.is_file() or not (folder / "plan.safetensors").is_file():
        raise ExportError(
            f"{str(folder)!r} lacks moeopt.json or plan.safetensors, where moeopt export says what a checkpoint is of: "
            "give both the plan (plan=, or --plan FILE) and the full model (model=, or --model)"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(record[key], str) for key in ("form", "fingerprint")):
            raise TypeError("form and fingerprint must be text")
    except MALFORMED as error:
        raise ExportError(f"{str(path)!r} is not what moeopt writes: {shown(error)}") from None
    stored = Plan.load(folder / "plan.safetensors")
    if stored.fingerprint != record["fingerprint"]:
        raise ExportError(f"plan.safetensors of {str(folder)!r} is not the plan that its moeopt.json names")
    return plan or stored, str(model or _original(folder, record)), record["form"]


def _original(folder: Path, record: dict[str, Any]) -> str:
    """Where the full model is: in the folder that it was exported from, or on the hub."""
    place, hub_id = folder / SOURCE, record.get("base_model")
    source = record.get("source")  # of moeopt before 0.2
    if place.is_file():
        with contextlib.suppress(OSError, *MALFORMED):
            source = str(json.loads(place.read_text(encoding="utf-8"))["source"])
    if isinstance(source, str) and Path(source).is_dir():
        return source
    if isinstance(hub_id, str):
        revision = record.get("base_revision")
        return str(locate(hub_id, revision if isinstance(revision, str) else None))
    gone = "nothing says where the original is" if source is None else f"the original is no longer at {source!r}"
    raise ExportError(f"{gone}; say it: model=, or --model")


def _admitted(folder: Path) -> Admitted:
    try:
        return admit(folder)
    except ModelError as error:
        raise ExportError(str(error)) from None


def _settings(folder: Path, place: Path) -> tuple[Path, bool]:
    """A copy of what the gate lets pass of a checkpoint, its weights as links, and whether moeopt's own class loads it.

    It is the copy that is checked and loaded, so that nothing can be exchanged in between.
    """
    _admitted(folder)
    place.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            (place / name).write_bytes((folder / name).read_bytes())
    model_type = str(read_config(place).get("model_type"))
    if model_type.startswith(CUSTOM):
        (place / CODE).write_bytes(code_for(model_type.removeprefix(CUSTOM)))
    files, named = weight_files(folder)
    for file in files:
        (place / file.name).symlink_to(file.resolve())
    if named:
        write_json(place / INDEX, {"metadata": {}, "weight_map": named})
    return place, _admitted(place).is_custom


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()


def _changed(config: dict[str, Any], original: dict[str, Any], written: dict[str, Any]) -> list[str]:
    """Where a config.json does not say of experts and of multi-token prediction what export changes there."""
    complaints = []
    for where in ("", "text_config"):
        right, full, told = (c.get(where, {}) if where else c for c in (config, original, written))
        for key, value in right.items():
            of_experts = key in (*EXPERT_KEYS, *ACTIVE_KEYS) or PREDICTION_KEY.search(key)
            if of_experts and value != full.get(key) and value != told.get(key):
                complaints.append(f"{key} is {told.get(key)}, not {value}")
        if right.get("quantization_config") != told.get("quantization_config"):
            complaints.append("quantization_config is not what export makes of the original's")
    return complaints


def _expected(
    full: Path,
    plan: Plan,
    texts: Sequence[str],
    sequences: int,
    length: int,
    new_tokens: int,
    seed: int,
    device_map: str | None,
    trust_remote_code: bool,
) -> _Expected:
    tokenizer: Any = load_tokenizer(full, trust_remote_code=trust_remote_code) if texts else None
    model = load_model(full, device_map=device_map, trust_remote_code=trust_remote_code)
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(config.vocab_size)
    request = {"prompt": torch.randint(vocabulary, (1, min(8, length)), generator=generator)}
    for i in range(sequences):
        request[f"random-{i}"] = torch.randint(vocabulary, (1, length), generator=generator)
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : 8 * length]
        if ids.shape[1]:
            request[f"text-{i}"] = ids
    with patched(model, plan):
        results = compute(model, request, new_tokens)
    epsilon = max(torch.finfo(model.dtype).eps, SMALLEST_EPSILON)
    layers = int(config.num_hidden_layers)
    del model
    gc.collect()
    return _Expected(request, results, epsilon, layers)


def _reloaded(
    folder: Path, request: dict[str, Tensor], scratch: Path, options: dict[str, Any]
) -> dict[str, Tensor] | str:
    """What a fresh process computes, or why it failed."""
    save_file(request, scratch / "request")
    script = Path(__file__).with_name("reloading.py")
    arguments = [str(folder.resolve()), str(scratch / "request"), str(scratch / "result")]
    told = json.dumps({**options, "threads": torch.get_num_threads()})
    environment = os.environ | {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(script), *arguments, told]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"the process ended with exit code {done.returncode}"
    result: dict[str, Tensor] = load_file(scratch / "result")
    return result


def _compared(verification: Verification, expected: _Expected, got: dict[str, Tensor], epsilon: float) -> Verification:
    difference, largest, same, tokens = 0.0, 0.0, 0, 0
    for name in expected.request:
        a, b = expected.results[name], got[name]
        if a.shape != b.shape:
            shapes = f"logits of shape {tuple(b.shape)}, the original's have {tuple(a.shape)}"
            return replace(verification, failure=shapes)
        gap = (a - b).abs().max().item()
        difference = max(difference, gap if math.isfinite(gap) else math.inf)
        largest = max(largest, a.abs().max().item())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        tokens += a.shape[1]
    tolerance = epsilon * math.sqrt(expected.layers) * largest
    return replace(
        verification,
        tokens=tokens,
        difference=difference,
        tolerance=tolerance,
        top_1=same / tokens,
        generated=expected.results["generated"].shape[1],
        same_generation=_same_generation(expected.results, got, tolerance),
    )


def _same_generation(expected: dict[str, Tensor], got: dict[str, Tensor], tolerance: float) -> bool:
    a, b = expected["generated"][0].tolist(), got["generated"][0].tolist()
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
    if at is None:
        return len(a) == len(b)
    logits = expected["steps"][0, at]
    return (logits[a[at]] - logits[b[at]]).item() <= tolerance
