"""Nothing that a plan puts into a model makes a GPU wait for the host, or the host for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moeopt import LayerPlan, Plan
from moeopt.models import patch, patched


@pytest.mark.slow
def test_no_layer_of_any_plan_waits_for_the_device() -> None:
    script = Path(__file__).with_name("without_waiting.py")
    run = subprocess.run([sys.executable, str(script)], env=dict(os.environ), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    noted = json.loads(run.stdout.splitlines()[-1])
    assert sum(len(plans) for plans in noted.values()) > 50
    assert {(m, name): waits for m, plans in noted.items() for name, waits in plans.items() if waits} == {}


@pytest.mark.parametrize("merged", [False, True], ids=["kept", "merged"])
@pytest.mark.parametrize("backend", patch.WITHOUT_WAITING)
def test_kernels_leave_out_what_is_skipped(
    make_mixtral: Any, dense_plan: Any, monkeypatch: pytest.MonkeyPatch, backend: str, merged: bool
) -> None:
    """What runs on an accelerator, on numbers: the same as running the pairs that are left alone."""
    model = make_mixtral(layers=2)
    model.set_experts_implementation(backend)
    part = LayerPlan(8, 2, kept=(1, 2, 5, 6), skip=0.7)
    plan = dense_plan(layers=2, skip=0.7, router="prob") if merged else Plan((part,) * 2)
    ids = torch.arange(26).reshape(2, 13)
    results = []
    for accelerated in (False, True):
        monkeypatch.setattr(patch, "is_accelerator", lambda device, there=accelerated: there)
        with patched(model, plan) as state, torch.inference_mode():
            results.append((model(ids).logits, state.active))
    (expected, active), (logits, counted) = results
    assert counted == active
    assert all(1 < ran < 2 for ran in active)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
