"""Fixtures shared by every test: a byte-level tokenizer and random models small enough to build in milliseconds."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from databases import servers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background ignores, and what it starts

VOCAB = 300


@pytest.fixture(params=[pytest.param("sqlite", id="sqlite"), *servers()])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an SQLite file, and that of every server; whoever makes a study there deletes it."""
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else str(request.param)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command that must be refused: exit code 2, nothing on stdout, one line on stderr, which is returned."""
    from moeopt.cli import main

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1, err
        return err

    return run


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


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """2 layers, dense, float32."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


EXPERTS, KEPT = 7, 4
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("num_local_experts", {}),
    "olmoe": ("num_experts", {}),
    "qwen2_moe": ("num_experts", {"shared_expert_intermediate_size": 24, "norm_topk_prob": False}),
    "qwen3_moe": ("num_experts", {"norm_topk_prob": True}),
    "gpt_oss": ("num_local_experts", {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]}),
    "granitemoe": ("num_local_experts", {}),
    "granitemoehybrid": ("num_local_experts", {"layer_types": ["attention"] * 2, "mamba_n_heads": 4}),
    "minimax": ("num_local_experts", {"layer_types": ["full_attention", "full_attention"], "head_dim": 8}),
    "hunyuan_v1_moe": ("num_experts", {"moe_topk": 2, "head_dim": 8}),
    "deepseek_v3": ("n_routed_experts", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16}),
    "ernie4_5_moe": ("moe_num_experts", {"moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1}),
}
LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
CHOOSY: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("n_routed_experts", {"first_k_dense_replace": 0, "head_dim": 8}),
    "dots1": ("n_routed_experts", {"first_k_dense_replace": 0, "head_dim": 8, "n_shared_experts": 1}),
    "deepseek_v2": (
        "n_routed_experts",
        {"first_k_dense_replace": 0, "v_head_dim": 8, "topk_method": "group_limited_greedy", **LATENT},
    ),
}
"""More families whose routers correct the choice by a bias, or choose groups of experts first."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(
    family: str,
    experts: int = EXPERTS,
    *,
    dtype: torch.dtype = torch.float32,
    corrected: bool = False,
    vocabulary: int = 96,
    groups: int = 1,
) -> Any:
    field, extra = (FAMILIES | CHOOSY)[family]
    extra = extra | {"n_group": groups, "topk_group": -(-groups // 2)}
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "initializer_range": 0.3,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            field: experts,
        }
        | extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("router.bias") or (corrected and "correction_bias" in name):
                nn.init.normal_(tensor, std=0.2)
    return model.to(dtype)


@pytest.fixture
def build_family() -> Callable[..., Any]:
    return build


SUMS = """
dataset_path: json
training_split: train
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{a}}+{{b}}="
doc_to_target: "{{gold}}"
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
HARNESS_TASKS = {
    "sums": "",
    "sums_alone": "training_split: null\nvalidation_split: null\n",
    "sums_word": """
output_type: loglikelihood
doc_to_target: "{{choices[gold]}}"
doc_to_choice: null
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "sums_written": """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
doc_to_choice: null
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "sums_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{a}}+{{b}}={{choices[gold]}}"
doc_to_choice: null
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "sums_two_prompts": """
doc_to_text: "{{gold}}"
doc_to_target: "!"
doc_to_choice: "{{[a ~ '+' ~ b ~ '=' ~ choices[0], a ~ '+' ~ b ~ '=' ~ choices[1]]}}"
""",
}


@pytest.fixture(scope="session")
def harness_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks of lm-evaluation-harness, one of each kind, on sums; 24 train, 10 validation and 40 test."""
    folder = tmp_path_factory.mktemp("harness")
    first = 0
    for split, count in (("train", 24), ("validation", 10), ("test", 40)):
        rows = [
            {"a": i, "b": i % 5, "gold": i % 2, "choices": [str(i + i % 5 + i % 2), f"{i + i % 5 + 1 - i % 2}"]}
            for i in range(first, first + count)
        ]
        first += count
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    (folder / "base").write_text(SUMS + f"dataset_kwargs: {json.dumps({'data_files': files})}\n")
    for name, more in HARNESS_TASKS.items():
        (folder / f"{name}.yaml").write_text(f"include: base\ntask: {name}\n{more}")
    (folder / "all.yaml").write_text(
        "group: all_sums\ntask: [sums, sums_two_prompts]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


SLOW = """
import os, time
from pathlib import Path
from moeopt.tasks import Example, MultipleChoiceTask

class Slow(MultipleChoiceTask):
    def __init__(self):
        super().__init__("slow", [Example(str(i), f"{i} is", (" a", " b"), i % 2) for i in range(8)])

    def reduce(self, *arguments):
        here = Path(__file__)
        while here.with_name("hold").exists():
            here.with_name(f"held.{os.getpid()}").touch()
            time.sleep(0.05)
        return super().reduce(*arguments)
"""


@pytest.fixture(scope="session")
def slow_task() -> str:
    """A Python file with a task, `Slow`: while a file `hold` is beside it, a trial waits and says so by `held.PID`."""
    return SLOW
