"""Code that a checkpoint brings runs only when it is moeopt's own or trusted, by whatever way it is loaded."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeopt
from moeopt.cli import main
from moeopt.errors import ExportError, ModelError, MoeoptError
from moeopt.exporting import verify
from moeopt.models import check_checkpoint, empty_model, load_model, load_tokenizer
from moeopt.plan import LayerPlan, Plan

Change = Callable[[Path, str], None]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with W_RM on probabilities, which is a custom checkpoint."""
    identity = np.eye(8, dtype=np.float32)[:4]
    plan = Plan((LayerPlan(8, 2, w_em=identity, w_rm=identity + 0.01, router="prob"),) * 6)
    return moeopt.export(plan, tmp_path_factory.mktemp("honest") / "honest", model=moeopt.demo.MODEL)


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **fields}))


def other_file(folder: Path, code: str) -> None:
    (folder / "other.py").write_text(code + (folder / "modeling_moeopt.py").read_text())
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    change_json(folder / "config.json", auto_map={k: v.replace("modeling_moeopt", "other") for k, v in names.items()})


def other_repository(folder: Path, code: str) -> None:
    away = folder.with_name(f"{folder.name}-away")
    shutil.copytree(folder, away)
    prepend(away / "modeling_moeopt.py", code)
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    change_json(folder / "config.json", auto_map={k: f"{away}--{v}" for k, v in names.items()})


def generate(folder: Path, code: str) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{code}def generate(model, **kwargs):\n    return None\n")


def linked_generate(folder: Path, code: str) -> None:
    away = folder.with_name(f"{folder.name}-away")
    away.mkdir()
    generate(away, code)
    (folder / "custom_generate").symlink_to(away / "custom_generate")


def tokenizer(folder: Path, code: str, key: str = "auto_map") -> None:
    (folder / "tok.py").write_text(f"{code}from transformers import PreTrainedTokenizerFast as T\nclass Tok(T): pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Tok"}
    added = json.dumps({"AutoTokenizer": ["tok.Tok", "tok.Tok"]})
    text = json.dumps(settings)[:-1] + f', "{key}": {added}}}'
    (folder / "tokenizer_config.json").write_text(text)


def prepend(file: Path, code: str) -> None:
    file.write_text(code + file.read_text())


def linked(folder: Path, code: str) -> None:
    away = folder.with_name(f"{folder.name}.py")
    away.write_text(code)
    (folder / "modeling_moeopt.py").unlink()
    (folder / "modeling_moeopt.py").symlink_to(away)


def beside(place: str, settings_file: str = "config.json", **settings: Any) -> Change:
    """A file of code, and settings that name it."""

    def change(folder: Path, code: str) -> None:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(code)
        change_json(folder / settings_file, **settings)

    return change


def another_class(folder: Path, code: str) -> None:
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    change_json(folder / "config.json", auto_map=names | {"AutoModel": names["AutoModelForCausalLM"]})


def settings(file: str, **fields: Any) -> Change:
    return lambda folder, code: change_json(folder / file, **fields)


