"""Checkpoints that bring their class: searched, exported and verified where it is trusted; else none of it runs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.mixtral import configuration_mixtral, modeling_mixtral

import moeopt
from moeopt.cli import main
from moeopt.errors import ExportError, ModelError
from moeopt.exporting import verify
from moeopt.models import check_checkpoint
from moeopt.plan import LayerPlan, Plan

PRUNED = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)
MERGED = Plan((LayerPlan(6, 2, w_em=np.eye(6)[:3] + 0.1, w_rm=np.eye(6)[:3], router="logit"),) * 3)
CODE = ("configuration_x.py", "modeling_x.py", "sizes_x.py")
FEW: dict[str, Any] = {"sequences": 1, "length": 8, "new_tokens": 2}
UNTRUSTED = r"runs only when it is trusted: trust_remote_code=True, or --trust-remote-code"


@pytest.fixture
def remote(make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A function: a checkpoint of this model type that is a Mixtral by files of its own, which leave a mark, `ran`."""

    def make(model_type: str) -> Path:
        folder, model = tmp_path / "full", make_mixtral(layers=3, experts=6, dtype=torch.bfloat16)
        model.config.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        # of such a class transformers knows no names of tensors but those of its parameters
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        code = [inspect.getsource(module) for module in (configuration_mixtral, modeling_mixtral)]
        for name, text in zip(CODE, [*code, f"open({str(tmp_path / 'ran')!r}, 'w').close()\nSIZES = ()\n"]):
            text = re.sub(r"from \.\.\. import", "from transformers import", text)
            text = re.sub(r"from \.\.\.(\w)", r"from transformers.\1", text).replace(
                ".configuration_mixtral", f".{CODE[0][:-3]}"
            )
            text = re.sub(r"Mixtral(?=Config|ForCausalLM)", "X", text).replace('"mixtral"', repr(model_type))
            (folder / name).write_text(text + ("\nfrom .sizes_x import SIZES\n" if name == CODE[0] else ""))
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
        config |= {"model_type": model_type, "architectures": ["XForCausalLM"], "auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None] * 5 % 250).logits


def task(folder: Path) -> list[str]:
    rows = ({"prompt": f"{i}:", "options": [" a", " b"], "answer": 0} for i in range(9))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", "multiple_choice", "--data", str(folder / "rows.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "plan"), [("own_moe", MERGED), ("mixtral", PRUNED)], ids=["own", "mixtral"])
def test_a_trusted_checkpoint_is_exported_with_its_code(
    remote: Any, tmp_path: Path, model_type: str, plan: Plan
) -> None:
    full, small = remote(model_type), tmp_path / "small"
    model, _ = moeopt.load(full, trust_remote_code=True)
    assert type(model).__module__.endswith("modeling_x")
    with moeopt.patched(model, plan):
        expected = logits(model)
    moeopt.export(plan, small, model=full, trust_remote_code=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True).eval()), expected)
    for name in CODE:
        assert (small / name).read_bytes() == (full / name).read_bytes()
    before, config = (json.loads((folder / "config.json").read_text()) for folder in (full, small))
    assert {key for key in config if config[key] != before.get(key)} <= {
        "num_local_experts",
        "rope_theta",
        "torch_dtype",
    }
    assert config["auto_map"] == before["auto_map"]
    assert (config["num_local_experts"], json.loads((small / "moeopt.json").read_text())["form"]) == (3, "stock")
    assert "trust_remote_code=True" in (small / "README.md").read_text()
    assert verify(small, trust_remote_code=True, **FEW).difference == 0
    (small / CODE[2]).write_text("SIZES = (1,)\n")
    assert verify(small, trust_remote_code=True, **FEW).config == (f"{CODE[2]} is not the original's",)


def test_nothing_of_it_runs_untrusted(remote: Any, tmp_path: Path, refused: Any) -> None:
    full = remote("own_moe")
    PRUNED.save(tmp_path / "plan.safetensors")
    for enter in (moeopt.load, check_checkpoint):
        with pytest.raises(ModelError, match=UNTRUSTED):
            enter(full)
    with pytest.raises(ExportError, match=UNTRUSTED):
        moeopt.export(PRUNED, tmp_path / "small", model=full)
    with pytest.raises(ExportError, match=UNTRUSTED):
        verify(full, model=full, plan=PRUNED)
    plan = ["--plan", str(tmp_path / "plan.safetensors")]
    for command in (
        ["export", str(full), str(tmp_path / "small"), *plan],
        ["verify", str(full), "--model", str(full), *plan],
        ["compare-methods", str(full), "--keep", "3", *task(tmp_path)],
    ):
        assert re.search(UNTRUSTED, refused(command))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "small").exists()


def test_what_has_no_stock_form_is_refused_before_writing(remote: Any, tmp_path: Path) -> None:
    """A space maps logits unless told, as it does where there is no custom form."""
    full = remote("mixtral")
    assert check_checkpoint(full, trust_remote_code=True).router == "logit"
    mixed = Plan((LayerPlan(6, 1, kept=(0, 1)), *PRUNED.layers[1:]))
    with pytest.raises(ExportError, match=r"code of its own, .*--project stock, finds the nearest plan of stock form"):
        moeopt.export(mixed, tmp_path / "small", model=full, trust_remote_code=True)
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_a_search_its_workers_and_its_export_are_told_to_trust(
    remote: Any, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, trust = str(remote("own_moe")), "--trust-remote-code"
    monkeypatch.setenv("MOEOPT_STORAGE", f"sqlite:///{tmp_path / 's.db'}")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    search = ["search", full, *task(tmp_path), "--study", "s", "--keep", "3", "--space", "prune", "--device-map", "cpu"]
    assert re.search(UNTRUSTED, refused([*search, "--trials", "3"]))
    assert not (tmp_path / "ran").exists()
    assert main([*search, "--trials", "3", "--workers", "2", trust]) == 0
    out, err = capsys.readouterr()
    assert f"--study s {trust}" in " ".join(out.split())
    assert "worker 2" not in err
    worker = ["worker", "--study", "s", "--model", full, "--device-map", "cpu", "--trials", "4"]
    assert re.search(UNTRUSTED, refused(worker))
    assert main([*worker, trust]) == 0
    export = ["export", full, str(tmp_path / "small"), "--study", "s"]
    assert re.search(UNTRUSTED, refused(export))
    assert main([*export, trust]) == 0
    assert main(["verify", str(tmp_path / "small"), "--device-map", "cpu", trust]) == 0
