"""What the tensors of the smaller checkpoint are, and which numbers of the full one make each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, dtype
from transformers import PreTrainedModel

from moeopt.errors import ExportError
from moeopt.exporting.quantised import Quantised
from moeopt.exporting.source import BYTES, Source, Stored, dtype_name, torch_dtype
from moeopt.models import MoELayer, Placed, lacking, merge, placed
from moeopt.models.layers import given_tensors
from moeopt.models.merging import CHUNK_BYTES, DOWN, new_expert, write_down
from moeopt.models.mixing import ExpertForm
from moeopt.models.names import NUMBERED, renamed
from moeopt.plan import LayerPlan, Matrix, Plan
from moeopt.showing import listed

SPLIT = re.compile(r"(.*\.experts\.)\d+\.(gate_proj|up_proj|down_proj)\.weight$")
"""The linear layer of one expert."""
SPLIT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), DOWN: (DOWN,)}
"""Which of them a tensor of all experts holds."""
COPIED = 1 << 22
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Slice:
    """Numbers `start` to `start + length` of a tensor, counted in its order in memory."""

    name: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Made:
    """Slices of new tensors, each equal to one slice of the old ones (`rows`) or a mixture of all (`matrix`, (r, n)).

    All slices have one length.
    """

    outputs: tuple[Slice, ...]
    inputs: tuple[Slice, ...]
    rows: tuple[int, ...] | None = None
    matrix: Matrix | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """The smaller checkpoint before anything is written.

    Args:
        tensors: name, dtype and shape of every tensor, in the order of the full checkpoint.
        made: how those are made that come from the full checkpoint.
        given: the others, each made when its turn comes.
        new: names of those among them that are experts' weights.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    given: dict[str, Callable[[Source], Tensor]] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def merged_dtypes(self) -> set[dtype]:
        """Dtypes of tensors that are mixtures or sums, which rounds them."""
        names = [made.outputs[0].name for made in self.made if made.matrix is not None] + self.new
        return {torch_dtype(self.tensors[name].dtype) for name in names}

    def parts(self, source: Source) -> Iterator[tuple[str, int, bytes]]:
        """Every byte of every tensor in pieces of a few MiB: name, place of the first byte, bytes."""
        for made in self.made:
            size = BYTES[self.tensors[made.outputs[0].name].dtype]
            if made.rows is not None:
                for output, row in zip(made.outputs, made.rows):
                    old = made.inputs[row]
                    step = max(1, COPIED // size)
                    for at in range(0, old.length, step):
                        stop = min(at + step, old.length)
                        piece = source.read(old.name, old.start + at, old.start + stop)
                        yield output.name, (output.start + at) * size, piece
            else:
                yield from self._mixed(made, source, size)
        for name, make in self.given.items():
            yield name, 0, make(source).contiguous().view(torch.uint8).numpy().tobytes()

    def _mixed(self, made: Made, source: Source, size: int) -> Iterator[tuple[str, int, bytes]]:
        """In the steps of `merge`, so that rounding is the same."""
        assert made.matrix is not None
        matrix = torch.from_numpy(made.matrix.copy())
        kind = torch_dtype(self.tensors[made.outputs[0].name].dtype)
        length, step = made.inputs[0].length, max(1, CHUNK_BYTES // (4 * len(made.inputs)))
        for at in range(0, length, step):
            stop = min(at + step, length)
            stacked = torch.stack([source.tensor(old.name, old.start + at, old.start + stop) for old in made.inputs])
            mixed = merge(matrix, stacked.to(kind))
            for output, row in zip(made.outputs, mixed):
                yield output.name, (output.start + at) * size, row.view(torch.uint8).numpy().tobytes()


def lay_out(
    source: Source,
    plan: Plan,
    model: PreTrainedModel,
    layers: tuple[MoELayer, ...],
    *,
    form: str,
    quantised: Quantised,
    left_out: Collection[str] = (),
) -> Layout:
    """The layout of a plan's checkpoint.

    Args:
        source: the full checkpoint.
        plan: for `form` "stock", one that `stock_form` gave.
        model: what the full checkpoint's config describes, without weights; `layers` are its MoE layers.
        form: "stock", or "custom": routers that are mapped after their scores stay whole, the mapping joins them.
        quantised: weights of the checkpoint that are.
        left_out: names of tensors that are not written.

    Raises:
        ExportError: when a tensor is missing or not stored as moeopt knows it.
    """
    places = placed_parts(model, source.tensors, quantised)
    roles = Roles(model, layers)
    absent = lacking(model, places, {name: layer.n for name, layer in roles.experts.items()})
    if absent:
        raise ExportError(
            f"{str(source.folder)!r} is incomplete: it lacks {listed(absent)}, which would be filled with random "
            "numbers"
        )
    layout, state = Layout(), model.state_dict()
    for name, stored in source.tensors.items():
        if name in left_out:
            continue
        role = roles.find(places.get(name))
        if (
            role is not None
            and role[1].n not in stored.shape
            and name not in quantised.parts
            and roles.is_shared(places[name].name, *role)
        ):
            role = None
        if role is None:
            layout.tensors[name] = stored
            layout.made.append(_copied(name, stored.size))
            continue
        kind, layer = role
        part = plan.layers[layer.index]
        if kind == "experts" and part.makes_experts and places[name].pattern in ("gate_proj", "up_proj", DOWN):
            raise ExportError(
                f"{name!r} is of one expert, and {type(model).__name__} has all in one tensor, and would not load such "
                "experts made anew: keep experts (a one-hot plan), or export from the unquantised checkpoint"
            )
        leaf = places[name].name.rpartition(".")[2]
        if kind == "experts" and (not part.sums_experts or (part.down is not None and leaf == DOWN)):
            _check_form(name, stored, state[places[name].name])
            _lay_new(layout, name, source, part, leaf, ExpertForm.from_module(layer.experts))
        elif kind == "experts":
            _lay_experts(layout, name, source, part, quantised)
        elif form == "custom" and (part.router == "prob" or part.picks_among_all):
            layout.tensors[name] = stored
            layout.made.append(_copied(name, stored.size))
        else:
            dense = part.router_rows is None
            if name in quantised.parts:
                _lay_quantised_rows(layout, name, stored, part, quantised)
                continue
            _lay_stacked(layout, name, stored, part, part.router_rows, part.router_matrix)
            needed = dtype_name(state[places[name].name].dtype)
            if dense and BYTES[needed] > BYTES[stored.dtype]:  # a router that is float32 in any model
                layout.tensors[name] = replace(layout.tensors[name], dtype=needed)
    if form == "custom":
        _add_mappings(layout, plan, model, roles, places)
    return layout


class Roles:
    """Which tensors of a model belong to the routers and experts of its MoE layers.

    Attributes:
        routers, experts: the layers by the names of those modules.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[MoELayer, ...]) -> None:
        names = {module: name for name, module in model.named_modules()}
        self.routers = {names[layer.router]: layer for layer in layers}
        self.experts = {names[layer.experts]: layer for layer in layers}
        self._given = {
            f"{layer.name}.{tensor}": layer for layer in layers for tensor in given_tensors(layer.block, layer.router)
        }

    def find(self, place: Placed | None) -> tuple[str, MoELayer] | None:
        """Whether a tensor is a router's or experts', and of which layer."""
        for kind, modules in (("routers", self.routers), ("experts", self.experts)):
            for module, layer in modules.items():
                if place is not None and place.name.startswith(f"{module}."):
                    return kind, layer
        given = None if place is None else self._given.get(place.name)
        return None if given is None else ("routers", given)

    def is_shared(self, name: str, kind: str, layer: MoELayer) -> bool:
        """Whether a parameter may be one for all experts: a router's, or of a module inside the experts'.

        Such as what hidden states are multiplied with before they are routed, and norms.
        """
        return kind == "routers" or "." in name.removeprefix(f"{layer.name}.experts.")


def check_understood(
    source: Source, places: Mapping[str, Placed], roles: Roles, quantised: Quantised
) -> dict[str, MoELayer]:
    """The layers of a checkpoint by what it calls their experts modules.

    Raises:
        ExportError: when a tensor beside those of experts or routers is none that the model reads, or experts are
            quantised in a way that their method does not have.
    """
    experts: dict[str, MoELayer] = {}
    routers, of_experts = set(), []
    for name, place in places.items():
        role = roles.find(place)
        number, module = NUMBERED.search(name), quantised.parts.get(name, name).rpartition(".")[0]
        if role is not None and role[0] == "experts":
            experts[f"{name[: number.start()]}.experts" if number else module] = role[1]
            of_experts.append(name)
        elif role is not None:
            routers.add(module)
    quantised.check(source.tensors, of_experts)
    for name in source.tensors:
        module = name.rpartition(".")[0]
        if name not in places and (module in routers or any(name.startswith(f"{inner}.") for inner in experts)):
            raise ExportError(
                f"{name!r} is beside the tensors of {'a router' if module in routers else 'experts'}, and moeopt does "
                "not know what it is, nor how to prune it"
                + (f"; {quantised.method} has no such tensor" if quantised.method else "")
            )
    return experts


def placed_parts(model: PreTrainedModel, names: Iterable[str], quantised: Quantised) -> dict[str, Placed]:
    """`placed`, the tensors of a quantised weight where the weight goes.

    Tools that quantise linear layers split experts that their family has in one tensor. transformers does not load such
    files; their experts are told by the layers' usual names.
    """
    weights = {name: quantised.parts.get(name, name) for name in names}
    places = placed(model, dict.fromkeys(weights.values()))
    if quantised.method is not None:
        split = {
            weight: match for weight in weights.values() if weight not in places and (match := SPLIT.match(weight))
        }
        leaves = {match[1] + leaf for match in split.values() for leaf in SPLIT_PARTS}
        whole = placed(model, leaves)
        for weight, match in split.items():
            leaf = next(leaf for leaf, parts in SPLIT_PARTS.items() if match[2] in parts)
            if match[1] + leaf in whole:
                together = SPLIT_PARTS[leaf]
                places[weight] = Placed(whole[match[1] + leaf].name, pattern=match[2], together=together)
    return {name: places[weight] for name, weight in weights.items() if weight in places}


def _copied(name: str, size: int, new_name: str | None = None) -> Made:
    return Made((Slice(new_name or name, 0, size),), (Slice(name, 0, size),), rows=(0,))


def _lay_experts(layout: Layout, name: str, source: Source, part: LayerPlan, quantised: Quantised) -> None:
    stored, number = source.tensors[name], NUMBERED.search(name)
    if number is not None and part.kept is not None and quantised.weights:
        # all that an expert has goes with it, as some experts may be stored otherwise than others
        for i in (i for i, j in enumerate(part.kept) if j == int(number[1])):
            new_name = f"{name[: number.start(1)]}{i}{name[number.end(1) :]}"
            layout.tensors[new_name] = stored
            layout.made.append(_copied(name, stored.size, new_name))
        return
    numbered = _numbered(name, source, part)
    if numbered is None:
        _lay_stacked(layout, name, stored, part, part.kept, part.expert_matrix)
        return
    i, names = numbered
    if i >= part.kept_experts:
        return
    layout.tensors[name] = stored
    if i:  # made together with those of expert 0
        return
    inputs, outputs = (
        tuple(Slice(other, 0, stored.size) for other in some) for some in (names, names[: part.kept_experts])
    )
    layout.made.append(_made(outputs, inputs, part.kept, part.expert_matrix, name, stored))


def _numbered(name: str, source: Source, part: LayerPlan) -> tuple[int, list[str]] | None:
    """The number of the expert that a tensor belongs to, and the like tensors of all n; None: it holds all experts'."""
    stored, number = source.tensors[name], NUMBERED.search(name)
    if number is None:
        return None
    i, names = int(number[1]), [f"{name[: number.start(1)]}{j}{name[number.end(1) :]}" for j in range(part.experts)]
    for other in names if i == 0 else ():
        there = source.tensors.get(other)
        if there is None or (there.shape, there.dtype) != (stored.shape, stored.dtype):
            raise ExportError(f"{other!r} is not of the shape and dtype of {name!r}, {stored.shape} {stored.dtype}")
    return i, names


def _check_form(name: str, stored: Stored, model: Tensor) -> None:
    """What holds all experts must do so as the model does, as places in it are counted by its axes."""
    if len(stored.shape) == model.ndim and stored.shape != tuple(model.shape):
        raise ExportError(
            f"{name!r} has shape {stored.shape} and is {tuple(model.shape)} in the model, so that its experts cannot "
            "be made anew"
        )


def _lay_new(layout: Layout, name: str, source: Source, part: LayerPlan, leaf: str, form: ExpertForm) -> None:
    """A tensor of experts that is made whole, of one expert or of all: fitted, or of experts mixed in an order.

    Args:
        leaf: its name in the experts module.
        form: of the experts there; a tensor of one expert is (out, in), as of any linear layer.
    """
    stored, numbered, r = source.tensors[name], _numbered(name, source, part), part.kept_experts
    # a checkpoint that names its experts one by one stores linear layers, which transformers transposes on loading
    form = form if numbered is None else replace(form, transposed=False)
    shape = stored.shape if numbered is not None else stored.shape[1:]
    down = part.down if leaf == DOWN else None
    if down is not None and (shape[::-1] if form.transposed else shape) != down.shape[1:]:
        raise ExportError(
            f"{name!r} has shape {stored.shape}, the plan has down projections of (hidden, inner) = {down.shape[1:]}"
        )
    if numbered is not None and numbered[0] >= r:
        return
    kind = torch_dtype(stored.dtype)
    if not kind.is_floating_point or BYTES[stored.dtype] < 2:
        raise ExportError(f"{name!r} is stored as {stored.dtype}, which new weights cannot be written in")
    layout.tensors[name] = stored if numbered is not None else replace(stored, shape=(r, *shape))

    def expert(source: Source, j: int) -> Tensor:
        if numbered is not None:
            return source.tensor(numbered[1][j]).view(shape)
        size = math.prod(shape)
        return source.tensor(name, j * size, (j + 1) * size).view(shape)

    def made(source: Source) -> Tensor:
        out = torch.empty(r if numbered is None else 1, *shape, dtype=kind)
        for place, i in enumerate(range(r) if numbered is None else [numbered[0]]):
            given = partial(new_expert, part, i, leaf, partial(expert, source), form)
            if down is None:
                out[place] = given()
            else:
                write_down(down, i, given, out[place], form.transposed)
        return out if numbered is None else out[0]

    layout.given[name] = made
    layout.new.append(name)


def _lay_stacked(
    layout: Layout, name: str, stored: Stored, part: LayerPlan, rows: tuple[int, ...] | None, matrix: Matrix
) -> None:
    """A tensor (n, ...) or, of routers that number their experts last, (1, n)."""
    shape, n, r = stored.shape, part.experts, part.kept_experts
    place = next((i for i, size in enumerate(shape) if size == n and math.prod(shape[:i]) == 1), None)
    if place is None:
        raise ExportError(f"{name!r} has shape {shape}, which is not one of {n} experts")
    length = math.prod(shape[place + 1 :])
    layout.tensors[name] = replace(stored, shape=(*shape[:place], r, *shape[place + 1 :]))
    inputs, outputs = (tuple(Slice(name, i * length, length) for i in range(count)) for count in (n, r))
    layout.made.append(_made(outputs, inputs, rows, matrix, name, stored))


def _lay_quantised_rows(layout: Layout, name: str, stored: Stored, part: LayerPlan, quantised: Quantised) -> None:
    """A tensor of a router's quantised weight (n, hidden): a scale for all rows, or one entry or more for each."""
    rows, packing = part.router_rows, quantised.packings[quantised.parts[name]]
    by_row = stored.shape[:1] == (part.experts,) and not name.endswith(".weight_zero_point")
    if rows is None or not packing.rows or not (by_row or stored.size == 1):
        raise ExportError(
            f"{name!r} is of a router that is quantised by {quantised.method}, whose rows cannot be "
            f"{'mapped' if rows is None else 'selected'} as they are; export from the unquantised checkpoint"
        )
    if by_row:
        _lay_stacked(layout, name, stored, part, rows, part.router_matrix)
    else:
        layout.tensors[name] = stored
        layout.made.append(_copied(name, stored.size))


def _made(
    outputs: tuple[Slice, ...],
    inputs: tuple[Slice, ...],
    rows: tuple[int, ...] | None,
    matrix: Matrix,
    name: str,
    stored: Stored,
) -> Made:
    if rows is not None:
        return Made(outputs, inputs, rows=rows)
    if not torch_dtype(stored.dtype).is_floating_point or BYTES[stored.dtype] < 2:
        raise ExportError(f"{name!r} is stored as {stored.dtype}, which cannot be merged")
    return Made(outputs, inputs, matrix=matrix)


def _add_mappings(layout: Layout, plan: Plan, model: PreTrainedModel, roles: Roles, places: dict[str, Placed]) -> None:
    """What the routers and experts of a custom checkpoint hold beside the family's tensors.

    W_RM, float32 (r, n), aliases, or places, int64 (n,), beside the weights of the routers that they belong to, and
    novices, float32 (n - r, hidden), with the experts.
    """
    for module, layer in roles.routers.items():
        end = f".{module.rpartition('.')[2]}.weight"
        beside = (name for name, place in places.items() if place.name == f"{module}.weight" and name.endswith(end))
        router = next(beside, f"{module}.weight").removesuffix(".weight")
        # some conversions rename the router's weight alone: then what joins it has the model's own name on disk
        is_renamed = renamed(model, f"{router}.weight") == f"{module}.weight"
        for leaf, tensor in _mappings(plan.layers[layer.index]).items():
            name, in_model = (
                f"{place.rpartition('.')[0]}.experts.{leaf}" if leaf == "novices" else f"{place}.{leaf}"
                for place in (router, module)
            )
            name = in_model if is_renamed and renamed(model, name) != in_model else name
            layout.tensors[name] = Stored(dtype_name(tensor.dtype), tuple(tensor.shape))
            layout.given[name] = lambda source, tensor=tensor: tensor  # type: ignore[misc]


def _mappings(part: LayerPlan) -> dict[str, Tensor]:
    if part.aliases is not None:
        return {"aliases": torch.tensor(part.aliases)}
    if part.novices is not None:
        return {"places": torch.tensor(part.places), "novices": torch.from_numpy(part.novices.copy())}
    return {"w_rm": torch.from_numpy(part.router_matrix.copy())} if part.router == "prob" else {}
