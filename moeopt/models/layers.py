"""MoE layers of a model, found by their interface rather than by class name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.errors import ModelError, got
from moeopt.models.gate import CUSTOM, auto_map
from moeopt.plan import ModelShape

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OF_BLOCK = "../"
"""Begins the name of a tensor that is the block's, in rules that name those of the router."""


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One Mixture-of-Experts layer of a model.

    Args:
        index: position among the model's MoE layers, first layer first.
        name: qualified name of `block` in the model, such as ``"model.layers.3.mlp"``.
        block: the module that holds router and experts.
        router: `block.gate` or `block.router`; maps hidden states (tokens, hidden) to logits (tokens, n), top-k weights
            (tokens, k) and top-k expert numbers (tokens, k).
        experts: `block.experts`; called with hidden states, expert numbers and weights. Its own tensors are stacked,
            expert first: (n, ...).
        n: number of experts.
        k: experts activated per token.
        groups: in how many groups of consecutive experts the router chooses first, by its own account; 1: in none.
        kept_groups: how many of them it chooses.

    Attributes:
        corrects: whether the router has, or is given by its block, a tensor of n numbers beside weight and bias, as
            those that correct their choice of experts.
    """

    index: int
    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    n: int
    k: int
    groups: int = 1
    kept_groups: int = 1

    @property
    def weighs_inputs(self) -> bool:
        """Whether every expert runs for all tokens, on hidden states times its weight, 0 where it is not picked.

        As in Llama 4: the router returns weights (tokens, n) and logits (tokens, n).
        """
        return weighs_inputs(self.experts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states the layer works on."""
        return _float_dtype(self.experts, gate_weight(self.router, self.n)[1].dtype)

    @property
    def corrects(self) -> bool:
        tensors = [*self.router.named_parameters(), *self.router.named_buffers()]
        vectors = (name.rpartition(".")[2] for name, tensor in tensors if tensor.numel() == self.n)
        given = given_tensors(self.block, self.router)
        return any(name not in ("bias", "weight") for name in (*vectors, *given))

    @property
    def hidden(self) -> int:
        """The size of the hidden states the layer works on."""
        return int(gate_weight(self.router, self.n)[1].shape[1])


def check_model(model: object) -> None:
    """Raise ModelError for what is no model, such as the path of one."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model must be a loaded model, as model, tokenizer = moeopt.load(...) gives it, got {got(model)}"
        )


def moe_layers(model: nn.Module) -> tuple[MoELayer, ...]:
    """The MoE layers of `model`, first layer first. Every router is called once, on two tokens of zeros.

    Those of a checkpoint that moeopt exported with a class of its own are told by its config: their routers may map
    more logits onto fewer experts. Not all of them take another plan.

    Raises:
        ModelError: when there is none; it says whether the model is dense or which part of the interface is missing.
    """
    check_model(model)
    exported = getattr(getattr(model, "config", None), "moeopt", None)
    if exported is not None:
        return _exported_layers(model, exported["experts"], exported["active"])
    layers: list[MoELayer] = []
    complaints: dict[str, str] = {}
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        router = getattr(block, "gate", None)
        router = getattr(block, "router", None) if router is None else router
        if not isinstance(experts, nn.Module):
            continue
        try:
            if not isinstance(router, nn.Module):
                raise ModelError("it has no router module under .gate or .router")
            n, k = _interface(block, router, experts)
        except ModelError as error:
            complaints.setdefault(str(error), name)
        else:
            layers.append(MoELayer(len(layers), name, block, router, experts, n, k, *expert_groups(router, block)))
    kind = type(model).__name__
    reasons = "; ".join(f"{name}: {reason}" for reason, name in complaints.items())
    if layers:
        _check_whole(model, layers, reasons)
        return tuple(layers)
    if complaints:
        raise ModelError(f"{kind} has experts, but none that moeopt can use: {reasons}")
    said = _experts_said(model)
    if said is not None:
        raise ModelError(
            f"{kind} has experts by its config ({said}), but none that moeopt can use: no module of it holds "
            "`.experts` beside a router under `.gate` or `.router`"
        )
    raise ModelError(
        f"{kind} is a dense model: no module of it holds `.experts` beside a router under `.gate` or `.router`; "
        "moeopt needs a Mixture-of-Experts model such as Mixtral"
    )


def has_custom_form(model: nn.Module) -> bool:
    """Whether a plan that no stock checkpoint expresses exports, with a class of its own."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None or model_type.startswith(CUSTOM):
        return True  # no checkpoint's, or exported so
    if type(model).__module__.startswith("transformers_modules."):
        return False  # its class is trusted code that came with the checkpoint
    try:
        return bool(auto_map(model_type))
    except ModelError:
        return False


