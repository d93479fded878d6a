"""What is copied beside the weights: files of the model, from the checkpoint and nowhere else; and a full disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moeopt
from moeopt.errors import ExportError
from moeopt.exporting.companions import companions
from moeopt.exporting.folders import SOURCE
from moeopt.models.weight_files import INDEX
from moeopt.plan import Plan

PLAN = Plan.one_hot([[0, 1, 2, 3]] * 6, experts=8, k=2)
SECRET = "SECRET"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    shutil.copytree(moeopt.demo.MODEL, tmp_path / "full")
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "chat.jinja").write_text(SECRET)
    return tmp_path / "full"


def leaked(out: Path) -> list[str]:
    return [str(path) for path in out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_only_files_of_the_model_are_copied_and_the_others_are_said(full: Path, tmp_path: Path) -> None:
    ours = [
        "LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json", "chat_template.jinja", "merges.txt",
        "preprocessor_config.json", "processor_config.json", "qwen.tiktoken", "sentencepiece.bpe.model",
        "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json",
        "vocab.txt", "additional_chat_templates/tool.jinja", "tok.py", "helper.py",
    ]  # fmt: skip
    theirs = [
        ".env", "notes.txt", "optimizer.pt", "training_args.bin", "modeling_x.py", "consolidated.safetensors", "id_rsa",
        "trainer_state.json", "params.json", "model.gguf", "additional_chat_templates/x.py",
    ]  # fmt: skip
    (full / "additional_chat_templates").mkdir()
    for name in (*ours, *theirs):
        (full / name).write_text("{}")
    (full / "original").mkdir()
    settings = json.loads((full / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tok.Tok", None], "AutoProcessor": "someone/else--modeling_x.P"}
    (full / "tokenizer_config.json").write_text(json.dumps(settings))
    (full / "tok.py").write_text("from .helper import x\n")
    taken, left = companions(full, [full / "model.safetensors"])
    assert set(taken) == {*ours, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(left) == {*theirs, "original/"}
    with pytest.warns(UserWarning, match=r"files that are not the model's were left behind: .*and \d+ more"):
        out = moeopt.export(PLAN, tmp_path / "out", model=full)
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    made = {"config.json", "model.safetensors", INDEX, "plan.safetensors", "moeopt.json", "README.md", SOURCE}
    assert written == {*taken, *made}
    assert set(json.loads((out / "moeopt.json").read_text())["files_left_out"]) == set(left)


def test_links_out_of_the_checkpoint_are_not_followed(full: Path, tmp_path: Path) -> None:
    (full / "notes.txt").symlink_to(tmp_path / "secret")
    (full / "LICENSE").symlink_to(tmp_path / "secret")
    (full / "vocab.txt").symlink_to("../secret")
    (full / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    (full / "merges.txt").symlink_to("merges.txt")
    (full / "vocab.json").symlink_to("a.json")
    (full / "a.json").symlink_to("vocab.json")
    (full / "chat_template.jinja").symlink_to(tmp_path / "secrets")
    (full / "added_tokens.json").symlink_to("tokenizer_config.json")
    os.mkfifo(full / "special_tokens_map.json")
    with pytest.warns(UserWarning, match="left behind"):
        out = moeopt.export(PLAN, tmp_path / "out", model=full)
    assert leaked(out) == []
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert (out / "added_tokens.json").read_bytes() == (full / "tokenizer_config.json").read_bytes()
    assert {p.name for p in out.iterdir()} == {
        "added_tokens.json", "config.json", "generation_config.json", "model.safetensors", INDEX, "moeopt.json",
        "plan.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json", SOURCE,
    }  # fmt: skip
    (full / "additional_chat_templates").unlink()
    (full / "additional_chat_templates").mkdir()
    (full / "additional_chat_templates" / "chat.jinja").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=r"additional_chat_templates/chat\.jinja"):
        assert leaked(moeopt.export(PLAN, tmp_path / "again", model=full)) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_export_needs_must_lie_in_the_checkpoint(name: str, full: Path, tmp_path: Path) -> None:
    (full / name).rename(tmp_path / name)
    (full / name).symlink_to(tmp_path / name)
    with pytest.raises(
        ExportError, match=rf"{name}' is a link out of the checkpoint, to .*; put the file itself there"
    ):
        moeopt.export(PLAN, tmp_path / "out", model=full)
    (full / name).unlink()
    (full / name).symlink_to(name)
    with pytest.raises(ExportError, match=r"has no config\.json|holds neither"):
        moeopt.export(PLAN, tmp_path / "out", model=full)
    (full / name).unlink()
    os.mkfifo(full / name)
    with pytest.raises(ExportError, match=r"has no config\.json|holds neither"):
        moeopt.export(PLAN, tmp_path / "out", model=full)
    assert not (tmp_path / "out").exists()


def test_a_linked_shard_is_refused_and_a_link_within_is_not(full: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(full / "model.safetensors", "pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "shard.safetensors")}
    (full / "model.safetensors.index.json").write_text(json.dumps(index))
    (full / "deep").mkdir()
    (full / "model.safetensors").rename(full / "deep" / "weights")
    (full / "shard.safetensors").symlink_to("deep/weights")
    with pytest.warns(UserWarning, match="left behind: deep/"):
        moeopt.export(PLAN, tmp_path / "out", model=full)
    (full / "deep" / "weights").rename(tmp_path / "weights")
    (full / "shard.safetensors").unlink()
    (full / "shard.safetensors").symlink_to("../weights")
    with pytest.raises(ExportError, match=r"shard\.safetensors' is a link out of the checkpoint"):
        moeopt.export(PLAN, tmp_path / "other", model=full)


def test_the_hubs_cache_and_a_checkpoint_that_is_a_link_itself_are_read(full: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0f1e", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(full.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    (snapshot / "LICENSE").symlink_to("../../../../secret")
    (tmp_path / "cached").symlink_to(snapshot)
    for name, model in (("one", snapshot), ("two", tmp_path / "cached")):
        with pytest.warns(UserWarning, match="left behind: LICENSE"):
            out = moeopt.export(PLAN, tmp_path / name, model=model)
        assert leaked(out) == []
        assert (out / "tokenizer.json").is_file()
        assert not (out / "tokenizer.json").is_symlink()


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    with pytest.raises(
        ExportError, match=r"cannot write '.*/out': it takes 3\.\d\d MiB, and the disk of .* 3\.00 MiB free"
    ):
        moeopt.export(PLAN, tmp_path / "out", model=full)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "file", "size"),
    [(500_000, "model-00001-of-00004.safetensors", "984824 bytes"), (5_000, "tokenizer.json", "5774 bytes")],
)
def test_a_disk_that_fills_up_is_one_error_that_names_the_file_and_its_size(
    limit: int, file: str, size: str, full: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: the system's own error, at the first file beyond it."""
    PLAN.save(tmp_path / "plan")
    script = f"""
import resource, moeopt
from moeopt.exporting import exporter
from moeopt.errors import ExportError
if {limit} < 10_000:
    exporter.write_weights = lambda *_: None
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    moeopt.export(moeopt.Plan.load("plan"), "out", model="full", shard_bytes=1_000_000)
except ExportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = done.stdout.strip()
    assert said.startswith(f"cannot write {file}: it takes {size}, and the disk of {str(tmp_path)!r} has "), said
    assert "free (File too large)" in said
    assert {path.name for path in tmp_path.iterdir()} == {"full", "plan", "secret", "secrets"}


def test_the_command_says_what_was_left_out(full: Path, tmp_path: Path, capsys: Any) -> None:
    from moeopt.cli import main

    (full / "notes.txt").write_text("x")
    PLAN.save(tmp_path / "plan")
    assert main(["export", str(full), str(tmp_path / "out"), "--plan", str(tmp_path / "plan")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("files that are not the model's were left behind: notes.txt") == 1
    assert "UserWarning" not in said
