"""What servers ask of a smaller model: said when a search for one begins, and again before it is written.

The rules are restated from the public source of vLLM 0.33, SGLang 0.5.23 and llama.cpp as in llama-cpp-python 0.3.36;
each says where it stands there. `benchmarks/served.py` holds exports against what these servers read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from moeopt.errors import ExportError
from moeopt.plan import Plan, why_unequal
from moeopt.plan.stock import why_not_stock
from moeopt.spaces.active import ActiveSpace
from moeopt.spaces.base import Space

Server = Literal["llama.cpp", "sglang", "vllm"]
"""A server whose demands on a checkpoint are known here."""
HELD = ("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3")
"""Model types whose exports `benchmarks/served.py` holds against what servers read."""
GGUF_READS = ("fp8", "gptq", "compressed-tensors")
"""Quantisation methods that llama.cpp's converter dequantises (conversion/base.py, `ModelBase.dequant_model`)."""
PREDICTION_KEY = re.compile(r"(^|_)(mtp|nextn)(_|$)")
"""In the name of a field of a config: of blocks for multi-token prediction."""


@dataclass(frozen=True)
class Demand:
    """One thing that servers ask for and a plan, or some plan of a space, does not give.

    Args:
        text: what is asked for, and what would give it.
        refused: whether such a plan cannot be loaded, or not run, at all.
        servers: that ask for it.
    """

    text: str
    refused: bool = False
    servers: tuple[Server, ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.servers)}: {self.text}"


def check_servers(servers: str | Sequence[str], parallel: int = 1) -> tuple[Server, ...]:
    """The servers, each once.

    Raises:
        ExportError: when one is unknown, or `parallel` is no size.
    """
    given = (servers,) if isinstance(servers, str) else tuple(dict.fromkeys(servers))
    for server in given:
        if server not in get_args(Server):
            raise ExportError(f"a server is one of {', '.join(get_args(Server))}, got {server!r}")
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise ExportError(f"the size of expert parallelism is an integer of at least 1, got {parallel!r}")
    return given  # type: ignore[return-value]


def demands(
    what: Space | Plan,
    servers: str | Sequence[str],
    parallel: int = 1,
    config: Mapping[str, Any] | None = None,
) -> list[Demand]:
    """What servers ask for that a plan, or plans of a space, do not give.

    Args:
        what: a plan, or what is to be searched.
        servers: ``"vllm"``, ``"sglang"``, ``"llama.cpp"``, or several.
        parallel: over how many ranks the experts of a layer are divided (vLLM: ``--enable-expert-parallel``; SGLang:
            ``--ep-size``).
        config: config.json of the full checkpoint; without it nothing is said of its groups, quantisation and family.

    Raises:
        ExportError: when a server is unknown, or `parallel` is no size.
    """
    text = {} if config is None else dict(config.get("text_config") or config)
    settings = {} if config is None else config.get("quantization_config") or text.get("quantization_config") or {}
    method, model_type = str(settings.get("quant_method", "")), str(text.get("model_type"))
    asking: dict[Demand, list[Server]] = {}
    for server in check_servers(servers, parallel):
        asked = [*_unwritable(what), *_of_quantisation(server, what, method, model_type), *_of_family(text)]
        for n, r, k in _sizes(what):
            asked += _of_parallel(server, n, r, k, parallel, model_type)
            asked += _of_groups(server, n, r, k, text, 1 if isinstance(what, Plan) else what.shape.router_groups)
        for demand in dict.fromkeys(asked):
            asking.setdefault(demand, []).append(server)
    return [replace(demand, servers=tuple(its)) for demand, its in asking.items()]


def _sizes(what: Space | Plan) -> list[tuple[int, int, int]]:
    """n, r and k of what is served; where a space searches r or k, its largest."""
    if isinstance(what, Plan):
        return list(dict.fromkeys((layer.experts, layer.kept_experts, layer.k) for layer in what.layers))
    return [
        (what.shape.experts, what.keep, what.k_range[1] if isinstance(what, ActiveSpace) and what.k_range else what.k)
    ]


def _instead(n: int, k: int, *sizes: int) -> str:
    """Which of these r would do, k <= r <= n."""
    possible = [str(r) for r in dict.fromkeys(sizes) if k <= r <= n]
    return f"keep {' or '.join(possible)}" if possible else f"no r from k={k} to n={n} near it would do"


def _unwritable(what: Space | Plan) -> Iterator[Demand]:
    """Why no server has a class for a plan: all build the family's own, with one r and k and router rows alone."""
    if not isinstance(what, Plan) and what.keep_range is not None and len(what.groups) > 1:
        yield Demand(
            f"all layers keep as many experts, and in this space {len(what.groups)} groups of layers each a number of "
            f"their own, {what.keep_range}: search one number (--keep {what.keep}), or export a uniform plan of the "
            "study's size (moeopt export --uniform)",
            True,
        )
        reason = None
    else:
        reason = why_not_stock(what if isinstance(what, Plan) else what.decode(what.start()))
    if reason is not None:
        yield Demand(f"checkpoints of the model's own class alone are read: {reason}", True)
    if isinstance(what, Plan) or reason is not None:
        return
    if "merge" in what.phases and what.router == "prob":
        yield Demand(
            "there is no place for a W_RM on the router's probabilities, which the mergings of this space have: search "
            'with router="logit" or "rows" (--router); as it is, only the prunings of the study can be served '
            "(moeopt export --trial best-stock)",
            True,
        )
    if isinstance(what, ActiveSpace) and what.skip_range is not None:
        yield Demand("experts are not skipped token by token: leave skip out, or export plan.with_skip(0)", True)
    if isinstance(what, ActiveSpace) and what.k_range is not None and len(what.extra_groups) > 1:
        yield Demand(
            f"all layers have one k, and in this space {len(what.extra_groups)}: search one with groups=1 "
            "(--active-groups 1)",
            True,
        )