def is_dense(model: nn.Module) -> bool:
    """Whether no module of the model holds experts, of whatever interface, nor its config speaks of any."""
    held = any(isinstance(getattr(module, "experts", None), nn.Module) for module in model.modules())
    return not held and _experts_said(model) is None


def shape_of(model: nn.Module) -> ModelShape:
    """Number of MoE layers, experts a layer, experts per token and groups of `model`, and where its routers are mapped.

    Raises:
        ModelError: when the model has no MoE layers, or its layers differ in one of these numbers.
    """
    layers = moe_layers(model)
    first = layers[0]
    for layer in layers:
        if (layer.n, layer.k) != (first.n, first.k):
            raise ModelError(
                f"the MoE layers of {type(model).__name__} differ: {first.name} has {first.n} experts, top-{first.k}, "
                f"but {layer.name} has {layer.n}, top-{layer.k}; moeopt needs equal layers"
            )
        if layer.groups != first.groups:
            raise ModelError(
                f"{first.name} chooses among {first.groups} groups of experts first, but {layer.name} among "
                f"{layer.groups}; moeopt needs equal layers"
            )
    maps_logits = any(layer.corrects or getattr(layer.router, "router_jitter_noise", 0) for layer in layers)  # Phi-3.5
    stays_stock = first.groups > 1 or maps_logits or not has_custom_form(model)
    return ModelShape(len(layers), first.n, first.k, first.groups, "logit" if stays_stock else "prob")


def stacked(experts: nn.Module, n: int) -> dict[str, Tensor]:
    """The tensors of an experts module that hold one slice an expert: its own, with first dimension n."""
    tensors = {**experts._parameters, **experts._buffers}
    return {name: t for name, t in tensors.items() if t is not None and t.ndim > 0 and t.shape[0] == n}


def is_transposed(experts: nn.Module) -> bool:
    """Whether an experts module stores its projections (n, in, out), not (n, out, in)."""
    return bool(getattr(experts, "is_transposed", False))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps some of the module's own parameters elsewhere between forwards."""
    return any(p.is_meta for p in module.parameters(recurse=False))


def is_quantised(layer: MoELayer) -> bool:
    """Whether the layer's experts are stored in a form that cannot be averaged, whatever other modules are."""
    weights = [t for t in stacked(layer.experts, layer.n).values() if t.ndim > 2 or t.dtype not in FLOATS]
    return not weights or any(t.dtype not in FLOATS for t in weights)


