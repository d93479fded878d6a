"""Load a checkpoint with its tokenizer, and refuse early what moeopt cannot use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moeopt.errors import ModelError
from moeopt.models.bounds import check_size
from moeopt.models.devices import check_device_map, check_dtype
from moeopt.models.gate import UNUSABLE, admit
from moeopt.models.layers import is_dense, moe_layers, shape_of
from moeopt.models.quantisation import StoredQuantised
from moeopt.plan import ModelShape
from moeopt.showing import first_line

Source = str | os.PathLike[str]
HUB = ("revision", "token", "cache_dir", "local_files_only")
REVISION = "moeopt_revision"
"""Attribute of a model that was loaded from the hub: the revision that was asked for, so that export reads it, too."""


def load(
    source: Source,
    *,
    device_map: str | dict[str, int | str] | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    experts_implementation: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with MoE layers, in eval mode, and its tokenizer.

    Args:
        source: a checkpoint folder or a hub id.
        device_map: where accelerate puts the weights, e.g. ``"auto"``; None means the CPU.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        trust_remote_code: whether code that comes with the checkpoint may run.
        experts_implementation: a transformers experts implementation, such as ``"grouped_mm"`` or ``"eager"``.
        options: passed to `from_pretrained`: `max_memory`, `offload_folder`, `revision`, `quantization_config`, ...

    A checkpoint in FP8, MXFP4 or compressed-tensors is dequantised as it loads, which a warning says, unless
    `quantization_config` is given; so may a `BitsAndBytesConfig` be for a checkpoint that is not quantised.

    Raises:
        ModelError: when there is no such checkpoint, device or dtype, it has no tokenizer, it is not a causal language
            model with MoE layers that moeopt can use, or some of its tensors are missing.
    """
    check_device_map(device_map)
    check_dtype(dtype)
    hub = {name: options[name] for name in HUB if name in options}
    empty = empty_model(source, trust_remote_code=trust_remote_code, **hub)
    with _naming(source):
        moe_layers(empty)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, **hub)
    model = load_model(
        source,
        device_map=device_map,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        experts_implementation=experts_implementation,
        **options,
    )
    return model, tokenizer


def load_tokenizer(source: Source, *, trust_remote_code: bool = False, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: when it has none that can be read.
    """
    admitted = admit(source, trust_remote_code=trust_remote_code, **hub)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=admitted.trusted, **hub)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(source)!r} has no tokenizer that can be read: {first_line(error)}") from error


def load_model(
    source: Source,
    *,
    device_map: str | dict[str, int | str] | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    experts_implementation: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model in eval mode, dense or with MoE layers of any form; arguments as of `load`.

    Raises:
        ModelError: when its weights cannot be read, or some are missing.
    """
    check_device_map(device_map)
    check_dtype(dtype)
    # oneDNN keeps a compiled primitive for every number of tokens an expert ever saw, 1024 of them: gigabytes
    # in a search on a CPU, and no time saved. It reads the variable at the first bfloat16 product of the process.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    hub = {name: options[name] for name in HUB if name in options}
    admitted = admit(source, trust_remote_code=trust_remote_code, **hub)
    stored = StoredQuantised.read(source, **hub)
    dequantising = None
    if "quantization_config" not in options:
        dequantising = stored.dequantising(
            lambda: is_dense(empty_model(source, trust_remote_code=trust_remote_code, **hub))
        )
    if dequantising is not None:
        options["quantization_config"] = dequantising
    try:
        with warnings.catch_warnings():
            # transformers', that the checkpoint's settings are used but for what is asked for
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            model, info = admitted.model_class.from_pretrained(
                source,
                device_map=device_map,
                dtype=dtype,
                trust_remote_code=admitted.trusted,
                output_loading_info=True,
                **options,
            )
    except (OSError, SafetensorError, *UNUSABLE) as error:
        raise ModelError(f"the weights of {str(source)!r} cannot be loaded: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(f"{str(source)!r} lacks tensors that would be filled with random numbers: {named}")
    stored.check_scales(model, info["unexpected_keys"])
    if dequantising is not None:
        stored.say_dequantised(model)
    elif options.get("quantization_config") is not None:
        stored.say_partly_quantised(model)
    setattr(model, REVISION, options.get("revision"))
    return model.eval()


def check_checkpoint(source: Source, *, trust_remote_code: bool = False, **hub: Any) -> ModelShape:
    """The shape of a checkpoint's MoE model, from its config alone: no weight is read.

    Args:
        source: a checkpoint folder or a hub id.
        trust_remote_code: whether code that comes with the checkpoint may run.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ModelError: as `load`, but for the tokenizer and the weights; also when the MoE layers are not equal.
    """
    model = empty_model(source, trust_remote_code=trust_remote_code, **hub)
    with _naming(source):
        return shape_of(model)


def empty_model(source: Source, *, trust_remote_code: bool = False, **hub: Any) -> PreTrainedModel:
    """The causal language model that a checkpoint's config describes, in its dtype, all tensors on the meta device.

    Args:
        source: a checkpoint folder or a hub id.
        trust_remote_code: whether code that comes with the checkpoint may run.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ModelError: when there is no such checkpoint, or its config is not that of a causal language model.
    """
    admitted = admit(source, trust_remote_code=trust_remote_code, **hub)
    try:
        config = admitted.config_class.from_pretrained(source, trust_remote_code=admitted.trusted, **hub)
    except (OSError, *UNUSABLE) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ModelError(
                f"{str(source)!r} brings a model class of its own, which runs only when it is trusted: "
                "trust_remote_code=True, or --trust-remote-code"
            ) from error
        raise ModelError(f"the config of {str(source)!r} cannot be used: {first_line(error)}") from error
    try:
        with init_empty_weights(include_buffers=True):
            model = admitted.empty(config)
    except UNUSABLE as error:
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:  # before a list of all that there are
            reason = f"transformers has no model of type {config.model_type!r} that continues text from left to right"
        raise ModelError(f"{str(source)!r} is not a causal language model: {reason}") from error
    check_size(model, Path(source).expanduser())
    return model


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Within it, what is wrong with a model is said of its checkpoint."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{str(source)!r}: {error}") from None
