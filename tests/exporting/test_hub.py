"""Exports on the hub, of which a small one runs here: what arrives, what is refused before, and what loads again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from fake_hub import READER, WRITER, Hub
from huggingface_hub import ModelCard, constants

import moeopt
from moeopt.cli import main
from moeopt.errors import ExportError, ModelError
from moeopt.exporting import push
from moeopt.exporting.folders import SOURCE
from moeopt.models.gate import CODE
from moeopt.plan import Plan

STOCK = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)
IDS = torch.arange(3, 43)[None] * 5 % 250


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_DISABLE_XET set in a process that starts."""
    made = Hub()
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield made
    made.shutdown()
    made.server_close()


def sent(folder: Path) -> dict[str, bytes]:
    """What shall arrive of a folder."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    del files[SOURCE]
    return files


def computed(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", ["stock", "custom"])
def test_what_is_pushed_arrives_and_loads(form: Any, full: Any, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "full" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The full model\n")
    small = moeopt.export(STOCK, tmp_path / "small", model=full, form=form, base_model="org/full")
    place = push(small, "small", private=True, commit_message="first")
    repository = hub.repositories["me/small"]
    assert place == f"{hub.url}/me/small/commit/{repository.branches['main']}"
    assert repository.private
    assert repository.messages[-1] == "first"
    arrived = repository.files()
    assert {name: data for name, data in arrived.items() if name != ".gitattributes"} == sent(small)
    assert (CODE in arrived) == (form == "custom")
    assert b"# The full model" in arrived["BASE_MODEL_CARD.md"]
    assert str(tmp_path).encode() not in b"".join(arrived.values())
    card = ModelCard(arrived["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/full")

    expected, tokens = computed(moeopt.load(small)[0]), moeopt.load(small)[1]("abc").input_ids
    loaded, tokenizer = moeopt.load("me/small")
    assert torch.equal(computed(loaded), expected)
    assert tokenizer("abc").input_ids == tokens
    trust = {"trust_remote_code": form == "custom"}
    anyone = transformers.AutoModelForCausalLM.from_pretrained("me/small", dtype="auto", **trust).eval()
    assert torch.equal(computed(anyone), expected)
    if form == "custom":
        (small / CODE).write_text("# not what moeopt ships\n" + (small / CODE).read_text())
        hub.hold("me/other", small)
        with pytest.raises(ModelError, match=r"brings code \(modeling_moeopt\.py\) that is not, byte for byte"):
            moeopt.load("me/other")


def test_a_revision_stays_what_it_was(full: Any, hub: Hub, tmp_path: Path) -> None:
    base = hub.hold("org/full", tmp_path / "full")
    small = moeopt.export(STOCK, tmp_path / "small", model=full, shard_bytes=100_000)
    push(small, "me/small")
    first = hub.repositories["me/small"].branches["main"]
    before = computed(moeopt.load("me/small")[0])
    other = moeopt.export(Plan.one_hot([[0, 1]] * 3, experts=6, k=2), tmp_path / "other", model=full)
    push(other, "me/small", revision="two")
    assert hub.repositories["me/small"].branches["main"] == first
    push(other, "me/small")
    kept = {name for name in hub.repositories["me/small"].files() if name.endswith(".safetensors")}
    assert kept == {"model.safetensors", "plan.safetensors"}
    for revision, experts in {None: 2, "two": 2, first: 3}.items():
        assert moeopt.load("me/small", revision=revision)[0].config.num_local_experts == experts
    assert torch.equal(computed(moeopt.load("me/small", revision=first)[0]), before)

    hub.hold("org/full", other)  # main is another model now
    again = moeopt.export(STOCK, tmp_path / "again", model=moeopt.load("org/full", revision=base)[0])
    record = json.loads((again / "moeopt.json").read_text())
    assert (record["base_model"], record["base_revision"]) == ("org/full", base)
    assert (again / "model.safetensors").stat().st_size == sum(
        file.stat().st_size for file in small.glob("model*.safetensors")
    ) - headers(small) + headers(again)


def headers(folder: Path) -> int:
    """Bytes of the headers of a checkpoint's weight files."""
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("model*.safetensors"))


