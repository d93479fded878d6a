"""Tensors that a model's class does not read: those of experts are left out, as nothing says how to prune them.

Such are the blocks for multi-token prediction of DeepSeek-V3, GLM-4.5, Qwen3-Next, ERNIE and others. Their routers and
experts are their own, so that no plan of the model's layers is one of theirs; kept whole, they would contradict
config.json, which has one number of experts for all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeopt.exporting.source import Stored
from moeopt.exporting.stock import EXPERT_KEYS
from moeopt.showing import listed
from moeopt.spaces.serving import PREDICTION_KEY

EXPERTS = re.compile(r"^(.*?)(?:^|(?<=\.))((?!\w*shared)\w*experts?\w*?)(?:[._](\d+))?(?:\.|$)")
"""The module of experts in the name of a tensor: what is before it, its own name, and the number of one expert."""
GATE = re.compile(r"^(.*?)(?:^|(?<=\.))(?:gate|router)(?:\.\w+)?\.weight$")
ROUTER = re.compile(r"gate|router|correction|expert")
PREDICTION = re.compile(r"(^|[._])(mtp|nextn)|predict|(^|\.)(layers?|blocks?|h)\.\d+$")
"""In the name of a module that a class does not read: one for multi-token prediction, often a layer too many."""


@dataclass(frozen=True)
class Unread:
    """What of a checkpoint its model's class does not read.

    Args:
        left_out: the modules, such as ``"model.layers.46"``, that hold experts or routers; they are not written.
        copied: the others, such as ``"vision_model"``, which are written as they are.
        tensors: names of the tensors that are left out.
        prediction: whether the modules left out are a multi-token prediction block.
    """

    left_out: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    tensors: frozenset[str] = field(default_factory=frozenset)
    prediction: bool = False

    def lines(self) -> list[str]:
        """The same for people."""
        lines = []
        if self.left_out:
            says = "; config.json says that there is no multi-token prediction" if self.prediction else ""
            what = (
                f"{listed(self.left_out)} ({len(self.tensors)} tensors of experts that the model's class does not read)"
            )
            lines.append(f"left out: {what}{says}")
        if self.copied:
            lines.append(f"copied as they are: {listed(self.copied)}, which the model's class does not read")
        return lines


def unread(tensors: Mapping[str, Stored], read: Collection[str], experts: int, hidden: int) -> Unread:
    """Which tensors a class does not read, and which of them have to do with experts.

    Args:
        tensors: of the checkpoint.
        read: names of those that the class reads.
        experts: n, how many experts its layers have.
        hidden: the size of its hidden states.
    """
    inner = {prefix for name in read for prefix in _prefixes(name)}
    roots = {
        name: next((prefix for prefix in _prefixes(name) if prefix not in inner), name)
        for name in tensors
        if name not in read
    }
    of_experts = {root for name, root in roots.items() if _of_experts(name, tensors[name].shape, experts, hidden)}
    forms = {re.sub(r"\d+", "N", root) for root in of_experts}
    left_out = {
        root
        for root in roots.values()
        if root in of_experts or re.sub(r"\d+", "N", root) in forms or (of_experts and PREDICTION.search(root))
    }
    return Unread(
        tuple(dict.fromkeys(root for root in roots.values() if root in left_out)),
        tuple(dict.fromkeys(root for root in roots.values() if root not in left_out)),
        frozenset(name for name, root in roots.items() if root in left_out),
        any(PREDICTION.search(root) for root in left_out),
    )


def unfulfilled(config: Mapping[str, Any], names: Collection[str], unread: Unread) -> list[str]:
    """Keys by which a config speaks of blocks for multi-token prediction, where no tensor is of one.

    Servers would look for the block: transformers saves none, and keeps the key.

    Args:
        config: of the text model, its class's defaults included.
        names: of the checkpoint's tensors.
        unread: those among them that the class does not read.
    """
    if unread.prediction or any(map(PREDICTION.search, (*unread.copied, *names))):
        return []
    return [key for key, value in config.items() if PREDICTION_KEY.search(key) and _counts(key, value) and value > 0]


def without_prediction(config: dict[str, Any]) -> None:
    """Make a config say that the model has no multi-token prediction block, by all the keys it has for that."""
    text = config.get("text_config", config)
    changed = [_silence(part) for part in (config, *_objects(config))]
    if not any(changed):
        text["num_nextn_predict_layers"] = 0  # for DeepSeek-V3 and GLM-4.5 its default is 1


def disagreeing(config: dict[str, Any], tensors: Mapping[str, Stored]) -> list[str]:
    """Numbers of experts in a checkpoint's tensors that its config does not say, in words."""
    text = config.get("text_config", config)
    values = [text[key] for key in EXPERT_KEYS if key in text]
    said = {n for value in values for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)}
    routed = said | set(((config.get("moeopt") or {}).get("full") or {}).get("experts", {}).values())
    hidden = text.get("hidden_size")
    experts = {name: match for name in tensors if (match := EXPERTS.search(name))}
    blocks = {match[1] for match in experts.values()}
    numbers: dict[str, set[int]] = {}
    complaints = []
    for name, tensor in tensors.items():
        expert, gate, shape = experts.get(name), GATE.search(name), tensor.shape
        if expert and expert[3]:
            numbers.setdefault(expert[1] + expert[2], set()).add(int(expert[3]))
        elif expert and len(shape) > 2 and not said & set(shape[:2]):
            complaints.append(f"{name} holds {shape[0]} experts")
        elif gate and gate[1] in blocks and len(shape) == 2 and hidden in shape:
            rows = shape[1 - shape.index(hidden)]
            complaints += [] if rows in routed else [f"{name} routes to {rows} experts"]
    complaints += [
        f"{name} holds {len(members)} experts"
        for name, members in numbers.items()
        if members != set(range(len(members))) or len(members) not in said
    ]
    return (
        [f"{complaint}, config.json says {listed(map(str, sorted(said)))}" for complaint in complaints] if said else []
    )


def _of_experts(name: str, shape: tuple[int, ...], n: int, hidden: int) -> bool:
    if EXPERTS.search(name) or (n in shape and len(shape) > 1 and hidden in shape):
        return True
    return n in shape and len(shape) < 3 and ROUTER.search(name) is not None


def _prefixes(name: str) -> Iterable[str]:
    """The names of the modules that hold a tensor, outermost first, and its own."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _objects(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for value in config.values():
        if isinstance(value, dict):
            yield value
            yield from _objects(value)


def _silence(part: dict[str, Any]) -> bool:
    changed = False
    for key, value in part.items():
        if not PREDICTION_KEY.search(key):
            continue
        if isinstance(value, list):
            part[key] = []
        elif isinstance(value, bool):
            part[key] = False if key.startswith("use_") else value
        elif _counts(key, value):
            part[key], changed = 0, True
    return changed


def _counts(key: str, value: Any) -> bool:
    return isinstance(value, int) and re.search(r"num|layers|modules|depth", key) is not None
