"""How large a model is, whole and per token: as it stands, or as a plan would leave it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moeopt.models.layers import MoELayer, moe_layers
from moeopt.plan import LayerPlan, Plan

MAP_BYTES = 4
"""A dense router mapping is kept in float32."""


@dataclass(frozen=True)
class Size:
    """Of a model's parameters, and of what else its checkpoint holds for it to compute with, such as a router's bias.

    Args:
        parameters: their number.
        active: how many of them a token uses: all but those of the experts that do not run for it.
        bytes: what they take, in the dtypes that the full model has in memory.
    """

    parameters: int
    active: int
    bytes: int


@dataclass(frozen=True)
class _Layer:
    """Parameters and bytes of a MoE layer: of one expert, and of one expert's part of the router."""

    n: int
    k: int
    expert: tuple[int, int]
    row: tuple[int, int]


class Sizes:
    """Sizes of a model under any plan.

    Args:
        model: the full model; offloaded parameters count as they are.
        layers: its MoE layers. None: those that `moe_layers` finds; an empty sequence: it is dense.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer] | None = None) -> None:
        self._whole = _measure(_weights(model))
        self._layers = [
            _Layer(
                layer.n,
                layer.k,
                _share(_weights_of_experts(layer.experts), layer.n),
                _share((p for p in _weights(layer.router) if p.shape[:1] == (layer.n,)), layer.n),
            )
            for layer in (moe_layers(model) if layers is None else layers)
        ]

    @property
    def expert_bytes(self) -> list[int]:
        """Bytes of one expert of each MoE layer."""
        return [layer.expert[1] for layer in self._layers]

    def under(self, plan: Plan | None = None, active: Sequence[float] | None = None) -> Size:
        """The size of the checkpoint that holds the plan; None: of the full model.

        Args:
            plan: it.
            active: mean number of experts that a token runs in each layer; None: k.
        """
        parameters, size = self._whole
        idle = 0.0
        for i, layer in enumerate(self._layers):
            part = None if plan is None else plan.layers[i]
            r, k = (layer.n, layer.k) if part is None else (part.kept_experts, part.k)
            rows = layer.n if part is None else _router_rows(part)
            parameters -= (layer.n - r) * layer.expert[0] + (layer.n - rows) * layer.row[0]
            size -= (layer.n - r) * layer.expert[1] + (layer.n - rows) * layer.row[1]
            if part is not None and _maps_probabilities(part):
                parameters += r * layer.n
                size += r * layer.n * MAP_BYTES
            if part is not None and part.novices is not None:
                parameters += part.novices.size
                size += part.novices.nbytes
            idle += (r - min(r, k if active is None else active[i])) * layer.expert[0]
        return Size(parameters, parameters - round(idle), size)


def _router_rows(layer: LayerPlan) -> int:
    """Rows of the planned router's weight: a map of probabilities, aliases and novices need those of all n experts."""
    return layer.experts if layer.picks_among_all or _maps_probabilities(layer) else layer.kept_experts


def _maps_probabilities(layer: LayerPlan) -> bool:
    return layer.router == "prob" and layer.router_rows is None


def _weights(module: nn.Module) -> list[Tensor]:
    """Its parameters, shared ones once, and the floating buffers that its checkpoint holds."""
    held = set(module.state_dict())
    buffers = [b for name, b in module.named_buffers() if name in held and b.is_floating_point()]
    return [*module.parameters(), *buffers]


def _weights_of_experts(experts: nn.Module) -> list[Tensor]:
    """Those that are experts', not the novices that an exported checkpoint keeps beside them."""
    novices = experts._buffers.get("novices")
    return [tensor for tensor in _weights(experts) if tensor is not novices]


def _measure(tensors: Iterable[Tensor]) -> tuple[int, int]:
    every = list(tensors)
    return sum(p.numel() for p in every), sum(p.numel() * p.element_size() for p in every)


def _share(parameters: Iterable[Tensor], n: int) -> tuple[int, int]:
    count, size = _measure(parameters)
    return count // n, size // n
