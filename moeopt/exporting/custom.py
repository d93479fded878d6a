"""Custom form: every plan, as a model class that ships inside the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig

from moeopt.errors import ExportError, ModelError
from moeopt.exporting.stock import ACTIVE_KEYS, keys_of, read_config
from moeopt.models import RoutingRule, empty_model, lacking, moe_layers, placed
from moeopt.models.gate import CUSTOM, auto_map, custom_classes
from moeopt.models.layers import call_router, given_tensors
from moeopt.models.routing import learn_rule
from moeopt.plan import Plan
from moeopt.showing import first_line


def custom_config(source: Path, plan: Plan, rule: RoutingRule) -> dict[str, Any]:
    """The checkpoint's config with what the plan changes, and the classes that read it.

    Raises:
        ExportError: when the family is not one that moeopt has a custom form for.
    """
    config = read_config(source)
    model_type = str(config.get("model_type"))
    try:
        classes = auto_map(model_type)
    except ModelError as error:
        raise ExportError(str(error)) from None
    defaults = AutoConfig.for_model(model_type).get_text_config()
    alias = getattr(defaults, "attribute_map", {})
    text = config.get("text_config", config)  # fields of a model of text and more, in a dictionary of their own
    experts, active = keys_of(text, plan.layers[0].experts, source)
    maps = any(part.router == "prob" or part.skip for part in plan.layers)
    full: dict[str, dict[str, int]] = {"experts": {}, "active": {}}
    for kind, keys in (("experts", experts), ("active", active or [ACTIVE_KEYS[0]])):
        for key in keys:
            value = text.pop(key, getattr(defaults, key, None))
            full[kind][alias.get(key, key)] = value
    layers = plan.layers
    lists = {
        "experts": [p.kept_experts for p in layers],
        "active": [p.k for p in layers],
        "router": ["rows" if p.router == "logit" else p.router for p in layers],
        "negative": [p.negative for p in layers],
        "skip": [p.skip for p in layers],
    }
    text.update({key: lists[kind] for kind, keys in full.items() for key in keys})
    return config | {
        "architectures": [next(name for auto, name in classes.items() if auto != "AutoConfig").partition(".")[2]],
        "auto_map": classes,
        "model_type": f"{CUSTOM}{model_type}",
        "moeopt": {
            **lists,
            "full": full,
            "rule": {**vars(rule), "normalised": rule.normalised} if maps else None,
        },
    }


def rule_of(source: Path, *, trust_remote_code: bool = False) -> RoutingRule:
    """How the family's routers make weights of logits.

    Learnt from a router of random weights, so that bias and correction show, which may be zero in the real ones.

    Raises:
        ModelError: when the rule is none that moeopt knows.
    """
    model = empty_model(source, trust_remote_code=trust_remote_code)
    layer = moe_layers(model)[0]
    layer.router.to_empty(device="cpu").eval()  # some draw at random in training
    tensors: list[torch.Tensor] = [*layer.router.parameters(), *layer.router.buffers()]
    for name in given_tensors(layer.block, layer.router):
        empty = torch.empty_like(getattr(layer.block, name), device="cpu")
        is_parameter = name in layer.block._parameters
        setattr(layer.block, name, torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty)
        tensors.append(getattr(layer.block, name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return learn_rule(layer)


def check_loads(folder: Path, config: dict[str, Any], names: set[str], plan: Plan) -> None:
    """Build the class that a custom checkpoint will load as, without weights, and hold the checkpoint against it.

    Args:
        folder: where config.json lies.
        config: what config.json holds.
        names: of the checkpoint's tensors, those of a quantised weight as one.
        plan: its plan.

    Raises:
        ExportError: when it would lack tensors, or its routers would not do what the plan says.
    """
    config_class, model_class = custom_classes(config["model_type"].removeprefix(CUSTOM))
    try:
        with init_empty_weights(include_buffers=True):
            model = model_class(config_class.from_pretrained(folder))
        for block, part in zip((b for b in model.modules() if _is_block(b)), plan.layers):
            router = block.gate if isinstance(getattr(block, "gate", None), torch.nn.Module) else block.router
            weight = next(p for p in router.parameters() if p.ndim == 2)
            output = call_router(block, router, torch.zeros(2, weight.shape[1], device="meta", dtype=model.dtype))
            k = output[2].shape[1] if len(output) == 3 else router.top_k
            if k != part.k:
                raise ValueError(f"a router picks {k} experts in place of {part.k}")
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        reason = first_line(error)
        raise ExportError(f"moeopt has no custom form for {config['architectures'][0]}: {reason}") from error
    experts = {name: module.experts for name, module in model.named_modules() if _is_block(module)}
    counts = {f"{name}.experts": part.kept_experts for name, part in zip(experts, plan.layers)}
    absent = lacking(model, placed(model, names), counts)
    if absent:
        raise ExportError(f"the checkpoint of {config['architectures'][0]} would lack {', '.join(absent[:5])}")


def _is_block(module: Any) -> bool:
    return isinstance(getattr(module, "experts", None), torch.nn.Module)
