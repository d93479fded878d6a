"""Whether what export writes is what servers read: pruned and merged tiny models of five families.

    python benchmarks/served.py --llama-cpp DIR

* **llama.cpp**: its own converter makes GGUF of the full checkpoint and of the export. Metadata must be the export's,
  every tensor of the small file the kept rows of the full one's (or, merged, their sums), and no name missing or new.
  With llama-cpp-python installed the small file is run as well, and its logits held against those of transformers.
* **vLLM, SGLang**: neither runs here. What their loaders make of names and shapes is restated below from their public
  source: every place of a MoE layer's parameters must be filled once, by a tensor of its shape, and no tensor be left.

DIR is a copy of llama.cpp (github.com/ggml-org/llama.cpp), whose converter needs `gguf`, which lies in it; without it
the first columns are not run. Vocabularies are not what is tried: the converter is told that all are GPT-2's.

With llama.cpp as in llama-cpp-python 0.3.36, transformers 5.23, and the rules of vLLM 0.33 and SGLang 0.5.23:

| family | plan | llama.cpp converts | llama.cpp runs | vLLM | SGLang |
|---|---|---|---|---|---|
| mixtral | pruned | yes | logits within 7e-07 (full model 7e-07) | yes | yes |
| mixtral | merged | yes | logits within 8e-07 (full model 7e-07) | yes | yes |
| qwen3_moe | pruned | yes | logits within 8e-07 (full model 6e-07) | yes | yes |
| qwen3_moe | merged | yes | logits within 7e-07 (full model 6e-07) | yes | yes |
| gpt_oss | pruned | yes | logits within 3e-03 (full model 6e-03) | yes | yes |
| gpt_oss | merged | yes | logits within 4e-03 (full model 6e-03) | yes | yes |
| glm4_moe | pruned | yes | logits within 7e-07 (full model 8e-07) | yes | yes |
| glm4_moe | merged | yes | logits within 6e-07 (full model 8e-07) | yes | yes |
| deepseek_v3 | pruned | yes | logits within 8e-07 (full model 1e-06) | yes | yes |
| deepseek_v3 | merged | yes | logits within 6e-07 (full model 1e-06) | yes | yes |

Differences are parts of the largest logit; those of gpt-oss are as large in the full model.
Two limits of llama.cpp were seen: Qwen3-MoE whose top-k is not renormalised, which no release is, is renormalised all
the same; and DeepSeek-V3 whose config.json has no `scoring_func`, as where transformers saved it, takes a softmax.
Export writes that key, and says 0 of prediction blocks that are not there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import moeopt
from moeopt.models import load_model, shape_of
from moeopt.plan import Plan
from moeopt.spaces import MergeSpace, PruneSpace

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3")
KEEP = 4
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
SERVERS = ("vLLM", "SGLang")
RELEASED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},  # llama.cpp knows of nothing else
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},  # without them llama.cpp takes a softmax
}
"""What the configurations of releases say, and transformers' defaults do not."""


@dataclass(frozen=True)
class Case:
    """A full checkpoint, a plan, and what export made of them."""

    family: str
    kind: str
    plan: Plan
    full: Path
    small: Path


