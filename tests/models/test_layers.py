"""Finding MoE layers by their interface."""

from __future__ import annotations

import pytest
import torch
from tiny_families import tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moeopt.errors import ModelError
from moeopt.models import is_dense, materialised, moe_layers, shape_of
from moeopt.plan import ModelShape


def test_layers_of_a_mixtral(make_mixtral):
    model = make_mixtral(layers=2, experts=5, k=3)
    layers = moe_layers(model)
    assert [(x.index, x.name, x.n, x.k) for x in layers] == [(i, f"model.layers.{i}.mlp", 5, 3) for i in range(2)]
    assert layers[1].router is model.model.layers[1].mlp.gate
    assert shape_of(model) == ModelShape(2, 5, 3)


def test_layers_are_found_without_weights(make_mixtral):
    model = make_mixtral().to("meta")
    assert shape_of(model) == ModelShape(3, 8, 2)
    with pytest.raises(ModelError, match="weights are not loaded"):
        materialised(model, "model.layers.0.mlp.gate.weight")


def test_a_dense_model_is_refused():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM is a dense model"):
        moe_layers(LlamaForCausalLM(config))


class Block(nn.Module):
    def __init__(self, router: nn.Module | None, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = router, experts


class Experts(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.own = nn.ParameterList()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(nn.Linear(4, 3), nn.ModuleList([nn.Linear(4, 4)] * 3)), "experts are a ModuleList"),
        (Block(None, Experts((3, 4, 4))), "no router module under .gate or .router"),
        (Block(nn.Linear(4, 3), Experts((3, 4, 4), (2, 4, 4))), "one common first dimension"),
        (Block(nn.Linear(4, 3), Experts((3, 4, 4))), "must return .*logits"),
        (Block(nn.Linear(4, 2), Experts((3, 4, 4))), r"must hold one \(3, hidden\) weight"),
        (Block(nn.Bilinear(4, 3, 3), Experts((3, 4, 4))), r"must hold one \(3, hidden\) weight"),
    ],
)
def test_the_missing_part_of_the_interface_is_named(block, message):
    with pytest.raises(ModelError, match=message):
        moe_layers(nn.Sequential(block))


def test_layers_of_different_size_have_no_shape(make_mixtral):
    model, other = make_mixtral(layers=2), make_mixtral(layers=2, experts=4)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(ModelError, match=r"layers\.0\.mlp has 8 experts, top-2, but model\.layers\.1\.mlp has 4"):
        shape_of(model)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("doge", r"has experts by its config \(num_experts = 16\), but none that moeopt can use"),
        ("deepseek_v4", "layers of experts that moeopt cannot use beside others.*input_ids"),
        ("ernie4_5_vl_moe", "several pools of experts in a layer .*text_moe, .*vision_moe"),
    ],
)
def test_what_holds_other_experts_too_is_refused_and_not_called_dense(model_type, message):
    model = tiny_model(model_type)
    assert not is_dense(model)
    with pytest.raises(ModelError, match=message):
        moe_layers(model)
