"""Quantised checkpoints: which tensors make one weight, and what config.json says of experts by their number.

Every method stores a weight as several tensors, all of which belong to one expert: pruning takes them along byte for
byte, whatever their numbers mean. What they mean is known to `dequantising` only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeopt.errors import ExportError
from moeopt.plan import LayerPlan, Plan
from moeopt.showing import listed

if TYPE_CHECKING:
    from moeopt.exporting.source import Stored

FLOATS = ("F64", "F32", "F16", "BF16")
NUMBER = re.compile(r"^(.*(?:^|\.)experts)\.(\d+)(?=\.|$)(.*)$")
"""The name of a module of one expert: that of the module of all, its number, and the rest."""


@dataclass(frozen=True)
class Packing:
    """How a method stores one weight; tensors are told by the ends of their names.

    Args:
        weight: how the weight's name ends where it is not quantised.
        main: of the tensor that holds its numbers.
        needed: ends of the tensors beside it; of each group exactly one is there.
        more: ends of others that may be there.
        rows: whether rows of the weight are rows of these tensors.
    """

    weight: str
    main: str
    needed: tuple[tuple[str, ...], ...]
    more: tuple[str, ...] = ()
    rows: bool = True

    @property
    def beside(self) -> tuple[str, ...]:
        """Ends of all tensors that may lie beside the main one."""
        return (*(end for group in self.needed for end in group), *self.more)


OF_INPUTS = (".input_scale", ".input_zero_point", ".input_global_scale", ".activation_scale", ".qscale_act")
"""Ends of tensors by which a layer quantises what it is given; who dequantises its weights needs none."""
_FP8 = (
    Packing(".weight", ".weight", ((".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"),), OF_INPUTS),
    Packing("", "", (("_scale_inv",),), ("_activation_scale",)),  # all experts in one tensor
)
_COLUMNS = ((".scales",), (".qzeros",))
METHODS: dict[str, tuple[Packing, ...]] = {
    "fp8": _FP8,
    "mxfp8": _FP8,
    "mxfp4": (Packing("", "_blocks", (("_scales",),)),),
    "compressed-tensors": (
        Packing(
            ".weight",
            ".weight_packed",
            ((".weight_scale",),),
            (".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale", *OF_INPUTS),
        ),
        Packing(".weight", ".weight", ((".weight_scale",),), (".weight_zero_point", ".weight_g_idx", *OF_INPUTS)),
    ),
    "awq": (Packing(".weight", ".qweight", _COLUMNS, (".bias",), rows=False),),
    "gptq": (Packing(".weight", ".qweight", (*_COLUMNS, (".g_idx",)), (".bias",), rows=False),),  # zeros, of AutoGPTQ
}
"""By the `quant_method` of a config."""
MERGEABLE = ("fp8", "mxfp8", "mxfp4")
"""Methods whose experts are dequantised to be merged: their loaders take layers that are not converted."""


def quantisation(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The method of a checkpoint's config and its settings; None and nothing where it is not quantised.

    Raises:
        ExportError: when moeopt does not know how the method stores experts.
    """
    _, settings = _settings(config)
    if not settings:
        return None, {}
    method = str(settings.get("quant_method"))
    if method not in METHODS:
        raise ExportError(
            f"the checkpoint is quantised by {method!r}, and moeopt knows how experts are stored by "
            f"{', '.join(METHODS)}; export from the unquantised checkpoint and quantise the result"
        )
    return method, settings


