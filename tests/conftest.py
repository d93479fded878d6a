"""Fixtures shared by every test: a byte-level tokenizer and random Mixtrals small enough to build in milliseconds."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

VOCAB = 300


class MakeMixtral(Protocol):
    def __call__(
        self,
        layers: int = 3,
        experts: int = 8,
        k: int = 2,
        hidden: int = 32,
        intermediate: int = 48,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> MixtralForCausalLM: ...


def build_mixtral(
    layers: int = 3,
    experts: int = 8,
    k: int = 2,
    hidden: int = 32,
    intermediate: int = 48,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> MixtralForCausalLM:
    """A random Mixtral in eval mode, on the CPU; `config` overrides any field of `MixtralConfig`."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": experts,
        "num_experts_per_tok": k,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": dtype,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(MixtralConfig(**(settings | config))).to(dtype).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (256), then <s> (256, put before every text) and </s> (257); no pad token, as in Mixtral."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_mixtral() -> MakeMixtral:
    """A factory; every call builds a new model, so that a test may change its weights."""
    return build_mixtral


@pytest.fixture
def tiny_model() -> MixtralForCausalLM:
    """2 layers, 4 experts, top-2, float32."""
    return build_mixtral(layers=2, experts=4)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
