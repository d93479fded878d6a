"""How many bytes the tensors of a plan's checkpoint take, without writing it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeopt.exporting.exporter import Prepared
from moeopt.exporting.folders import locate
from moeopt.exporting.layout import Roles, placed_parts
from moeopt.exporting.quantised import Quantised
from moeopt.exporting.source import Source
from moeopt.exporting.stock import chosen_form, read_config
from moeopt.models import empty_model, moe_layers
from moeopt.models.names import NUMBERED
from moeopt.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REST = -1
"""Stands for a layer: all tensors that belong to none."""


class ExportedBytes:
    """Bytes of the tensors of the checkpoint that `export` would write for a plan, exactly.

    What a layer takes follows from a few facts of its plan. The checkpoint is laid out for each such set of facts, in
    all layers at a time (seconds where it has ten thousands of tensors), with two numbers of experts: where all are of
    one size, a layer's bytes are linear in that.

    Args:
        model: the full model as it was loaded from its checkpoint, or the checkpoint's folder or hub name.

    Raises:
        ExportError: when there is no such checkpoint, or `export` does not read it.
        ModelError: when transformers has no class for it that moeopt knows.
    """

    def __init__(self, model: PreTrainedModel | str | Path) -> None:
        self._folder = locate(model)
        self._laid_out: dict[tuple[Any, ...], dict[int, Counter[int]]] = defaultdict(dict)
        empty = empty_model(self._folder)
        layers = moe_layers(empty)
        with Source(self._folder) as source:
            quantised = Quantised.among(read_config(self._folder), source.tensors)
            places, roles = placed_parts(empty, source.tensors, quantised), Roles(empty, layers)
            self._owners = {
                module: layer.index for kind in (roles.routers, roles.experts) for module, layer in kind.items()
            }
            experts: dict[tuple[int, int], int] = defaultdict(int)
            for name, place in places.items():
                role, number = roles.find(place), NUMBERED.search(name)
                if role is None:
                    continue
                self._owners[name.rpartition(".")[0]] = role[1].index
                if role[0] == "experts" and number is not None:
                    self._owners[f"{name[: number.start()]}.experts"] = role[1].index
                    experts[role[1].index, int(number[1])] += source.tensors[name].nbytes
        sizes = defaultdict(set)
        for (index, _), size in experts.items():
            sizes[index].add(size)
        self._differ = any(len(each) > 1 for each in sizes.values())
        self.full = self(Plan(tuple(LayerPlan(x.n, x.k, kept=tuple(range(x.n))) for x in layers)))

    def __call__(self, plan: Plan) -> int:
        """The bytes.

        Raises:
            ExportError: when the plan cannot be exported from this checkpoint.
        """
        form, _ = chosen_form(plan, self._folder)
        parts = [self._of(part, form, len(plan.layers)) for part in plan.layers]
        return parts[0][REST] + sum(part[i] for i, part in enumerate(parts))

    def _of(self, part: LayerPlan, form: Literal["stock", "custom"], n_layers: int) -> Counter[int]:
        """Bytes of every layer, were all planned like `part`."""
        rows = part.router_rows
        facts = (
            form, "rows" if form == "stock" else part.router, rows is None, part.makes_experts,
            part.sums_experts, part.down is None, None if part.novices is None else part.novices.shape,
            part.kept if self._differ else None,
        )  # fmt: skip
        counted, r = self._laid_out[facts], part.kept_experts
        if r not in counted and len(counted) > 1 and not self._differ:
            (a, at_a), (b, at_b) = list(counted.items())[:2]
            counted[r] = Counter({i: at_a[i] + (at_b[i] - at_a[i]) * (r - a) // (b - a) for i in at_a | at_b})
        if r not in counted:
            sizes: Counter[int] = Counter()
            with Source(self._folder) as source:
                tensors = Prepared(source, Plan((part,) * n_layers), form).layout.tensors
            for name, tensor in tensors.items():
                sizes[self._owners.get(name.rpartition(".")[0], REST)] += tensor.nbytes
            counted[r] = sizes
        return counted[r]
