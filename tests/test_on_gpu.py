"""The benchmark for a GPU, at small size on the CPU: every case runs, and its JSON holds what its table shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import on_gpu


@pytest.mark.slow
@pytest.mark.parametrize("model", on_gpu.SHAPES)
def test_every_case_runs_at_small_size(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "on_gpu.json"
    on_gpu.main(["--small", "--device", "cpu", "--models", model, "--repeats", "1", "--json", str(file)])
    facts = json.loads(file.read_text())
    rows = {row["case"]: row for row in facts["rows"]}
    assert rows.pop("self-checks")["note"].startswith("all that ran passed, bit for bit; 4 layers")
    for case in ("bare forward", "one-hot trial", "dense trial, resident", "dense trial, scratch", "loss_aware"):
        assert rows[case]["seconds"] > 0, case
    assert {f"prefix reuse from layer {first}" for first in (1, 2, 3)} < set(rows)
    assert {"generation, bare", "generation, one-hot"} < set(rows)
    assert facts["flops"] > 0
    assert facts["bandwidth"] > 0
    assert "not run" not in capsys.readouterr().out


def test_what_time_does_not_reach_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "on_gpu.json"
    on_gpu.main(["--small", "--device", "cpu", "--models", "mixtral", "--minutes", "0", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["note"] for row in rows if row["case"] not in ("self-checks", "said")} == {"not run: out of time"}
