"""What vLLM, SGLang and llama.cpp ask of a plan: said when a study is made, refused on export if not loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeopt
from moeopt.cli import main
from moeopt.errors import ExportError
from moeopt.plan import LayerPlan, ModelShape, Plan
from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace, Space, demands
from moeopt.study import serving_demands
from moeopt.tasks import TextTask

ALL = ("vllm", "sglang", "llama.cpp")
SHAPE = ModelShape(3, 16, 2)
V3 = {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
V2 = V3 | {"topk_method": "group_limited_greedy"}
MXFP4 = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
AWQ = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "awq"}}


def prune(keep: int, k: int = 2, router_groups: int = 1) -> PruneSpace:
    return PruneSpace(ModelShape(3, 16, 2, router_groups), keep=keep, k=k)


def merged(*layers: bool) -> Plan:
    """Plans of 4 of 16 experts, in some layers merged."""
    w_em = np.kron(np.eye(4), np.full((1, 4), 0.25))
    kinds = {True: {"w_em": w_em, "w_rm": np.eye(16)[:4], "router": "rows"}, False: {"kept": (0, 1, 2, 3)}}
    return Plan(tuple(LayerPlan(16, 2, **kinds[made]) for made in layers))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "parallel", "config", "expected"),
    [
        (prune(8), 4, {"model_type": "qwen3_moe"}, {}),
        (prune(6), 4, {"model_type": "qwen3_moe"}, {("vllm", False): "keep 4 or 8", ("sglang", True): "keep 4 or 8"}),
        (prune(3), 4, {"model_type": "qwen3_moe"}, {("vllm", True): "keep 4", ("sglang", True): "keep 4"}),
        (prune(1, 1), 1, {"model_type": "mixtral"}, {}),
        (prune(15, 2), 12, {"model_type": "qwen3_moe"}, {("vllm", False): "keep 12", ("sglang", True): "keep 12"}),
        (prune(6, 5), 12, {"model_type": "qwen3_moe"}, {("vllm", True): "keep 12", ("sglang", True): "keep 12"}),
        (prune(16), 20, {"model_type": "qwen3_moe"}, {("vllm", True): "no r from", ("sglang", True): "no r from"}),
        (prune(6), 4, {"model_type": "gpt_oss"}, {("vllm", True): "keep 4 or 8", ("sglang", True): "keep 4 or 8"}),
        (prune(8, router_groups=4), 1, V3, {}),
        (prune(12, router_groups=4), 1, V3, {("sglang", False): "keep 8 or 16"}),
        (
            prune(4, router_groups=4), 1, V3,
            {("vllm", False): "keep 8 or more", ("llama.cpp", True): "keep 8 or more"},
        ),
        (
            prune(4, 3, router_groups=4), 1, V3,
            {(server, True): "k=3 experts are chosen in 2 of 4 groups of 1: keep 8" for server in ALL},
        ),
        (
            Plan.one_hot([range(6)] * 3, experts=16, k=2), 1, V3,
            {(server, True): "as many of each of the 4 groups" for server in ALL},
        ),
        (prune(8, router_groups=4), 1, V2, {("llama.cpp", False): "by this model by the best one"}),
        (prune(8), 1, V3 | {"topk_group": 4}, {("llama.cpp", True): "topk_group=4 of n_group=4"}),
        (prune(1, 1), 1, {"model_type": "glm4_moe", "n_group": 1}, {("llama.cpp", True): "keep 2 or more"}),
        (EEPSpace(SHAPE, keep=8, router="prob"), 1, None, {(server, True): "--router" for server in ALL}),
        (EEPSpace(SHAPE, keep=8, router="logit"), 1, None, {}),
        (
            MergeSpace(SHAPE, around=Plan.identity(3, 16, 2), router="prob"), 1, None,
            {(server, True): 'router="logit"' for server in ALL},
        ),
        (ActiveSpace(prune(8), k=(1, 2), groups=1), 1, None, {}),
        (ActiveSpace(prune(8), k=(1, 2)), 1, None, {(server, True): "--active-groups 1" for server in ALL}),
        (
            PruneSpace(SHAPE, keep=(2, 6), total=12), 1, None,
            {(server, True): "search one number (--keep 6)" for server in ALL},
        ),
        (PruneSpace(SHAPE, keep=(2, 6), total=12, groups=1), 1, None, {}),
        (
            MergeSpace(SHAPE, around=Plan.one_hot([[0, 1], [2, 3], [4, 5, 6]], experts=16, k=2), router="rows"),
            1, None,
            {(server, True): "one r and one k for all layers" for server in ALL},
        ),
        (ActiveSpace(prune(8), skip=True), 1, None, {(server, True): "leave skip out" for server in ALL}),
        (
            Plan(tuple(LayerPlan(16, 2, kept=tuple(range(r))) for r in (4, 4, 8))), 1, None,
            {(server, True): "one r and one k for all layers" for server in ALL},
        ),
        (merged(True, False, True), 1, MXFP4, {(server, True): "MXFP4" for server in ("vllm", "sglang")}),
        (merged(True, True, True), 1, MXFP4, {}),
        (merged(False, False, False), 1, MXFP4, {}),
        (prune(8), 1, AWQ, {("llama.cpp", True): "'awq'"}),
        (prune(8), 1, {"model_type": "kolibri"}, {(server, False): "kolibri" for server in ALL}),
        (
            prune(8), 1, {"text_config": {"model_type": "glm4_moe", "num_nextn_predict_layers": 1}},
            {(server, False): "multi-token prediction" for server in ALL},
        ),
    ],
)  # fmt: skip
def test_each_server_asks_for_what_its_source_does(
    what: Space | Plan, parallel: int, config: dict[str, Any] | None, expected: dict[tuple[str, bool], str]
) -> None:
    asked = [demand for demand in demands(what, ALL, parallel, config) if "any r will do" not in demand.text]
    by_server = {(server, demand.refused): demand.text for demand in asked for server in demand.servers}
    assert sum(len(demand.servers) for demand in asked) == len(by_server), asked
    assert by_server.keys() == expected.keys(), [*map(str, asked)]
    assert all(expected[key] in text for key, text in by_server.items()), by_server


@pytest.mark.parametrize(("given", "match"), [(("tgi", 1), "got 'tgi'"), ((ALL, 0), "got 0"), ((ALL, True), "True")])
def test_servers_and_sizes_that_are_none_are_refused(given: tuple[Any, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        demands(prune(8), *given)


def test_a_study_warns_keeps_and_shows_what_is_asked_for_and_resumes_without(
    make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, texts = make_mixtral(layers=2, experts=6), [f"the {a} cat sat on the old mat" for a in "abcdefgh"]
    task = TextTask("toy", search=texts[:4], dev=texts[4:6], test=texts[6:], window=32)
    objective = moeopt.Objective(model, tiny_tokenizer, task, PruneSpace.of(model, keep=3))
    storage = f"sqlite:///{tmp_path / 'study.db'}"

    def made(**options: Any) -> tuple[list[str], list[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            study = moeopt.create_study(
                "served", objective=objective, storage=storage, sampler="random", load_if_exists=True, **options
            )
        return [str(w.message) for w in said if "ranks" in str(w.message)], serving_demands(study)

    asked = ["sglang: r=3 experts cannot be divided among 2 ranks: keep 2 or 4"]
    assert made(serve_on="sglang", serve_parallel=2) == (asked, asked)
    assert made() == ([], asked)  # resumed without a word of servers, it still says so
    assert main(["show", "served", "--storage", storage]) == 0
    shown = capsys.readouterr().out
    assert "to be served by  sglang, experts divided among 2 ranks" in shown
    assert asked[0] in " ".join(shown.split())
    assert made(serve_on="vllm") == ([], [])
    with pytest.raises(ExportError, match="got 'tgi'"):
        made(serve_on="tgi")


def test_export_writes_for_a_server_what_it_loads_and_refuses_the_rest(
    make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, small, file = tmp_path / "full", tmp_path / "small", tmp_path / "plan.safetensors"
    make_mixtral(layers=2, experts=6, dtype=torch.bfloat16).save_pretrained(full)
    tiny_tokenizer.save_pretrained(full)
    plan = Plan.one_hot([[0, 2, 5]] * 2, experts=6, k=2)
    for refused, options, match in (
        (plan.with_skip(0.5), {"serve_on": "vllm"}, "own class alone.*plan.with_skip"),
        (plan, {"serve_on": "vllm", "form": "custom"}, "own class alone: it was asked for"),
        (plan, {"serve_on": ALL, "serve_parallel": 2}, "sglang: r=3 experts cannot be divided among 2 ranks"),
    ):
        with pytest.raises(ExportError, match=match):
            moeopt.export(refused, small, model=full, **options)
    assert not small.exists()
    plan.save(file)
    assert main(["export", str(full), str(small), "--plan", str(file), "--for", "vllm", "--for-parallel", "2"]) == 0
    assert "divided among 2 ranks unevenly" in " ".join(capsys.readouterr().err.split())
    assert (small / "config.json").exists()
