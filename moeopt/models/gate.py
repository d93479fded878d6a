"""The one gate for code that a checkpoint brings: what runs is moeopt's own, or the user trusts it."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import cached_file

from moeopt.errors import ModelError, got
from moeopt.models.bounds import check_counts
from moeopt.showing import first_line

CODE = "modeling_moeopt.py"
"""The file of the class that a custom checkpoint of moeopt brings."""
EARLIER = {
    "af0b8771c08f4c8027f610907b5d92865d5298a21936f8256df85f7c47ce2a50",
    "859696d04f9f54a34a0b1ff71f2be0b4d3c242cd25ad2a265fce1be08f1ba7d9",
}
"""SHA-256 of what that file was, as moeopt holds it, in versions whose checkpoints today's class loads as they were."""
CUSTOM = "moeopt_"
"""Begins the model types of custom checkpoints."""
AUTO_CLASSES: dict[Any, str] = {
    AutoModelForCausalLM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    AutoModelForImageTextToText: "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
"""transformers' classes that load a checkpoint, the first one that can does, and where they look up the model's."""
TRUST = "read it, and if you trust it: trust_remote_code=True, or --trust-remote-code"
UNUSABLE = (
    ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError, IndexError,
    AssertionError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a config with values that it cannot use."""


@dataclass(frozen=True)
class Admitted:
    """How a checkpoint is to be loaded.

    Args:
        trusted: what transformers is told as `trust_remote_code`.
        config_class: whose `from_pretrained` reads the config.
        model_class: whose `from_pretrained` loads the model.
    """

    trusted: bool
    config_class: Any
    model_class: Any

    @property
    def is_custom(self) -> bool:
        """Whether it is a custom checkpoint that loads as moeopt's own class."""
        return self.config_class is not AutoConfig

    def empty(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model of a config, on the device in force."""
        if not self.is_custom:
            return self.model_class.from_config(config, trust_remote_code=self.trusted)
        model: PreTrainedModel = self.model_class._from_config(config)
        return model


def admit(source: str | os.PathLike[str], *, trust_remote_code: bool = False, **hub: Any) -> Admitted:
    """How a checkpoint may be loaded; every way to load one asks here first.

    Without trust, transformers is never told to run code of the checkpoint. A custom checkpoint of moeopt loads without
    trust if its code is what this moeopt ships, byte for byte, and it brings no other; what then runs is moeopt's own
    copy.

    Args:
        source: a checkpoint folder or a hub id.
        trust_remote_code: whether code that comes with the checkpoint may run.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ModelError: when there is no such checkpoint, its config cannot be read or holds numbers that no checkpoint has,
            its index names files outside of its folder, or it needs code that is not trusted.
    """
    config, folder = _config(source, hub), Path(source).expanduser()
    try:
        check_counts(config, folder)
    except ModelError as error:
        raise ModelError(f"{str(source)!r}: {error}") from None
    if trust_remote_code:
        return Admitted(True, AutoConfig, auto_class(config))
    foreign = _elsewhere(config)
    if (folder / "adapter_config.json").exists():
        foreign.append("adapter_config.json")
    model_type = str(config.get("model_type"))
    is_custom = model_type.startswith(CUSTOM)
    if is_custom:
        foreign += _not_ours(source, folder, config, model_type.removeprefix(CUSTOM), hub)
    if foreign:
        raise ModelError(
            f"{str(source)!r} brings code ({', '.join(foreign[:5])}) that is not, byte for byte, what this moeopt "
            f"ships; {TRUST}"
        )
    if is_custom:
        return Admitted(False, *custom_classes(model_type.removeprefix(CUSTOM)))
    return Admitted(False, AutoConfig, auto_class(config))


def code_for(model_type: str) -> bytes:
    """The modeling file of a family, such as ``"mixtral"``, that goes into its custom checkpoints.

    Raises:
        ModelError: when transformers knows no such family of language models.
    """
    family = _family(model_type)
    text = (Path(__file__).parent / CODE).read_text(encoding="utf-8")
    text = text.replace("MixtralForCausalLM", family.model).replace("MixtralConfig", family.config)
    return text.replace("Mixtral", family.config.removesuffix("Config")).replace("mixtral", model_type).encode()


def _is_shipped(code: bytes, model_type: str) -> bool:
    """Whether code is what `code_for` gives, or gave in an earlier version."""
    if code == code_for(model_type):
        return True
    family = _family(model_type)
    # the way back to the file that moeopt holds; where it goes astray, the digest is another
    names = family.model, family.config, family.config.removesuffix("Config"), model_type
    for name, placeholder in zip(names, ("MixtralForCausalLM", "MixtralConfig", "Mixtral", "mixtral")):
        code = code.replace(name.encode(), placeholder.encode())
    return hashlib.sha256(code).hexdigest() in EARLIER


@cache
def custom_classes(model_type: str) -> tuple[Any, Any]:
    """The config and model classes of a family's custom checkpoints, from moeopt's own copy of their code.

    Raises:
        ModelError: as `code_for`.
    """
    code = code_for(model_type)
    folder = Path(tempfile.mkdtemp(prefix="moeopt-"))  # a file, as a model that is saved takes its code along
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / CODE).write_bytes(code)
    name = f"moeopt_custom.{model_type}.{CODE.removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, folder / CODE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = {auto: getattr(module, place.partition(".")[2]) for auto, place in auto_map(model_type).items()}
    for auto, kind in classes.items():
        kind.register_for_auto_class(auto)
    return classes["AutoConfig"], classes[_family(model_type).auto]


def auto_map(model_type: str) -> dict[str, str]:
    """The field of config.json that names the classes of a family's custom checkpoints."""
    family = _family(model_type)
    names = {"AutoConfig": family.config, family.auto: family.model}
    return {auto: f"{CODE.removesuffix('.py')}.Moeopt{name}" for auto, name in names.items()}


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' class that loads a checkpoint: of language models where it can, else of models of images and text.

    Args:
        config: what config.json holds.
    """
    model_type, brought = config.get("model_type"), config.get("auto_map")
    brought = brought if isinstance(brought, dict) else {}
    for auto, mapping in AUTO_CLASSES.items():
        name = str(getattr(modeling_auto, mapping).get(model_type))
        if auto.__name__ in brought or (name != "None" and not name.endswith("Diffusion")):  # which writes in no order
            return auto
    return AutoModelForCausalLM


class _Family(NamedTuple):
    """Names of a family's classes in transformers, and of the auto class that loads its models."""

    config: str
    model: str
    auto: str


@cache
def _family(model_type: str) -> _Family:
    config = str(CONFIG_MAPPING_NAMES.get(model_type))
    for auto, mapping in AUTO_CLASSES.items():
        model = getattr(modeling_auto, mapping).get(model_type)
        # a model of text and more may have a class for its text alone, which takes the config of the text
        if isinstance(model, str) and getattr(transformers, model).config_class.__name__ == config:
            return _Family(config, model, auto.__name__)
    raise ModelError(f"moeopt has no custom form for models of type {model_type!r}; only a stock plan exports")


def _config(source: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """What transformers reads as the config of a checkpoint, before any class sees it."""
    _check_folder(source)
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(source, **hub)[0]
        return dict(config)
    except OSError as error:
        raise ModelError(
            f"{str(source)!r} is no folder here, and its config cannot be had from the hub: {first_line(error)}"
            if not Path(source).expanduser().is_dir()
            else f"the config of {str(source)!r} cannot be read: {first_line(error)}"
        ) from error
    except (*UNUSABLE, RecursionError) as error:
        raise ModelError(f"the config of {str(source)!r} cannot be used: {first_line(error)}") from error


def _check_folder(source: str | os.PathLike[str]) -> None:
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise ModelError(f"a checkpoint is a folder, or a hub id such as 'org/name', got {got(source)}")
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{str(source)!r} is not a checkpoint folder: it has no config.json")
    elif path.exists():
        raise ModelError(f"{str(source)!r} is a file; a checkpoint is a folder, or a hub id such as 'org/name'")
    elif not isinstance(source, str) or len(path.parts) > 2 or source.startswith((".", "~", "/")):
        raise ModelError(f"no checkpoint folder at {str(source)!r}")


def _not_ours(
    source: str | os.PathLike[str], folder: Path, config: dict[str, Any], family: str, hub: dict[str, Any]
) -> list[str]:
    """Where a custom checkpoint brings code other than moeopt's, for any loader that is told to trust it."""
    try:
        classes = auto_map(family)
    except ModelError:
        return [CODE]
    foreign, local = [], folder.is_dir()
    file = folder / CODE if local else cached_file(source, CODE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None or not Path(file).is_file() or not _is_shipped(Path(file).read_bytes(), family):
        foreign.append(CODE)
    if config.get("auto_map") != classes:
        foreign.append("auto_map of config.json")
    settings = {"config.json": {key: value for key, value in config.items() if key != "auto_map"}}
    if local:
        names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*.py")))
        foreign += [name for name in names if name != CODE]
        foreign += ["custom_generate"] if os.path.lexists(folder / "custom_generate") else []
        settings |= {path.name: _json(path) for path in sorted(folder.glob("*_config.json"))}
    for name, value in settings.items():
        foreign += [f"{key} of {name}" for key, _ in _fields(value) if key in ("auto_map", "custom_generate")]
    return foreign


def _elsewhere(config: dict[str, Any]) -> list[str]:
    """Fields of a config by which transformers fetches kernels, which are code, from a repository."""
    return [
        f"{key} of config.json"
        for key, value in _fields(config)
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(value)
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # nor can transformers read it


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of nested objects and lists."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _fields(inner)
