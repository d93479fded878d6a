"""Which parameter of a model each tensor of a checkpoint becomes, by transformers' own conversion of names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

NUMBERED = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Placed:
    """Where a tensor of a checkpoint goes.

    Args:
        name: of the parameter or buffer, the first one if there are several.
        also: the others that it becomes a part of.
        pattern: of the conversion that makes them, None where the tensor is taken as it is.
        together: patterns of all tensors that the conversion needs.
    """

    name: str
    also: tuple[str, ...] = ()
    pattern: str | None = None
    together: tuple[str, ...] = ()


def placed(model: nn.Module, names: Iterable[str]) -> dict[str, Placed]:
    """For each tensor of a checkpoint that `model` loads, where it goes; those it ignores are left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    state = model.state_dict()
    places: dict[str, Placed] = {}
    for name in names:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = name, None
        if key not in state:
            continue
        if pattern is None:
            places[name] = Placed(key)
            continue
        converter = by_pattern[pattern]
        first, *others = converter.target_patterns
        also = tuple(key.replace(first, other) for other in others)
        places[name] = Placed(key, also, pattern, tuple(converter.source_patterns))
    return places


def renamed(model: nn.Module, name: str) -> str:
    """What a tensor of a checkpoint is called in `model`, by renaming alone, whether or not the model has it."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    return str(rename_source_key(name, renamings, [])[0])


def lacking(model: nn.Module, places: Mapping[str, Placed], experts: Mapping[str, int]) -> list[str]:
    """What `model` needs and a checkpoint with these tensors does not hold, in words; of tied tensors one is enough.

    Args:
        model: on any device.
        places: of the checkpoint's tensors.
        experts: for the name of each experts module, how many experts it has.
    """
    parts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    together: dict[str, tuple[str, ...]] = {}
    for name, place in places.items():
        number = NUMBERED.search(name)
        for key in (place.name, *place.also):
            parts[key][place.pattern or ""].add(int(number[1]) if number else -1)
            together[key] = place.together
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners = defaultdict(set)
    for name, other in tied.items():
        partners[name].add(other)
        partners[other].add(name)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    complaints = []
    for key in model.state_dict():
        if key not in parts:
            if not any(other in parts for other in partners[key]) and not any(p.search(key) for p in ignored):
                complaints.append(key)
            continue
        n = next((count for module, count in experts.items() if key.startswith(f"{module}.")), 0)
        for pattern in together[key]:
            numbers = parts[key].get(pattern, set())
            if not numbers:
                complaints.append(f"{key} ({pattern.replace('*', 'N')})")
            elif -1 not in numbers and numbers != set(range(n)):
                gone = sorted(set(range(n)) - numbers)
                complaints.append(f"{key} ({pattern.replace('*', str(gone[0] if gone else max(numbers)))})")
    return complaints
