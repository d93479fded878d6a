"""The process that holds one checkpoint: it reads requests from its standard input and answers them, a JSON line each.

    {"do": "open", "source": ...}        -> what the config tells
    {"do": "load", "stream": [...]}      -> how the weights lie
    {"do": "inspect", "plan": ...}       -> size, peak memory, load of the experts
    {"do": "time", "plan": ...}          -> seconds

Whatever else writes to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import traceback
from contextlib import nullcontext
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from moeopt.errors import ModelError, MoeoptError
from moeopt.models import MergedCache, MoELayer, Sizes, empty_model, is_dense, load_model, moe_layers, patched
from moeopt.models.layerwise import input_device
from moeopt.plan import LayerPlan, Plan
from moeopt.results.profiling import measuring

CUDA_PEAK = "torch.cuda.max_memory_allocated"
RAM_PEAK = "RAM of the process beyond that before loading, mapped files apart"


class Host:
    """A checkpoint in this process; each public method answers one kind of request."""

    def open(self, source: str, threads: int | None, **options: Any) -> dict[str, Any]:
        """Check the checkpoint's config; no weight is read. Options are those of `moeopt.models.load_model`."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        self.source, self.options, dtype = source, options, options["dtype"]
        empty = empty_model(source, trust_remote_code=options["trust_remote_code"])
        config = empty.config.get_text_config()
        layers, reason = usable_layers(empty)
        width = getattr(torch, dtype) if dtype != "auto" else getattr(empty.config, "dtype", None) or torch.float32
        return {
            "bytes": sum(p.numel() for p in empty.parameters()) * width.itemsize,
            "free_bytes": free_bytes(options["device_map"]),
            "layers": [(layer.n, layer.k) for layer in layers],
            "reason": reason,
            "vocabulary": config.vocab_size,
            "positions": getattr(config, "max_position_embeddings", None),
        }

    def load(self, stream: list[int]) -> dict[str, Any]:
        """Load the weights.

        Args:
            stream: token ids that prompts are cut from.
        """
        self.before = measuring.settled_bytes()
        self.model: Any = load_model(self.source, **self.options)
        self.layers, _ = usable_layers(self.model)
        self.sizes = Sizes(self.model, self.layers)
        self.stream = torch.tensor(stream)
        config = self.model.config
        devices = measuring.accelerators(self.model)
        cuda = [torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"]
        offloaded = sorted({str(place) for place in (getattr(self.model, "hf_device_map", None) or {}).values()})
        return {
            "architecture": type(self.model).__name__,
            "dtype": str(next(p.dtype for p in self.model.parameters())).removeprefix("torch."),
            "devices": offloaded if len(offloaded) > 1 else [str(device) for device in devices] or ["cpu"],
            "device_names": cuda,
            "experts_implementation": getattr(config, "_experts_implementation", None) if self.layers else None,
            "threads": torch.get_num_threads(),
            "peak_from": CUDA_PEAK if cuda else RAM_PEAK,
            "torch": torch.__version__,
        }

    def inspect(
        self, plan: str | None, batch: int, prompt_length: int, new_tokens: int, balance_tokens: int
    ) -> dict[str, Any]:
        """Size, peak memory in one setting, and the load of each layer's experts; under a plan, as if exported."""
        chosen, cache = self._plan(plan), MergedCache()
        with patched(self.model, chosen, cache=cache) if chosen is not None else nullcontext():
            ids = self._prompts(batch, prompt_length)
            with measuring.peak_memory(self.model, self.before) as peak:
                measuring.seconds(self.model, ids, new_tokens)
            ran = measuring.expert_loads(self.model, self.layers, self._rows(batch, prompt_length, balance_tokens))
        experts = [range(x.n) for x in self.layers] if chosen is None else [experts_of(x) for x in chosen.layers]
        loads: list[dict[str, Any]] = [
            {"layer": layer.name, "experts": list(numbers), "counts": [counts[e] for e in numbers], "tokens": tokens}
            for layer, numbers, (counts, tokens) in zip(self.layers, experts, ran)
        ]
        if not all(load["tokens"] for load in loads):
            loads = []
        active = [sum(load["counts"]) / load["tokens"] for load in loads]
        size, whole = self.sizes.under(chosen, active or None), self.sizes.under()
        return {
            "parameters": size.parameters,
            "active_parameters": size.active if self.layers or is_dense(self.model) else None,
            "weight_bytes": size.bytes,
            "peak_bytes": peak.bytes - cache.nbytes - (whole.bytes - size.bytes),
            "loads": loads,
        }

    def time(
        self, plan: str | None, settings: list[tuple[int, int]], new_tokens: int, rehearse: bool
    ) -> list[tuple[float, float]]:
        """Seconds of prefill and of decoding, for each (batch, prompt length).

        Args:
            rehearse: run each setting whole, untimed, before it is timed.
        """
        chosen = self._plan(plan)
        timed = []
        with patched(self.model, chosen) if chosen is not None else nullcontext():
            for batch, length in settings:
                ids = self._prompts(batch, length)
                measuring.warm_up(self.model, ids)
                if rehearse:
                    measuring.seconds(self.model, ids, new_tokens)
                timed.append(measuring.seconds(self.model, ids, new_tokens))
        return timed

    def _prompts(self, batch: int, length: int) -> Tensor:
        """(batch, length) token ids, the stream from its start, again and again."""
        ids = self.stream[torch.arange(batch * length) % len(self.stream)]
        return ids.reshape(batch, length).to(input_device(self.model))

    def _rows(self, batch: int, length: int, tokens: int) -> list[Tensor]:
        """The first tokens of the stream, about so many, as batches of rows; none of them twice."""
        length = min(length, tokens, len(self.stream))
        rows = self.stream[: tokens // length * length]
        rows = rows[: len(rows) // length * length].reshape(-1, length)
        return [part.to(input_device(self.model)) for part in rows.split(batch)]

    @staticmethod
    @cache
    def _plan(path: str | None) -> Plan | None:
        return None if path is None else Plan.load(path)


def usable_layers(model: Any) -> tuple[tuple[MoELayer, ...], str | None]:
    """The MoE layers of a model; or none, and why."""
    if is_dense(model):
        return (), "a dense model"
    try:
        return moe_layers(model), None
    except ModelError as error:
        return (), str(error)


def experts_of(layer: LayerPlan) -> range | tuple[int, ...]:
    """The numbers that a planned layer's router gives its experts, novices apart."""
    return range(layer.kept_experts) if layer.makes_experts else tuple(sorted(layer.kept or ()))


def free_bytes(device_map: str | None) -> int:
    """Bytes free where the weights go: on all CUDA devices together, or in RAM."""
    if device_map not in (None, "cpu") and torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return int(psutil.virtual_memory().available)


def main() -> None:
    """Answer requests until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    host = Host()
    for line in requests:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"answer": getattr(host, request.pop("do"))(**request)}
        except MoeoptError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            answer = {"error": "ProfileError", "message": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": "ProfileError", "message": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