# What is served -----------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one merge, as a GGUF must have one."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<s>", "</s>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def write_full(family: str, folder: Path) -> None:
    """A full checkpoint as it is released: GLM-4.5 and DeepSeek-V3 with a block for multi-token prediction."""
    model = tiny_model(family)
    for name, value in RELEASED.get(family, {}).items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if not getattr(model.config, "num_nextn_predict_layers", 0):
        return
    tensors, layers, hidden = load_file(folder / "model.safetensors"), model.config.num_hidden_layers, 32
    last, block = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    tensors |= {name.replace(last, block): t.clone() for name, t in tensors.items() if name.startswith(last)}
    tensors[f"{block}eh_proj.weight"] = torch.zeros(hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{block}{norm}.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cases(family: str, folder: Path) -> list[Case]:
    """The family pruned, and merged with a W_RM on the logits."""
    full, made = folder / family, []
    write_full(family, full)
    shape = shape_of(load_model(full))
    space = PruneSpace(shape, keep=KEEP)
    pruned = space.decode(space.sample(np.random.default_rng(1)))
    around = MergeSpace(shape, around=pruned, router="logit")
    for kind, plan in (("pruned", pruned), ("merged", around.decode(around.sample(np.random.default_rng(2))))):
        small = folder / f"{family}-{kind}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the prediction block was left out
            moeopt.export(plan, small, model=full, form="stock")
        made.append(Case(family, kind, plan, full, small))
    return made


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


# llama.cpp ----------------------------------------------------------------------------------------------------------

CONVERT = """
import sys
folders = sys.argv[2:]
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf as program
from conversion.base import TextModel

classes = program.get_model_class
def with_vocabulary(*given, **options):
    model = classes(*given, **options)
    model.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    model.set_vocab = TextModel._set_vocab_gpt2
    return model

program.get_model_class = with_vocabulary
for folder in folders:
    sys.argv = ["convert", folder, "--outtype", "f32", "--outfile", folder + ".gguf"]
    program.main()
"""
"""Runs the converter on folders; a tiny tokenizer is none that it knows by its hash."""


def convert(folders: Iterable[Path], llama_cpp: Path) -> str | None:
    """Make a GGUF file, float32, of every checkpoint beside its folder; the converter's last line where it does not."""
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"the converter ended with {done.stderr.strip().splitlines()[-1]!r}" if done.returncode else None


def read_gguf(folder: Path, llama_cpp: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata without the architecture in front, and tensors, outermost axis first."""
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    import gguf  # type: ignore[import-not-found]

    reader = gguf.GGUFReader(f"{folder}.gguf")
    architecture = reader.fields["general.architecture"].contents()
    fields = {name.removeprefix(f"{architecture}."): field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def wrong_in_gguf(case: Case, llama_cpp: Path) -> list[str]:
    """What llama.cpp would read otherwise than the plan says."""
    (was, full), (fields, small) = (read_gguf(folder, llama_cpp) for folder in (case.full, case.small))
    text = json.loads((case.small / "config.json").read_text())
    expected = {
        "expert_count": KEEP,
        "expert_used_count": case.plan.layers[0].k,
        "block_count": text["num_hidden_layers"],
        "expert_group_count": text.get("n_group"),
        "expert_group_used_count": text.get("topk_group"),
        "leading_dense_block_count": text.get("first_k_dense_replace"),
        "nextn_predict_layers": None,
    }
    wrong = [
        f"{name} is {fields.get(name)}, not {value}"
        for name, value in expected.items()
        if (fields.get(name) or None) != (value or None)
    ]
    changed = {
        name for name in {*was, *fields} if was.get(name) != fields.get(name) and not name.startswith("general.")
    }
    wrong += [
        f"{name} is not the full model's" for name in changed - expected.keys() - {"GGUF.kv_count", "GGUF.tensor_count"}
    ]
    layers = [i for i in range(text["num_hidden_layers"]) if f"blk.{i}.ffn_gate_inp.weight" in full]
    blocks = [name for name in full if (number := re.match(r"blk\.(\d+)\.", name)) and int(number[1]) > layers[-1]]
    wrong += [f"{name} is missing or new" for name in (full.keys() - set(blocks)) ^ small.keys()]
    for name in full.keys() & small.keys():
        number = re.match(r"blk\.(\d+)\.(ffn_\w+_exps|ffn_gate_inp|exp_probs_b)\.", name)
        made = full[name]
        if number is not None and int(number[1]) in layers:
            layer = case.plan.layers[layers.index(int(number[1]))]
            matrix = layer.expert_matrix if "exps" in number[2] else layer.router_matrix
            made = np.tensordot(matrix, made, 1) if layer.kept is None else made[list(layer.kept)]
        if made.shape != small[name].shape:
            wrong.append(f"{name} has shape {small[name].shape}, not {made.shape}")
        elif case.kind == "pruned" and not np.array_equal(made, small[name]):
            wrong.append(f"{name} holds other numbers")
        elif not np.allclose(made, small[name], rtol=1e-5, atol=1e-6):
            wrong.append(f"{name} holds other sums")
    return sorted(wrong)


def difference_run(folder: Path) -> float:
    """How far llama.cpp's logits are from those of transformers, as a part of the largest; NaN where it is not here.

    Raises:
        ValueError: when it does not load the file.
    """
    try:
        from llama_cpp import Llama  # type: ignore[import-not-found]
    except ImportError:
        return float("nan")
    # float32 caches, as float16 ones would be most of the difference
    engine = Llama(f"{folder}.gguf", logits_all=True, n_ctx=64, type_k=0, type_v=0, verbose=False)
    engine.eval(IDS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return float(np.abs(engine.scores[: len(IDS)] - logits).max() / np.abs(logits).max())


def wrong_when_run(case: Case) -> tuple[str, list[str]]:
    """What is said of logits, and what is wrong: the small model further from transformers than the full one is."""
    try:
        full, small = difference_run(case.full), difference_run(case.small)
    except ValueError as error:
        return "no", [str(error)]
    if np.isnan(small):
        return "not run", []
    said = f"logits within {small:.0e} (full model {full:.0e})"
    return said, [said] if small > 10 * full else []


# vLLM and SGLang ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """How both servers read a family's MoE layers.

    Args:
        block: the module of a layer that holds router and experts.
        experts: the attribute of the config that they take the number of experts from.
        weights: names of an expert's gate, down and up projections; none: all experts are in one tensor.
        inner: the attribute that holds the size of an expert.
        router: names of the router's tensors, of (r, hidden) and of (r,).
    """

    block: str
    experts: str
    weights: tuple[str, str, str] | None
    inner: str
    router: tuple[str, ...]


LOADERS = {
    # vLLM models/mixtral.py MixtralMoE, MixtralModel; SGLang models/mixtral.py MixtralForCausalLM.load_weights
    "mixtral": Loader(
        "block_sparse_moe", "num_local_experts", ("w1", "w2", "w3"), "intermediate_size", ("gate.weight",)
    ),
    # vLLM models/qwen3_moe.py Qwen3MoeSparseMoeBlock; SGLang models/qwen3_moe.py Qwen3MoeForCausalLM.load_weights
    "qwen3_moe": Loader(
        "mlp", "num_experts", ("gate_proj", "down_proj", "up_proj"), "moe_intermediate_size", ("gate.weight",)
    ),
    # vLLM models/gpt_oss.py GptOssModel._load_weights_other; SGLang models/gpt_oss.py _load_normal_weights
    "gpt_oss": Loader("mlp", "num_local_experts", None, "intermediate_size", ("router.weight", "router.bias")),
    # vLLM models/glm4_moe.py Glm4MoE, Glm4MoeModel; SGLang models/glm4_moe.py Glm4MoeForCausalLM.load_weights
    "glm4_moe": Loader(
        "mlp", "n_routed_experts", ("gate_proj", "down_proj", "up_proj"), "moe_intermediate_size",
        ("gate.weight", "gate.e_score_correction_bias"),
    ),
    # vLLM models/deepseek_v2.py DeepseekV2Model.load_weights; SGLang deepseek_common/deepseek_weight_loader.py
    "deepseek_v3": Loader(
        "mlp", "n_routed_experts", ("gate_proj", "down_proj", "up_proj"), "moe_intermediate_size",
        ("gate.weight", "gate.e_score_correction_bias"),
    ),
}  # fmt: skip


def sparse_layers(config: Any) -> list[int]:
    """The layers that both build with experts."""
    dense = getattr(config, "first_k_dense_replace", 0)  # both: layer >= first_k_dense_replace, moe_layer_freq of 1
    alone = getattr(config, "mlp_only_layers", None) or ()  # vLLM and SGLang qwen3_moe.py, Qwen3MoeDecoderLayer
    step = getattr(config, "decoder_sparse_step", 1)
    return [i for i in range(dense, config.num_hidden_layers) if i not in alone and (i + 1) % step == 0]


def places(family: str, config: Any, server: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """Every place in the parameters of MoE layers, by the parameter's name and the part of it, and its shape."""
    loader = LOADERS[family]
    places: dict[tuple[str, str], tuple[int, ...]] = {}
    r, hidden, inner = (getattr(config, name) for name in (loader.experts, "hidden_size", loader.inner))
    for i in sparse_layers(config):
        block = f"model.layers.{i}.{loader.block}"
        # vLLM keeps them in RoutedExperts (layers/fused_moe/routed_experts.py), SGLang in FusedMoE itself
        experts = f"{block}.experts.routed_experts" if server == "vLLM" else f"{block}.experts"
        bias = "w{}_bias" if server == "vLLM" else "w{}_weight_bias"
        places |= {(f"{block}.{name}", ""): (r, hidden) if name.endswith(".weight") else (r,) for name in loader.router}
        if loader.weights is None:  # whole, and transposed as they are read
            places[f"{experts}.w13_weight", ""] = (r, hidden, 2 * inner)
            places[f"{experts}.w2_weight", ""] = (r, inner, hidden)
            places[f"{experts}.{bias.format(13)}", ""] = (r, 2 * inner)
            places[f"{experts}.{bias.format(2)}", ""] = (r, hidden)
            continue
        for e in range(r):
            places[f"{experts}.w13_weight", f"expert {e} w1"] = (inner, hidden)
            places[f"{experts}.w13_weight", f"expert {e} w3"] = (inner, hidden)
            places[f"{experts}.w2_weight", f"expert {e} w2"] = (hidden, inner)
    return places


def place_of(name: str, family: str, config: Any, server: str) -> tuple[str, str] | None:
    """Where a server loads a tensor of a checkpoint; None: it passes it over.

    Of experts by FusedMoE.make_expert_params_mapping (SGLang layers/moe/fused_moe_triton/layer.py) and
    RoutedExperts.build_expert_params_mapping (vLLM), whose entries are (param, "experts.{e}.{weight}.", e, shard), and
    for gpt-oss make_expert_params_mapping_fused and `hf_to_vllm_mapper`.
    """
    loader, prefix = LOADERS[family], "experts.routed_experts." if server == "vLLM" else "experts."
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    spare = getattr(config, "num_nextn_predict_layers", 0) or 0
    if layer is not None and spare and int(layer[1]) >= config.num_hidden_layers:
        return None  # both: get_spec_layer_idx_from_weight_name, or int(name_list[2]) >= num_hidden_layers
    if f"{loader.block}.experts" not in name:
        return name, ""
    if loader.weights is None:
        bias = "_bias" if server == "vLLM" else "_weight_bias"
        ends = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
        ends |= {"gate_up_proj_bias": f"w13{bias}", "down_proj_bias": f"w2{bias}"}
        stem, _, end = name.rpartition("experts.")
        return (f"{stem}{prefix}{ends[end]}", "") if end in ends else None
    for e in range(getattr(config, loader.experts)):
        for shard, weight in zip(("w1", "w2", "w3"), loader.weights):
            if f"experts.{e}.{weight}." in name:
                param = "w2_" if shard == "w2" else "w13_"
                return name.replace(f"experts.{e}.{weight}.", f"{prefix}{param}"), f"expert {e} {shard}"
    return None


def wrong_in_loader(full: Path, small: Path, family: str, server: str) -> list[str]:
    """What a server would not find, not load, or load where it does not fit."""
    config = AutoConfig.from_pretrained(small)
    tensors, others = stored(small), stored(full)
    wanted, filled = places(family, config, server), Counter[tuple[str, str]]()
    wrong = []
    for name, shape in tensors.items():
        place = place_of(name, family, config, server)
        if place is None:
            wrong.append(f"{name} is passed over")
        elif place in wanted:
            filled[place] += 1
            if shape != wanted[place]:
                wrong.append(f"{name} has shape {shape}, {place[0]} takes {wanted[place]}")
        elif others.get(name) != shape:  # what is not of experts and routers is as it is read of the full checkpoint
            wrong.append(f"{name} {shape} is no tensor of the full checkpoint")
    wrong += [f"{' '.join(place)} is filled {filled[place]} times" for place in wanted if filled[place] != 1]
    spec = {
        name
        for name in others
        if (n := re.match(r"model\.layers\.(\d+)\.", name)) and int(n[1]) >= config.num_hidden_layers
    }
    missing = {name for name in others if place_of(name, family, config, server) == (name, "")} - spec - tensors.keys()
    return sorted([*wrong, *(f"{name} is missing" for name in missing)])


# The table ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold exports against what llama.cpp, vLLM and SGLang read.")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="a copy of llama.cpp, whose converter is run")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    given = parser.parse_args()
    failed, llama_cpp = 0, None if given.llama_cpp is None else given.llama_cpp.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        print("| family | plan | llama.cpp converts | llama.cpp runs | vLLM | SGLang |\n|---|---|---|---|---|---|")
        for family in given.families:
            made = cases(family, Path(scratch))
            broken = llama_cpp and convert([made[0].full, *(case.small for case in made)], llama_cpp)
            for case in made:
                wrong, ran = [wrong_in_loader(case.full, case.small, family, server) for server in SERVERS], "not run"
                columns = [f"{each[0]} (of {len(each)})" if each else "yes" for each in wrong]
                if llama_cpp is not None:
                    converted = [broken] if broken else wrong_in_gguf(case, llama_cpp)
                    ran, differing = (ran, []) if broken else wrong_when_run(case)
                    wrong += [converted, differing]
                    columns.insert(0, f"{converted[0]} (of {len(converted)})" if converted else "yes")
                else:
                    columns.insert(0, "not run")
                columns.insert(1, ran)
                failed += sum(map(bool, wrong))
                print("|", " | ".join([family, case.kind, *columns]), "|", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