def materialised(module: nn.Module, name: str) -> Tensor:
    """Parameter or buffer `name` of `module` ("wg.weight" for one of a child), with its data, also under offload.

    Raises:
        ModelError: when the tensor is on the meta device and no accelerate hook knows its data.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor: Tensor = getattr(owner, leaf)
    if tensor.is_meta:
        stored = weights_map(owner).get(leaf)
        if stored is None:
            raise ModelError(
                f"tensor {name!r} of {type(module).__name__} has no data: the model's weights are not loaded"
            )
        tensor = stored
    return tensor.detach()


def gate_weight(router: nn.Module, n: int) -> tuple[str, nn.Parameter]:
    """Name and value of the router's (n, hidden) weight.

    Raises:
        ModelError: when there is not exactly one such parameter.
    """
    weights = [(name, p) for name, p in router.named_parameters() if p.ndim == 2 and p.shape[0] == n and p.shape[1] > 1]
    if len(weights) != 1:
        shapes = {name: tuple(p.shape) for name, p in router.named_parameters()}
        raise ModelError(f"{type(router).__name__} must hold one ({n}, hidden) weight, its parameters are {shapes}")
    return weights[0]


def expert_groups(*modules: nn.Module) -> tuple[int, int]:
    """In how many groups experts are, and how many of these a token chooses first, as a router or its block says."""
    for module in modules:
        counts = [getattr(module, name, None) for name in ("num_group", "n_group", "num_expert_group")]
        groups = next((count for count in counts if isinstance(count, int)), 1)
        chosen = getattr(module, "topk_group", None)
        if groups > 1 and isinstance(chosen, int) and getattr(module, "topk_method", None) != "greedy":
            return groups, chosen
    return 1, 1


def weighs_inputs(experts: nn.Module) -> bool:
    """Whether experts are called with hidden states alone; see `MoELayer.weighs_inputs`."""
    parameters = inspect.signature(type(experts).forward).parameters.values()
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2


def as_picks(output: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (tokens, n), and weights and numbers of the k experts picked, of what a router that weighs inputs gave."""
    weights, logits = output
    index = logits.topk(k, dim=-1).indices
    return logits, weights.gather(-1, index), index


def _check_whole(model: nn.Module, layers: Sequence[MoELayer], reasons: str) -> None:
    """Raise ModelError where those are not all: a plan would leave the others at n experts, which config.json says."""
    kind = type(model).__name__
    if reasons:
        raise ModelError(f"{kind} has layers of experts that moeopt cannot use beside others that it could: {reasons}")
    modules = dict(model.named_modules())
    parents = [layer.name.rpartition(".")[0] for layer in layers]
    for parent in parents:
        if parents.count(parent) > 1 and not isinstance(modules[parent], nn.ModuleList):
            pools = ", ".join(other.name for other in layers if other.name.startswith(f"{parent}."))
            raise ModelError(
                f"{kind} has several pools of experts in a layer ({pools}), which its config.json counts together; "
                "moeopt plans one pool a layer"
            )