def _of_parallel(server: Server, n: int, r: int, k: int, parallel: int, model_type: str) -> Iterator[Demand]:
    """Experts divided over ranks.

    SGLang asserts that they come out even (layers/moe/fused_moe_triton/layer.py, `FusedMoE.__init__`); vLLM gives some
    ranks one more (layers/fused_moe/expert_map_manager.py, `determine_expert_map`), but not with --enable-eplb
    (layers/fused_moe/layer.py), nor in models/gpt_oss.py, whose `load_weights` cuts r // ranks experts for each.
    """
    if parallel == 1:
        return
    if server == "llama.cpp":
        yield Demand("layers or tensors are divided among devices, not experts: any r will do")
        return
    if r % parallel == 0:
        return
    even = _instead(n, k, r // parallel * parallel, (r // parallel + 1) * parallel)
    if server == "sglang" or r < parallel or model_type == "gpt_oss":
        yield Demand(f"r={r} experts cannot be divided among {parallel} ranks: {even}", True)
    else:
        yield Demand(
            f"r={r} experts are divided among {parallel} ranks unevenly, so that all wait for the largest, and with "
            f"--enable-eplb not at all: {even}"
        )


def _of_groups(server: Server, n: int, r: int, k: int, text: Mapping[str, Any], groups: int) -> Iterator[Demand]:
    """Groups that a token chooses first.

    llama.cpp scores a group by its best two experts in every family (src/llama-graph.cpp, `build_moe_ffn`) and asserts
    n_group < r and topk_group < n_group (src/llama-model.cpp, `load_hparams`). vLLM leaves groups aside where r <=
    n_group (layers/fused_moe/router/grouped_topk_router.py). SGLang's fast routing takes a power of two
    (layers/moe/topk.py, `biased_grouped_topk_gpu`).
    """
    of_config = text.get("n_group")
    groups = of_config if isinstance(of_config, int) else groups
    chosen = text.get("topk_group") or 1
    unequal = why_unequal(r, groups)
    if unequal is not None:
        yield Demand(unequal, True)
        return
    size = r // groups
    if groups > 1 and chosen * size < k:
        least = -(-k // chosen) * groups
        yield Demand(f"k={k} experts are chosen in {chosen} of {groups} groups of {size}: keep {least} or more", True)
        return
    if server == "llama.cpp":
        if size < 2 and (groups > 1 or of_config == 1):
            yield Demand(f"each of the {groups} groups needs two experts: keep {2 * groups} or more", True)
        if 1 < groups <= chosen:
            yield Demand(f"topk_group={chosen} of n_group={groups} groups is refused, whatever is kept", True)
        if groups > 1 and text.get("topk_method") == "group_limited_greedy":
            yield Demand("groups are ranked by their best two experts, by this model by the best one: outputs differ")
    if server == "vllm" and 1 < groups == r:
        yield Demand(f"groups of one expert are left aside, so that outputs differ: keep {2 * groups} or more")
    if server == "sglang" and of_config is not None and r & (r - 1):
        below = 1 << (r.bit_length() - 1)
        powers = [power for power in (below, 2 * below) if power % groups == 0]
        yield Demand(f"its fast kernel routes among a power of two experts: {_instead(n, k, *powers)}")


def _of_quantisation(server: Server, what: Space | Plan, method: str, model_type: str) -> Iterator[Demand]:
    """Quantised formats.

    vLLM and SGLang read one format for the experts of all layers of gpt-oss: layers/quantization/mxfp4.py takes no list
    of modules that are not (vLLM), models/gpt_oss.py reads no other tensors of experts (SGLang).
    """
    if not method:
        return
    if server == "llama.cpp":
        if method not in GGUF_READS and (method, model_type) != ("mxfp4", "gpt_oss"):
            yield Demand(
                f"checkpoints quantised by {method!r} are not converted: export from the unquantised one (it reads "
                f"{', '.join(GGUF_READS)}, and mxfp4 of gpt-oss)",
                True,
            )
        return
    if method != "mxfp4":
        return
    made = {layer.makes_experts for layer in what.layers} if isinstance(what, Plan) else set()
    if len(made) > 1:
        yield Demand("experts of all layers are MXFP4 or of none: merge in every layer or in none", True)
    elif not isinstance(what, Plan) and "merge" in what.phases:
        yield Demand(
            "experts of all layers are MXFP4 or of none, and merged ones are bfloat16: plans that merge in some layers "
            "only cannot be loaded"
        )


def _of_family(text: Mapping[str, Any]) -> Iterator[Demand]:
    model_type = text.get("model_type")
    if model_type is not None and model_type not in HELD:
        yield Demand(f"exports of {model_type} were never held against what is read, as those of {', '.join(HELD)} are")
    blocks = [key for key, value in text.items() if PREDICTION_KEY.search(key) and isinstance(value, int) and value > 0]
    if blocks:
        yield Demand(
            f"exports have no block for multi-token prediction ({blocks[0]}): start without speculation by that"
        )
