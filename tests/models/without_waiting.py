"""Patched models on an accelerator that is not there: tensors with a device and a shape but no numbers.

Run by `test_without_waiting.py` as a process of its own, as PyTorch learns of the device "chip" for good. Operators
check that what they are given is on one device; whatever asks the device for a number is noted, as there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.integrations import moe

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import build

from moeopt import LayerPlan, Plan
from moeopt.models import MergedCache, moe_layers, patched
from moeopt.plan import DownProjections

N, R, K, HIDDEN, INNER = 8, 4, 2, 32, 24
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2")


def layer_plans() -> dict[str, LayerPlan]:
    """A layer of every kind of plan."""
    rng = np.random.default_rng(0)
    kept = (0, 3, 4, 7)
    w_em, w_rm = (np.eye(N, dtype=np.float32)[list(kept)] + 0.1 * rng.random((R, N), np.float32) for _ in range(2))
    one_hot = np.eye(N, dtype=np.float32)[list(kept)]
    aliases = np.eye(R, dtype=np.float32)[[0, 0, 1, 1, 2, 2, 3, 3]].T
    orders = np.stack([rng.permutation(INNER) for _ in range(N)]).astype(np.int32)
    numbers = [rng.random(shape, np.float32) for shape in ((R, HIDDEN, INNER), (R, HIDDEN, 2), (R, 2, INNER))]
    novices = rng.random((N - R, HIDDEN), np.float32)
    merged: dict[str, Any] = {"w_em": w_em, "w_rm": one_hot}
    return {
        "pruned": LayerPlan(N, K, kept=kept),
        "fewer": LayerPlan(N, 1, kept=kept),
        "merged": LayerPlan(N, K, **merged),
        "logits": LayerPlan(N, K, w_em=w_em, w_rm=w_rm, router="logit"),
        "probabilities": LayerPlan(N, K, w_em=w_em, w_rm=w_rm, router="prob"),
        "aliases": LayerPlan(N, K, kept=kept, w_rm=aliases, router="alias"),
        "merged aliases": LayerPlan(N, K, w_em=w_em, w_rm=aliases, router="alias"),
        "skipping": LayerPlan(N, K, kept=kept, skip=0.5),
        "skipping merged": LayerPlan(N, K, **merged, skip=0.5),
        "skipping probabilities": LayerPlan(N, K, w_em=w_em, w_rm=w_rm, router="prob", skip=0.5),
        "novices": LayerPlan(N, K, kept=kept, router="whole", novices=novices),
        "skipping novices": LayerPlan(N, K, kept=kept, router="whole", novices=novices, skip=0.5),
        "refitted": LayerPlan(N, K, kept=kept, down=DownProjections(whole=numbers[0])),
        "refitted merged": LayerPlan(N, K, **merged, down=DownProjections(left=numbers[1], right=numbers[2])),
        "reordered": LayerPlan(N, K, **merged, neurons=orders),
        "slerp": LayerPlan(N, K, **merged, merge="slerp", neurons=orders),
        "ties": LayerPlan(N, K, **merged, merge="ties"),
    }


class Watch(TorchDispatchMode):
    """Notes what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        of_chip = any(t.device.type == "chip" for t in tensors)
        if of_chip and name in ASKS:
            self.waits.append(name)
        if of_chip and name in ("index", "index_put_"):
            self.waits += ["boolean mask" for i in args[1] if i is not None and i.dtype == torch.bool]
        if name == "_local_scalar_dense":  # of the CPU's numbers, which are at hand, or noted
            return 0
        result = func(*args, **(kwargs or {}))
        if name in ("copy_", "_to_copy") and tensors[-1].device.type == "chip" != result.device.type:
            self.waits.append(f"copy to {result.device}")
        return result


def move(model: nn.Module) -> None:
    """Every parameter and buffer to the chip."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                there = torch.empty(tensor.shape, dtype=tensor.dtype, device="chip")
                module._parameters[name] = nn.Parameter(there, requires_grad=False)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="chip")


def waits(family: str, options: dict[str, Any], backend: str) -> dict[str, list[str]]:
    """By kind of plan, what waited for the device."""
    model = build(family, N, **options)
    model.set_experts_implementation(backend)
    layers = len(moe_layers(model))
    plans = {name: Plan((part,) * layers) for name, part in layer_plans().items()}
    ids = torch.arange(26).reshape(2, 13)
    for plan in plans.values():
        with patched(model, plan), torch.inference_mode():  # with numbers: the self-checks look at them
            model(ids, use_cache=False)
    noted: dict[str, list[str]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model)
        ids = torch.zeros(2, 13, dtype=torch.int64, device="chip")
        for name, plan in plans.items():
            watch, cache = Watch(), MergedCache()
            with patched(model, plan, cache=cache), torch.inference_mode(), watch:
                for _ in range(2):  # merged the first time
                    assert model(ids, use_cache=False).logits.device.type == "chip"
            noted[name] = sorted(set(watch.waits))
    return noted


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("chip")
    moe._can_use_grouped_mm = lambda *_: False  # which is about kernels of real devices
    models = {
        "in half precision": ("mixtral", {"dtype": torch.bfloat16}, "grouped_mm"),
        "a correction of the choice": ("deepseek_v3", {"corrected": True}, "batched_mm"),
        "biases, transposed": ("gpt_oss", {}, "grouped_mm"),
    }
    print(json.dumps({name: waits(*model) for name, model in models.items()}))
