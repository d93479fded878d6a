"""Stock form: plans that the model's own class has a place for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from moeopt.errors import ExportError
from moeopt.exporting.folders import check_inside
from moeopt.exporting.quantised import why_not_quantised
from moeopt.plan import LayerPlan, Plan
from moeopt.plan.stock import why_not_stock as why_not_stock

Form = Literal["auto", "stock", "custom"]
"""An ordinary checkpoint, one that brings its own model class, or the former where it can hold the plan."""
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
SERVED = {"deepseek_v3": _SIGMOID, "deepseek_v32": _SIGMOID}
"""By model type, what servers read in config.json and transformers does not write: its class knows nothing else, while
llama.cpp and vLLM take a softmax and no correction where it is missing, and SGLang does not start."""
ACTIVE_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def why_not_renormalised(plan: Plan, source: Path) -> str | None:
    """Why the checkpoint's family weighs the experts of this plan otherwise than a smaller stock model would."""
    config = read_config(source)
    text = config.get("text_config", config)
    if text.get("norm_topk_prob") is False and any(layer.router == "prob" for layer in plan.layers):
        return (
            f"the plan selects rows of the router's probabilities, but {str(source)!r} does not renormalise its top-k, "
            "so a smaller stock model would weigh experts differently; prune with PruneSpace, which searches the stock "
            "rule"
        )
    return None


def chosen_form(plan: Plan, source: Path, form: Form = "auto") -> tuple[Literal["stock", "custom"], str | None]:
    """Which form the plan of a checkpoint takes, and why it is not stock, if it is not.

    Raises:
        ExportError: when it is to be stock and cannot, or neither form can hold it: the checkpoint brings code of its
            own, or is quantised and cannot be so under the plan.
    """
    reason = why_not_stock(plan) or why_not_renormalised(plan, source)
    if form == "stock" and reason is not None:
        raise ExportError(f"a stock checkpoint cannot express this plan: {reason}")
    if form == "custom" and reason is None:
        reason = "it was asked for"
    chosen: Literal["stock", "custom"] = "stock" if reason is None else "custom"
    config = read_config(source)
    if chosen == "custom" and "auto_map" in config:
        raise ExportError(
            f"{str(source)!r} comes with code of its own, and moeopt has no custom form for such a model, which this "
            f"plan needs: {reason}. moeopt.exporting.project, or --project stock, finds the nearest plan of stock form"
        )
    refused = why_not_quantised(plan, config, chosen)
    if refused is not None:
        raise ExportError(f"{str(source)!r}: {refused}")
    return chosen, reason


def stock_form(plan: Plan) -> Plan:
    """The plan with every one-hot mapping of probabilities written as selected router rows; else as it is.

    Raises:
        ExportError: with `why_not_stock`.
    """
    reason = why_not_stock(plan)
    if reason:
        raise ExportError(f"a stock checkpoint cannot express this plan: {reason}")
    return Plan(tuple(as_rows(layer) for layer in plan.layers))


def as_rows(layer: LayerPlan) -> LayerPlan:
    """The layer with a one-hot mapping of probabilities or logits written as selected router rows; else as it is."""
    if layer.router_rows is None:
        return layer
    return replace(layer, router="rows", negative="clamp")


def read_config(source: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder.

    Raises:
        ExportError: when there is none, it is a link out of the folder, or it is not a JSON object.
    """
    path = source / "config.json"
    if not path.is_file():
        raise ExportError(f"{str(source)!r} has no config.json")
    check_inside(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ExportError(f"{str(path)!r} must hold a JSON object, it holds {type(config).__name__}")
    return config


def keys_of(config: dict[str, Any], experts: int, source: Path) -> tuple[list[str], list[str]]:
    """The fields of a config that hold n and k.

    Raises:
        ExportError: when none holds n.
    """
    expert_keys = [key for key in EXPERT_KEYS if config.get(key) == experts]
    if not expert_keys:
        raise ExportError(
            f"{str(source / 'config.json')!r} does not say that the model has {experts} experts; is the plan for it?"
        )
    return expert_keys, [key for key in ACTIVE_KEYS if key in config]


def stock_config(source: Path, plan: Plan, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The checkpoint's config with r and k in place of n and its k, readable by transformers 4 and 5 and by servers.

    What names the code that comes with the checkpoint stays only where that is trusted.
    """
    config = read_config(source)
    if not trust_remote_code:
        config.pop("auto_map", None)  # transformers' own class, which export then reads the checkpoint with, needs none
    layer = plan.layers[0]
    text = config.get("text_config", config)
    experts, active = keys_of(text, layer.experts, source)
    if not active and layer.k != 2:
        active = [ACTIVE_KEYS[0]]
    text.update(dict.fromkeys(experts, layer.kept_experts) | dict.fromkeys(active, layer.k))
    for key, value in SERVED.get(str(text.get("model_type")), {}).items():
        text.setdefault(key, value)
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])  # transformers 4 knows only this key
        if rope.get("rope_type", "default") != "default":
            text.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    return config