def _settings(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The part of a config that holds the settings of quantisation, and these."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and isinstance(settings, dict) and settings:
            return part, settings
    return config, {}


def why_not_quantised(plan: Plan, config: Mapping[str, Any], form: str) -> str | None:
    """Why a quantised checkpoint cannot be exported under the plan, and what would; None when it can."""
    method, settings = quantisation(config)
    if method is None:
        return None
    made = [i for i, part in enumerate(plan.layers) if part.makes_experts]
    if made and method not in MERGEABLE:
        return (
            f"layer {made[0]} of the plan has experts of new weights (merged or refitted), and the checkpoint is "
            f"quantised by {method}, which they cannot be written in; keep experts (a one-hot plan), or export from "
            "the unquantised checkpoint and quantise the result"
        )
    if form == "custom" and not _is_dequantised(method, settings):
        return (
            f"it needs a class of its own, which transformers cannot load weights of {method} such as these into: "
            "search with PruneSpace, whose plans are ordinary checkpoints, or export from the unquantised checkpoint"
        )
    return None


def _is_dequantised(method: str, settings: dict[str, Any]) -> bool:
    """Whether transformers dequantises experts as it loads, also into a class that a checkpoint brings."""
    if method != "compressed-tensors":
        return method in MERGEABLE
    from moeopt.models.quantisation import why_not_compressed  # it loads torch

    return why_not_compressed(settings) is None


@dataclass(frozen=True)
class Quantised:
    """The quantised weights of a checkpoint.

    Args:
        method: by which they are; None: there are none.
        weights: the name that each would have were it not quantised: the names of its tensors by their ends.
        packings: how each is stored.
        parts: the weight that each of those tensors belongs to.
    """

    method: str | None = None
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    packings: dict[str, Packing] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def among(cls, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Quantised:
        """Those among the tensors of a checkpoint.

        Raises:
            ExportError: when one lacks a tensor that its method has.
        """
        method, _ = quantisation(config)
        quantised = cls(method)
        for packing in METHODS[method] if method else ():
            for name, stored in tensors.items():
                if not name.endswith(packing.main) or name in quantised.parts or stored.dtype in FLOATS:
                    continue
                stem = name[: len(name) - len(packing.main)]
                beside = {end: stem + end for end in packing.beside if stem + end in tensors}
                if packing.weight == packing.main and not beside:
                    continue
                weight = stem + packing.weight
                for group in packing.needed:
                    if not any(end in beside for end in group):
                        raise ExportError(f"{name!r} is quantised by {method}, and {stem + group[0]!r} is missing")
                quantised.weights[weight] = {packing.main: name, **beside}
                quantised.packings[weight] = packing
                quantised.parts.update(dict.fromkeys((name, *beside.values()), weight))
        return quantised

    def plain(self, names: Iterable[str]) -> list[str]:
        """Names of tensors with those of every quantised weight as that of the weight."""
        return list(dict.fromkeys(self.parts.get(name, name) for name in names))

    def check(self, tensors: Mapping[str, Stored], experts: Collection[str]) -> None:
        """Raise ExportError where a tensor of experts has numbers that no method explains, or experts of a layer are
        stored in different parts.

        Args:
            tensors: of the checkpoint.
            experts: names of those among them that are experts'.
        """
        ends: dict[str, tuple[str, set[str]]] = {}
        for name in experts:
            weight = self.parts.get(name)
            if weight is None and tensors[name].dtype not in FLOATS:
                missing = f"the tensors that {self.method} has beside it" if self.method else "a quantization_config"
                raise ExportError(f"{name!r} is stored as {tensors[name].dtype} without {missing}")
            if weight is None:
                continue
            number = NUMBER.match(weight)
            like = f"{number[1]}.*{number[3]}" if number else weight
            first, same = ends.setdefault(like, (weight, set(self.weights[weight])))
            differing = same.symmetric_difference(self.weights[weight])
            if differing:
                raise ExportError(
                    f"the tensors of {weight!r} are not those of {first!r}: they differ in {listed(sorted(differing))}"
                )


def edit_settings(
    config: dict[str, Any],
    experts: Mapping[str, LayerPlan],
    modules: Collection[str],
    remaining: Quantised,
    *,
    custom: bool,
) -> None:
    """Make a config tell of the smaller checkpoint's quantisation.

    Lists and tables of modules keep naming the same experts under their new numbers, those that are gone are dropped
    from them, and layers of merged experts join the modules that are not converted. Where nothing is quantised any
    more, the settings go.

    Args:
        config: what config.json will hold; its settings are replaced.
        experts: the plan of each module of experts, by its name in the full checkpoint.
        modules: of the full checkpoint that hold weights.
        remaining: the quantised weights of the smaller checkpoint.
        custom: whether it loads as a class of its own, in which weights are dequantised.
    """
    part, settings = _settings(config)
    if not settings:
        return
    assert isinstance(part, dict)
    if not remaining.weights:
        del part["quantization_config"]
        return
    moved = _moved(settings, _Renumbering(experts, modules))
    merged = [name for name, layer in experts.items() if layer.makes_experts]
    if merged:
        # without a list transformers leaves the head alone, with one only what is in it
        skipped = moved.get("modules_to_not_convert") or ["lm_head"]
        moved["modules_to_not_convert"] = [*skipped, *merged]
    if custom:
        moved["dequantize"] = True
    part["quantization_config"] = moved


class _Renumbering:
    """What an entry that names modules becomes when experts get other numbers.

    Args:
        experts: the plan of each module of experts.
        modules: all names that an entry may match.
    """

    def __init__(self, experts: Mapping[str, LayerPlan], modules: Collection[str]) -> None:
        self.new: dict[str, dict[int, list[int]]] = {}
        for name, layer in experts.items():
            numbers: dict[int, list[int]] = defaultdict(list)
            for i, j in enumerate(() if layer.makes_experts or layer.kept is None else layer.kept):
                numbers[j].append(i)
            self.new[name] = dict(numbers)
        blocks = (NUMBER.match(name) for name in modules)
        self.blocks = {match[1] for match in blocks if match}
        self.modules = set(modules) | {match[1] + "." + match[2] for m in modules if (match := NUMBER.match(m))}

    def name(self, entry: str) -> list[str]:
        """Of the name of a module, whole or its end."""
        match = NUMBER.match(entry)
        if match is None:
            return [entry]
        layers = [match[1]] if match[1] in self.new else []
        if match[1] not in self.blocks:  # not as the checkpoint names them
            layers = [name for name in self.new if _same_place(name, match[1])]
        if not layers:  # of a block that the model does not read
            return [entry]
        numbers = [self.new[name].get(int(match[2]), []) for name in layers]
        if all(other == numbers[0] for other in numbers):
            return [f"{match[1]}.{i}{match[3]}" for i in numbers[0]]
        return [f"{name}.{i}{match[3]}" for name, new in zip(layers, numbers) for i in new]

    def pattern(self, entry: str) -> list[str] | None:
        """Names of the modules that a regular expression matches, renumbered; None: it holds of any numbers.

        Raises:
            ExportError: when it is none.
        """
        try:
            matches = re.compile(entry).match
        except re.error as error:
            raise ExportError(f"quantization_config holds {entry!r}, which is no regular expression: {error}") from None
        like: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
        for name in self.modules:
            number = NUMBER.match(name)
            if number is not None and number[1] in self.new:
                like[number[1], number[3]][name] = matches(name) is not None
        if all(len(set(matched.values())) == 1 for matched in like.values()):
            return None
        return [new for name in sorted(self.modules) if matches(name) for new in self.name(name)]


def _same_place(name: str, entry: str) -> bool:
    """Whether an entry is a module's name, its end, or its name in a model that holds it elsewhere."""
    inner, other = (text[text.index("layers.") :] if "layers." in text else text for text in (name, entry))
    return inner == other or f".{name}".endswith(f".{entry}")


def _moved(value: Any, renumbering: _Renumbering, key: str = "") -> Any:
    """Settings with every list and table of modules renumbered."""
    if isinstance(value, dict):
        return dict(_entries(value, renumbering, key))
    if isinstance(value, list):
        names: list[Any] = []
        for entry in value:
            names += _renamed(entry, renumbering, "") if isinstance(entry, str) else [_moved(entry, renumbering)]
        return names
    return value


def _entries(value: dict[str, Any], renumbering: _Renumbering, key: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        for new in _renamed(name, renumbering, key):
            yield new, _moved(inner, renumbering, name)


def _renamed(entry: str, renumbering: _Renumbering, table: str) -> list[str]:
    """An entry of a list, or a key of the table of that name, as what names the same modules."""
    sign = next((sign for sign in ("re:", "+:", "-:") if entry.startswith(sign)), "")
    if "experts" not in entry:
        return [entry]
    if not sign and table != "dynamic":
        return renumbering.name(entry)
    names = renumbering.pattern(entry.removeprefix(sign))
    if names is None:
        return [entry]
    return [f"{sign}{re.escape(name)}$" for name in names] if table == "dynamic" else names