def test_what_would_stop_a_push_is_said_before_the_export(
    full: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    STOCK.save(tmp_path / "plan.safetensors")
    hub.hold("me/open", tmp_path / "full")
    out = tmp_path / "small"
    export = ["export", str(tmp_path / "full"), str(out), "--plan", str(tmp_path / "plan.safetensors")]

    def told(name: str, *options: str) -> str:
        return refused([*export, "--push-to-hub", name, *options])

    assert "'a b/c' is no name of a repository" in told("a b/c")
    assert "is there and public: make it private" in told("me/open", "--private")
    assert "the token may not write there (403" in told("org/small")
    assert "go with --push-to-hub" in refused([*export, "--private"])
    assert "base_model must be the id of a model on the hub" in refused([*export, "--base-model", "a b"])
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "the token may not write there (403" in told("me/open")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = told("me/open")
    assert "the token is not valid (401" in message
    assert "hf_wrong" not in message
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot push to 'me/open'" in told("me/open")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "log in with `hf auth login`, or set HF_TOKEN" in told("me/open")
    assert not out.exists()
    assert set(hub.repositories) == {"me/open"}
    with pytest.raises(ExportError, match=r"is nothing that moeopt export wrote: it has no moeopt\.json"):
        push(tmp_path / "full", "me/open")


def test_an_upload_that_fails_leaves_the_export_and_goes_on(
    full: Any, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = moeopt.export(STOCK, tmp_path / "small", model=full, shard_bytes=100_000)
    weights = sorted(small.glob("*.safetensors"))
    hub.broken = r"POST /api/models/.*/commit"
    with pytest.raises(ExportError, match=r"is whole, and not all of it on the hub; to go on: moeopt push") as error:
        push(small, "me/small", private=True, revision="two")
    assert sum(asked.startswith("PUT") for asked in hub.requests) == len(weights)
    hub.broken, command = None, str(error.value).split("to go on: moeopt ")[1].split(": ")[0]
    assert main(command.split()) == 0
    assert f"pushed {small}: {hub.url}/me/small/commit/" in capsys.readouterr().out
    assert sum(asked.startswith("PUT") for asked in hub.requests) == len(weights)
    files = hub.repositories["me/small"].files("two")
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == sent(small)


@pytest.mark.slow
def test_a_model_of_the_hub_is_searched_exported_pushed_and_verified(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export in a process that knows the hub by its environment alone."""
    base = hub.hold("org/demo", moeopt.demo.MODEL)
    monkeypatch.setenv("MOEOPT_STORAGE", f"sqlite:///{tmp_path}/s.db")
    rows = [{"prompt": f"{i}+1=", "options": [str(i + 1), str(i + 2)], "answer": 0} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ["org/demo", "--task", "multiple_choice", "--data", str(tmp_path / "rows.jsonl"), "--study", "s"]
    assert main(["search", *task, "--trials", "3", "--sampler", "random", "--keep", "4"]) == 0
    assert main(["select", *task, "--top", "2"]) == 0
    options = ["--study", "s", "--trial", "selected", "--form", "custom", "--push-to-hub", "me/small"]
    cache = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "moeopt", "export", "org/demo", "small", *options], cwd=tmp_path, text=True, check=True,
        env=os.environ | cache | {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert f"pushed: {hub.url}/me/small/commit/" in done.stdout
    arrived = hub.repositories["me/small"].files()
    assert {name: data for name, data in arrived.items() if name != ".gitattributes"} == sent(tmp_path / "small")
    assert str(tmp_path).encode() not in b"".join(arrived.values())
    card = ModelCard(arrived["README.md"].decode())
    assert card.data.base_model == "org/demo"
    assert f"revision `{base}`" in card.text
    assert "$ moeopt search org/demo --task multiple_choice --data rows.jsonl --study s --trials 3" in card.text
    assert card.data.eval_results[0].dataset_split == "test"
    (tmp_path / "small" / SOURCE).unlink()
    hub.hold("org/demo", tmp_path / "small")  # main is another model now
    capsys.readouterr()
    assert main(["verify", "me/small", "--sequences", "1", "--new-tokens", "2"]) == 0
    assert "verified        yes" in capsys.readouterr().out