WAYS: dict[str, Change] = {
    "changed": lambda folder, code: prepend(folder / "modeling_moeopt.py", code),
    "linked": linked,
    "other file": other_file,
    "other repository": other_repository,
    "custom_generate": generate,
    "custom_generate that is a link": linked_generate,
    "tokenizer": tokenizer,
    "tokenizer, escaped": lambda folder, code: tokenizer(folder, code, "auto\\u005fmap"),
    "processor": beside("proc.py", "processor_config.json", auto_map={"AutoProcessor": "proc.P"}),
    "file beside": beside("deep/x.py"),
    "nested": beside("n.txt", text_config={"auto_map": {"AutoConfig": "n.C"}, "model_type": "n"}),
    "another class": another_class,
    "settings of generation": settings("generation_config.json", custom_generate="someone/else"),
    "kernels": settings("config.json", _attn_implementation="someone/else:f"),
    "kernels of a part": settings("config.json", experts_implementation={"": "someone/else"}),
    "adapter": settings("adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA"),
    "a family that there is none of": settings("config.json", model_type="moeopt_../x"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_entry_point_refuses_code_that_is_not_moeopts(way: str, honest: Path, tmp_path: Path) -> None:
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(honest, evil)
    WAYS[way](evil, f"open({str(ran)!r}, 'w').close()\n")
    for enter in (moeopt.load, check_checkpoint, empty_model, load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"brings code \(.*trust_remote_code=True, or --trust-remote-code"):
            enter(evil)
    with pytest.raises(ExportError, match=r"brings code \("):
        verify(evil)
    with pytest.raises(MoeoptError):
        moeopt.export(Plan.one_hot([[0, 1]] * 6, experts=4, k=2), tmp_path / "out", model=evil)
    assert not ran.exists()


def test_so_do_the_commands(
    honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evil, ran, rows = tmp_path / "evil", tmp_path / "ran", tmp_path / "rows.jsonl"
    shutil.copytree(honest, evil)
    WAYS["changed"](evil, f"open({str(ran)!r}, 'w').close()\n")
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}", "options": ["a", "b"], "answer": 0}) + "\n" for i in range(9))
    )
    task = ["--task", "multiple_choice", "--data", str(rows)]
    storage = ["--storage", f"sqlite:///{tmp_path / 's.db'}", "--study", "s"]
    for command in (
        ["search", str(evil), *task, *storage, "--keep", "2", "--trials", "1"],
        ["compare-methods", str(evil), *task, "--keep", "2"],
        ["profile", str(evil), "--batch", "1"],
        ["verify", str(evil)],
    ):
        assert main(command) == 2, command
        assert "brings code (modeling_moeopt.py) that is not, byte" in " ".join(capsys.readouterr().err.split())
    assert not ran.exists()


def test_moeopts_own_code_needs_no_trust_and_is_moeopts_own_copy(honest: Path, tmp_path: Path) -> None:
    model, loaded = moeopt.load(honest)
    assert type(model).__module__ == "moeopt_custom.mixtral.modeling_moeopt"
    assert loaded("ab").input_ids
    assert load_model(honest, trust_remote_code=True).__class__.__module__.startswith("transformers_modules")


@pytest.mark.slow
def test_a_family_of_transformers_loads_without_the_code_beside_it(tmp_path: Path) -> None:
    """As DeepSeek's checkpoints do, which bring theirs; trusted, it runs."""
    folder, ran = tmp_path / "full", tmp_path / "ran"
    shutil.copytree(moeopt.demo.MODEL, folder)
    generate(folder, f"open({str(ran)!r}, 'w').close()\n")
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import MixtralForCausalLM\n"
        "class Own(MixtralForCausalLM):\n    pass\n"
    )
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    model, _ = moeopt.load(folder)
    assert type(model).__name__ == "MixtralForCausalLM"
    with pytest.warns(UserWarning, match=r"left behind: custom_generate/ and own\.py"):
        out = moeopt.export(Plan.one_hot([[0, 1]] * 6, experts=8, k=2), tmp_path / "out", model=folder)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert verify(out, sequences=1, length=8, new_tokens=2).ok
    assert not ran.exists()
    assert type(load_model(folder, trust_remote_code=True)).__name__ == "Own"
    assert ran.exists()


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "deep/x.safetensors", "..", ""])
def test_shards_outside_of_the_folder_are_refused(index: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(moeopt.demo.MODEL, folder)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))
    for enter in (moeopt.load, load_model, check_checkpoint):
        with pytest.raises(ModelError, match="names weight files outside of its folder"):
            enter(folder)
    with pytest.raises(ExportError, match="names weight files outside of its folder"):
        moeopt.export(Plan.one_hot([[0, 1]] * 6, experts=8, k=2), tmp_path / "out", model=folder)


ABSURD = (
    "num_hidden_layers", "num_local_experts", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size",
    "intermediate_size", "head_dim", "num_labels", "num_nextn_predict_layers",
)  # fmt: skip


@pytest.mark.parametrize("value", [10**9, 10**30])
@pytest.mark.parametrize("field", ABSURD)
def test_absurd_numbers_are_refused_at_once(field: str, value: int, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(moeopt.demo.MODEL, folder)
    change_json(folder / "config.json", **{field: value})
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ModelError) as caught:
        moeopt.load(folder)
    peak, spent = tracemalloc.get_traced_memory()[1], time.process_time() - began
    tracemalloc.stop()
    assert str(caught.value).count(str(folder)) >= 1
    assert "\n" not in str(caught.value)
    assert peak < 64 << 20
    assert spent < 30  # building 10**9 of anything takes hours


def test_a_nested_number_and_one_beyond_the_index_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(moeopt.demo.MODEL, folder)
    change_json(folder / "config.json", vision_config={"num_hidden_layers": 10**9})
    with pytest.raises(ModelError, match=r"says vision_config\.num_hidden_layers = 1000000000, and moeopt takes at mo"):
        moeopt.load(folder)
    change_json(folder / "config.json", vision_config={}, num_hidden_layers=1000)
    with pytest.raises(ModelError, match=r"says num_hidden_layers = 1000, and it holds \d\d\d tensors"):
        moeopt.load(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(("a", "b"), "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    change_json(folder / "config.json", num_hidden_layers=6)
    with pytest.raises(ModelError, match="says num_hidden_layers = 6, and it holds 2 tensors"):
        moeopt.load(folder)


def test_a_model_larger_than_its_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(moeopt.demo.MODEL, folder)
    change_json(folder / "config.json", vocab_size=10**7)
    with pytest.raises(ModelError, match=r"by config\.json they are \d+ parameters, and the files hold \d+ bytes"):
        check_checkpoint(folder)
