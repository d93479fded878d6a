"""Loading checkpoints, and naming models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moeopt.errors import ModelError
from moeopt.models import check_checkpoint, describe, fingerprint, load, patched
from moeopt.plan import ModelShape, Plan


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    path = tmp_path / "checkpoint"
    tiny_model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def test_a_saved_model_is_loaded_as_it_was(folder, tiny_model, ids):
    assert check_checkpoint(folder) == ModelShape(2, 4, 2)
    model, tokenizer = load(folder)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(ids).logits)
    assert tokenizer.decode(tokenizer("ab").input_ids, skip_special_tokens=True) == "ab"
    assert fingerprint(model) == fingerprint(tiny_model)


def test_options_reach_transformers(folder):
    model, _ = load(str(folder), dtype=torch.bfloat16, experts_implementation="eager", device_map={"": "cpu"})
    assert model.dtype == torch.bfloat16
    assert model.config._experts_implementation == "eager"


def test_disk_offload_through_load(folder, tmp_path, tiny_model, ids):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model, _ = load(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    plan = Plan.one_hot([[0, 2], [1, 3]], experts=4, k=2)
    with torch.no_grad(), patched(model, plan), patched(tiny_model, plan):
        assert torch.equal(model(ids).logits, tiny_model(ids).logits)


def test_a_missing_tensor_is_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "layers.1" in name and "gate" in name)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks tensors .*: model\.layers\.1\.mlp\.gate\.weight"):
        load(folder)


def test_tied_weights_are_not_missed(tmp_path, make_mixtral, tiny_tokenizer):
    make_mixtral(layers=1, tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)


def test_a_checkpoint_without_whole_weights_or_tokenizer_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"weights of .* cannot be loaded"):
        load(folder)
    file.unlink()
    with pytest.raises(ModelError, match=r"weights of .* cannot be loaded"):
        load(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(folder)


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path):
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaForCausalLM is a dense model"):
        load(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint folder at"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config of"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match=r"config of .* cannot be used"):
        load(tmp_path)
    for field, value, reason in (("num_experts_per_tok", "two", "expected int, got str"), ("vocab_size", -3, "-3")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", field: value}))
        with pytest.raises(ModelError, match=reason):
            load(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        load(tmp_path / "config.json")


def test_a_hub_model_that_cannot_be_had_is_refused():
    with pytest.raises(ModelError, match="cannot be had from the hub"):
        check_checkpoint("moeopt-tests/nonesuch", local_files_only=True)


def test_fingerprints_tell_models_apart(make_mixtral):
    model = make_mixtral()
    first = fingerprint(model)
    assert first == fingerprint(make_mixtral())
    assert first != fingerprint(make_mixtral(seed=1))
    assert first != fingerprint(make_mixtral(dtype=torch.bfloat16))
    assert first != fingerprint(make_mixtral(rms_norm_eps=1e-4))
    model.config._name_or_path = "elsewhere"
    model.set_experts_implementation("eager")
    assert first == fingerprint(model)
    with patched(model, Plan.one_hot([[0, 1]] * 3, experts=8, k=2)):
        assert first == fingerprint(model)
    assert json.loads(json.dumps(describe(model)))["architecture"] == "MixtralForCausalLM"
    assert describe(model)["name_or_path"] == "elsewhere"