def _experts_said(model: nn.Module) -> str | None:
    """Where a model's config says that it has experts, such as ``"num_experts = 16"``, in a layer that is not dense."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields = text.to_dict() if hasattr(text, "to_dict") else {}
    if any(fields.get(switch) is False for switch in ("is_moe", "enable_moe_block")):
        return None
    numbers = {name: value for name, value in fields.items() if re.fullmatch(r"\w*(num|n)_\w*experts", name)}
    return next((f"{name} = {n}" for name, n in numbers.items() if isinstance(n, int) and n > 1), None)


def routing_tensor(layer: MoELayer, name: str) -> Tensor:
    """A tensor that a rule names, with its data: of the router, or, behind `OF_BLOCK`, of its block."""
    if name.startswith(OF_BLOCK):
        return materialised(layer.block, name.removeprefix(OF_BLOCK))
    return materialised(layer.router, name)


def given_tensors(block: nn.Module, router: nn.Module) -> tuple[str, ...]:
    """Names of the tensors of a block that its router is called with after the hidden states.

    A parameter of the router's forward stands for the tensor of that name, such as ``"e_score_correction_bias"``.
    """
    forwards = (vars(kind)["forward"] for kind in type(router).__mro__ if "forward" in vars(kind))
    names = dict.fromkeys(name for forward in forwards for name in inspect.signature(forward).parameters)
    return tuple(name for name in names if isinstance(getattr(block, name, None), Tensor))


def call_router(block: nn.Module, router: nn.Module, hidden: Tensor) -> Any:
    """What a router returns for hidden states (tokens, hidden), called as its block calls it, but without hooks."""
    names = given_tensors(block, router)
    given = {n: getattr(block, n) if hidden.is_meta else materialised(block, n).to(hidden.device) for n in names}
    try:
        return router.forward(hidden, **given)
    except ValueError:  # some unpack (rows, width, hidden)
        return router.forward(hidden[None], **given)


def _interface(block: nn.Module, router: nn.Module, experts: nn.Module) -> tuple[int, int]:
    if isinstance(experts, nn.ModuleList):
        raise ModelError(
            "its experts are a ModuleList, one module an expert, not one module of stacked (n, ...) parameters"
        )
    sizes = {p.shape[0] for p in experts.parameters(recurse=False) if p.ndim >= 3}
    if len(sizes) != 1:
        raise ModelError(f"{type(experts).__name__} holds no stacked 3-D parameters with one common first dimension")
    n = int(sizes.pop())
    weight = gate_weight(router, n)[1]
    # under offload the router's hook moves weights and input to where it runs
    device = "cpu" if weight.is_meta and __offloads_any(router) else weight.device
    dtype = _float_dtype(experts, weight.dtype)
    try:
        with torch.no_grad():
            # Not router(...): hooks, such as those of a plan in force, must not show here.
            output = call_router(block, router, torch.zeros(2, weight.shape[1], device=device, dtype=dtype))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"its router {type(router).__name__} cannot be called with hidden states alone ({reason})"
        ) from None
    top_k = getattr(router, "top_k", None)
    if weighs_inputs(experts) and isinstance(output, tuple) and len(output) == 2 and isinstance(top_k, int):
        output = as_picks(output, top_k)
    shapes = [tuple(t.shape) for t in output] if isinstance(output, tuple) and _all_tensors(output) else []
    if len(shapes) != 3 or shapes[0] != (2, n) or shapes[1] != shapes[2] or len(shapes[1]) != 2 or shapes[1][0] != 2:
        returned = f"tensors of shapes {shapes}" if shapes else type(output).__name__
        raise ModelError(
            f"its router {type(router).__name__} must return (logits (tokens, {n}), top-k weights, top-k index), "
            f"for 2 tokens it returned {returned}"
        )
    return n, shapes[1][1]


def _exported_layers(model: nn.Module, experts: Sequence[int], active: Sequence[int]) -> tuple[MoELayer, ...]:
    """Layers of r and k experts each."""
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "experts", None), nn.Module)]
    if not len(blocks) == len(experts) == len(active):
        raise ModelError(
            f"{type(model).__name__} has {len(blocks)} MoE layers, its config tells of {len(experts)} and {len(active)}"
        )
    routers = [getattr(block, "gate", None) or block.router for _, block in blocks]
    return tuple(
        MoELayer(i, name, block, routers[i], block.experts, experts[i], active[i], *expert_groups(routers[i], block))
        for i, (name, block) in enumerate(blocks)
    )


def _float_dtype(experts: nn.Module, default: torch.dtype) -> torch.dtype:
    """Of an experts module's first floating parameter: quantised ones are integers, their hidden states are not."""
    return next((p.dtype for p in experts.parameters(recurse=False) if p.dtype in FLOATS), default)


def _all_tensors(output: tuple[object, ...]) -> bool:
    return all(isinstance(t, Tensor) for t in output)


def weights_map(module: nn.Module) -> Mapping[str, Tensor]:
    """Where accelerate keeps a module's own parameters between forwards, by name; empty without offload."""
    hook = getattr(module, "_hf_hook", None)
    maps = (getattr(h, "weights_map", None) for h in getattr(hook, "hooks", (hook,)))
    return next((m for m in maps if m is not None), {})


def __offloads_any(module: nn.Module) -> bool:
    return any(bool(weights_map(m)) for m in module.modules())
