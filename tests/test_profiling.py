"""Profiles: sizes of exported checkpoints, loads counted by brute force, and the command line."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from torch import Tensor

import moeopt
from moeopt import report
from moeopt.cli import main
from moeopt.demo import MODEL
from moeopt.errors import ModelError
from moeopt.models import moe_layers, patched
from moeopt.plan import LayerPlan, Plan
from moeopt.results.profiling import LayerLoad, Profile, ProfileError, Ratio, Row, Setting, Speed, measuring, run
from moeopt.results.profiling.checks import check_length, check_plan
from moeopt.results.profiling.worker import Host
from moeopt.results.profiling.workers import Checkpoint

LAYERS, N, K, R = 6, 8, 2, 4
PRUNED = Plan.one_hot([[1, 4, 6, 7]] * LAYERS, experts=N, k=K)
FULL = Plan.identity(LAYERS, N, K)
SKIP = 0.5
OPTIONS: dict[str, Any] = {
    "device_map": None, "dtype": "auto", "trust_remote_code": False, "experts_implementation": None, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moeopt.export(PRUNED, tmp_path_factory.mktemp("profile") / "small", model=MODEL)


@pytest.fixture(scope="module")
def profiled(exported: Path) -> Profile:
    plans = {"pruned": PRUNED, "k = 1": FULL.with_k(1), "skipping": FULL.with_skip(SKIP)}
    return moeopt.profile(
        {"full": MODEL, "exported": exported}, plans=plans, batch=(1, 3), prompt_length=(8,), new_tokens=2, repeats=2,
        balance_tokens=200, threads=1, seed=5,
    )  # fmt: skip


def row(profiled: Profile, name: str) -> Row:
    return next(row for row in profiled.rows if row.name == name)


@pytest.mark.slow
def test_a_plan_has_the_size_and_the_loads_of_its_exported_checkpoint(profiled: Profile) -> None:
    planned, real = row(profiled, "pruned"), row(profiled, "exported")
    assert [each.name for each in profiled.rows] == ["full", "pruned", "k = 1", "skipping", "exported"]
    assert (planned.parameters, planned.active_parameters) == (real.parameters, real.active_parameters)
    assert planned.weight_bytes == real.weight_bytes == 4 * real.parameters
    assert planned.experts == real.experts == (R,) * LAYERS
    assert [load.counts for load in planned.loads] == [load.counts for load in real.loads]
    assert {load.experts for load in planned.loads} == {(1, 4, 6, 7)}
    assert {load.experts for load in real.loads} == {(0, 1, 2, 3)}
    assert [each.computed for each in profiled.rows] == [False, True, True, True, False]


def test_active_parameters_follow_the_experts_that_ran(profiled: Profile) -> None:
    full, single, skipping = (row(profiled, name) for name in ("full", "k = 1", "skipping"))
    assert full.active_parameters is not None
    assert (full.active_experts, single.active_experts) == (2, 1)
    assert skipping.active_experts is not None
    assert 1 < skipping.active_experts < 2
    expert = sum(p.numel() for p in moe_layers(moeopt.load(MODEL)[0])[0].experts.parameters()) // N
    assert single.active_parameters == full.active_parameters - LAYERS * expert
    assert skipping.active_parameters == pytest.approx(
        full.active_parameters - LAYERS * (2 - skipping.active_experts) * expert, abs=1
    )


def test_memory_and_time_are_measured(profiled: Profile) -> None:
    assert (profiled.resident, profiled.tokens["balance"], profiled.largest) == (True, 200, Setting(3, 8))
    for each in profiled.rows:
        assert each.peak_bytes > 0
        assert [speed.setting for speed in each.speeds] == [Setting(1, 8), Setting(3, 8)]
        for speed in each.speeds:
            assert len(speed.prefill) == len(speed.decode) == 2
            assert min(speed.prefill + speed.decode) > 0
    assert profiled.rows[0].peak_bytes > profiled.rows[0].weight_bytes


def brute_force(logits: Tensor, k: int, kept: tuple[int, ...], beta: float) -> list[int]:
    """Tokens for which each kept expert runs, one token at a time, as in NAEE's section 3.3."""
    counts = dict.fromkeys(kept, 0)
    for token in logits.double():
        weights = {e: math.exp(token[e]) for e in kept}
        chosen = sorted(kept, key=lambda e: -weights[e])[:k]
        for e in chosen:
            counts[e] += weights[e] >= beta * weights[chosen[0]]
    return [counts.get(e, 0) for e in range(N)]


@pytest.mark.parametrize(
    ("plan", "k", "kept", "beta"),
    [
        (None, 2, range(N), 0.0),
        (PRUNED, 2, (1, 4, 6, 7), 0.0),
        (FULL.with_k(1), 1, range(N), 0.0),
        (FULL.with_skip(SKIP), 2, range(N), SKIP),
        (PRUNED.with_skip(SKIP), 2, (1, 4, 6, 7), SKIP),
    ],
)
def test_loads_are_those_of_a_brute_force_count(
    make_mixtral: Any, plan: Plan | None, k: int, kept: Any, beta: float
) -> None:
    model = make_mixtral(layers=LAYERS)
    ids = torch.randint(256, (3, 10), generator=torch.Generator().manual_seed(0))
    plan = plan or FULL
    with patched(model, plan) as state, torch.no_grad():
        loads = measuring.expert_loads(model, moe_layers(model), ids.split(2))
        outputs = [model(input_ids=part, output_router_logits=True).router_logits for part in ids.split(2)]
    for i, (counts, tokens) in enumerate(loads):
        logits = torch.cat([output[i] for output in outputs])
        assert counts == brute_force(logits, k, tuple(kept), beta)
        assert tokens == ids.numel()
        assert sum(counts) / tokens == pytest.approx(state.active[i])


def test_every_family_decodes_on_its_cache_and_loads_add_up(build_family: Any, family: str) -> None:
    model = build_family(family)
    ids = torch.arange(3, 27).reshape(2, 12)
    assert min(measuring.seconds(model, ids, 2)) > 0
    for counts, tokens in measuring.expert_loads(model, moe_layers(model), [ids]):
        assert (sum(counts), tokens) == (2 * ids.numel(), ids.numel())


def test_a_peak_is_seen_though_it_has_passed(tiny_model: Any) -> None:
    size = 96 << 20
    gc.collect()  # garbage of other tests, freed meanwhile, would count against it
    before = measuring.settled_bytes()
    with measuring.peak_memory(tiny_model, before) as peak:
        passing = torch.ones(size, dtype=torch.uint8)
        time.sleep(20 * measuring.SAMPLE_EVERY)
        del passing
    assert 0.8 * size < peak.bytes < 1.5 * size


def test_summaries_of_a_load_by_hand() -> None:
    load = LayerLoad("x", (1, 4, 6, 7), (6, 2, 0, 0), 4)
    assert load.active == 2
    assert load.shares == (0.75, 0.25, 0, 0)
    assert load.cv == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert load.max_over_mean == 3
    assert load.entropy == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) / 2)
    assert (load.busiest, load.idlest) == (1, 6)
    even = replace(load, counts=(2, 2, 2, 2))
    assert (even.cv, even.max_over_mean, even.entropy) == (0, 1, pytest.approx(1))
    assert replace(load, experts=(3,), counts=(4,)).entropy == 1


def test_ratios_are_paired_and_rates_are_medians(profiled: Profile) -> None:
    setting = Setting(3, 8)
    times = [(1.0, 4.0, 2.0), (0.5, 8.0, 1.0)]
    rows = tuple(
        replace(each, speeds=(Speed(setting, prefill, (1.0, 2.0, 4.0)),)) for each, prefill in zip(profiled.rows, times)
    )
    made = replace(profiled, rows=rows, settings=(setting,), repeats=3)
    assert made.ratio(rows[1], setting, "prefill") == Ratio(2.0, 0.5, 2.0, 1.25, 2.0)
    assert made.ratio(rows[1], setting, "decode") == Ratio(1, 1, 1, 1, 1)
    assert made.rate(rows[1], setting, "prefill") == 24.0
    assert made.rate(rows[1], setting, "decode") == 3 * profiled.new_tokens / 2
    assert Ratio.of([1.5]) == Ratio(1.5, 1.5, 1.5, 1.5, 1.5)


def shown(profiled: Profile) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(report.view(profiled))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_view_says_how_it_was_measured_and_claims_nothing_from_few_repeats(profiled: Profile) -> None:
    text = shown(profiled)
    said = ("random token ids (seed 5)", "* computed", "2 models, each in a process of its own, took turns in each")
    for part in (*said, "So few repeats show no difference at all"):
        assert part in text
    assert "A range that holds 1 shows no difference" in shown(replace(profiled, repeats=5))
    assert "loaded anew in each repeat" in shown(replace(profiled, resident=False))


ROW = (
    "name source plan parameters active_parameters active_experts weight_gib peak_gib memory dtype balance experts "
    "devices layers without_layers speeds"
)
LAYER = "layer experts counts shares tokens active cv max_over_mean entropy busiest idlest"
SPEED = (
    "batch prompt_length prefill_seconds decode_seconds prefill_tokens_per_second prefill_over_first "
    "decode_tokens_per_second decode_over_first"
)


def check_json(file: Path, names: list[str]) -> dict[str, Any]:
    """The record in the file, held against its form and against the CSV beside it."""
    record: dict[str, Any] = json.loads(file.read_text())
    assert (record["format"], record["version"]) == ("moeopt-profile", 1)
    assert [each["name"] for each in record["rows"]] == names
    for each in record["rows"]:
        assert list(each) == ROW.split()
        assert {tuple(layer) for layer in each["layers"]} == {tuple(LAYER.split())}
        assert {tuple(speed) for speed in each["speeds"]} == {tuple(SPEED.split())}
        for speed, setting in zip(each["speeds"], record["settings"], strict=True):
            assert {key: speed[key] for key in setting} == setting
            assert len(speed["prefill_seconds"]) == record["repeats"]
            assert list(speed["decode_over_first"]) == ["median", "low", "high", "lower", "upper"]
    lines = list(csv.DictReader(file.with_suffix(".csv").open()))
    assert len(lines) == len(names) * len(record["settings"])
    line, speed = lines[-1], record["rows"][-1]["speeds"][-1]
    assert int(line["parameters"]) == record["rows"][-1]["parameters"]
    assert float(line["balance_cv"]) == record["rows"][-1]["balance"]["cv"]
    assert float(line["prefill_over_first_median"]) == speed["prefill_over_first"]["median"]
    return record


def test_everything_is_saved(profiled: Profile, tmp_path: Path) -> None:
    report.save(profiled, tmp_path / "profile.json")
    record = check_json(tmp_path / "profile.json", [each.name for each in profiled.rows])
    assert record["rows"][1]["plan"] == PRUNED.fingerprint
    assert [each["memory"] for each in record["rows"]] == ["measured", *["computed"] * 3, "measured"]
    with pytest.raises(ProfileError, match="cannot write"):
        report.save(profiled, tmp_path / "no" / "profile.json")


@pytest.mark.slow
def test_the_command_reloads_models_that_do_not_fit_together(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "HEADROOM", math.inf)
    PRUNED.save(tmp_path / "mine.safetensors")
    (tmp_path / "text.txt").write_text("Some words, on many lines, that an expert may like.\n" * 200)
    what = ["--plan", str(tmp_path / "mine.safetensors"), "--data", str(tmp_path / "text.txt")]
    what += ["--task-option", "fractions=[0,0,1]", "--batch", "2", "--prompt-length", "16", "--new-tokens", "1"]
    timed = ["--repeats", "1", "--threads", "1", "--balance-tokens", "64", "--out", str(tmp_path / "out.json")]
    assert main(["profile", str(MODEL), str(exported), *what, *timed]) == 0
    out, err = capsys.readouterr()
    assert "loaded anew in each repeat" in " ".join(out.split())
    assert "Prompts: task text, split test" in out
    assert "Traceback" not in err
    record = check_json(tmp_path / "out.json", ["model", "mine", "small"])
    assert not record["resident"]
    assert record["tokens"]["balance"] == 64
    assert record["rows"][1]["layers"][0]["counts"] == record["rows"][2]["layers"][0]["counts"]


@pytest.fixture
def dense(tiny_llama: Any, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


BAD = {
    "no folder": (["./missing"], "no checkpoint folder", "./missing"),
    "a file": ([__file__], "is a file"),
    "a batch that is no number": ([str(MODEL), "--batch", "1,x"], "--batch", "'1,x'"),
    "no prompt": ([str(MODEL), "--prompt-length", "-3"], "--prompt-length", "'-3'"),
    "no plan": ([str(MODEL), "--plan", "missing.safetensors"], "missing.safetensors"),
    "an output that is no JSON": ([str(MODEL), "--out", "x.csv"], ".json", "'x.csv'"),
    "an output nowhere": ([str(MODEL), "--out", "/no/such/x.json"], "/no/such"),
    "an option of no task": ([str(MODEL), "--task-option", "window=16"], "--task-option"),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command prints on stderr."""
    assert main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith("Error: ")
    return message


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_profiled_is_refused_at_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, *named = BAD[name]
    message = refused(arguments, capsys)
    assert all(text in message for text in named), message


def test_what_the_configs_tell_is_checked_before_weights_are_read() -> None:
    with pytest.raises(ProfileError, match="plan 'short' is for 2 MoE layers, the first model has 6"):
        check_plan("short", Plan.identity(2, N, K), [(N, K)] * LAYERS)
    with pytest.raises(ProfileError, match="layer 0 of plan 'few' is for 4 experts, the first model has 8"):
        check_plan("few", Plan.identity(LAYERS, 4, K), [(N, K)] * LAYERS)
    with pytest.raises(ProfileError, match="481 tokens and 32 new ones exceed the 512 positions of 'x'"):
        check_length("x", 512, [Setting(1, 481), Setting(8, 16)], 32)
    check_length("x", 512, [Setting(1, 480)], 32)
    check_length("x", None, [Setting(1, 481)], 32)


@pytest.mark.parametrize(
    "bad", [{"batch": []}, {"batch": [True]}, {"repeats": 0}, {"threads": 0}, {"prompt_length": [1.5]}]
)
def test_numbers_are_checked_first(bad: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=next(iter(bad))):
        moeopt.profile(MODEL, **bad)


def test_a_dense_model_is_profiled_without_loads_and_takes_no_plan(
    dense: Path, tiny_llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host()
    facts = host.open(str(dense), **OPTIONS)
    assert (facts["layers"], facts["reason"]) == ([], "a dense model")
    host.load(list(range(100)))
    answer = host.inspect(None, batch=2, prompt_length=8, new_tokens=2, balance_tokens=32)
    whole = sum(p.numel() for p in tiny_llama.parameters())
    assert (answer["parameters"], answer["active_parameters"], answer["loads"]) == (whole, whole, [])
    assert min(host.time(None, [(2, 8)], new_tokens=2, rehearse=True)[0]) > 0
    PRUNED.save(tmp_path / "plan.safetensors")
    assert "dense" in refused([str(dense), "--plan", str(tmp_path / "plan.safetensors")], capsys)


W = [[0.5, 0.5, 0, 0, 0, 0, 0, 0], [0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0.5]]
HALVES: Any = [[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4]
NOVICES = LayerPlan(N, K, kept=(1, 3, 5, 6), router="whole", novices=np.full((4, 96), 0.01, np.float32))
CUSTOM = {
    "skipping": FULL.with_skip(SKIP),
    "probabilities mapped": Plan((LayerPlan(N, K, w_em=W, w_rm=W, router="prob"),) * LAYERS),  # type: ignore[arg-type]
    "aliased": Plan((LayerPlan(N, K, kept=(1, 5), w_rm=HALVES, router="alias"),) * LAYERS),
    "novices, as many as experts": Plan((NOVICES,) * LAYERS).with_skip([0.0, 0.5] * (LAYERS // 2)),
    "r and k differ": Plan.one_hot([range(r) for r in (1, 2, 3, 8, 5, 4)], experts=N, k=1),
}


STREAM = [(7 * i) % 250 for i in range(64)]


def hosted(source: Path) -> Host:
    host = Host()
    host.open(str(source), **OPTIONS)
    host.load(STREAM)
    return host


@pytest.fixture(scope="module")
def original() -> Host:
    return hosted(MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUSTOM)
def test_checkpoints_with_a_class_of_moeopt_are_profiled_as_their_plans(
    name: str, original: Host, tmp_path: Path
) -> None:
    out = moeopt.export(CUSTOM[name], tmp_path / "custom", model=MODEL)
    CUSTOM[name].save(tmp_path / "plan.safetensors")
    what: dict[str, Any] = {"batch": 1, "prompt_length": 16, "new_tokens": 1, "balance_tokens": 64}
    planned = original.inspect(str(tmp_path / "plan.safetensors"), **what)
    real = hosted(out).inspect(None, **what)
    for key in ("parameters", "active_parameters", "weight_bytes"):
        assert planned[key] == real[key], key
    assert len(planned["loads"]) == len(real["loads"]) == LAYERS
    for single, other in zip(planned["loads"], real["loads"]):
        moved = sum(abs(a - b) for a, b in zip(single["counts"], other["counts"])) / 2
        assert moved <= (2 if "mapped" in name else 0)  # the demo model's file, merged, is rounded to its bfloat16
        assert single["tokens"] == other["tokens"] == 64
    (out / "helper.py").touch()
    with pytest.raises(ModelError, match=r"brings code \(helper\.py\)"):
        Host().open(str(out), **OPTIONS)


def test_code_in_a_checkpoint_runs_only_when_trusted(make_mixtral: Any, tmp_path: Path) -> None:
    make_mixtral(layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import MixtralForCausalLM\n\n\nclass Own(MixtralForCausalLM):\n    pass\n"
    )
    host = Host()
    host.open(str(tmp_path), **{**OPTIONS, "trust_remote_code": True})
    assert host.load(list(range(64)))["architecture"] == "Own"
    assert host.inspect(None, batch=1, prompt_length=8, new_tokens=1, balance_tokens=32)["loads"]


@pytest.mark.slow
def test_a_worker_passes_errors_on_and_its_end_is_one(tmp_path: Path) -> None:
    worker = Checkpoint("model", str(MODEL), OPTIONS)
    try:
        worker.open()
        with pytest.raises(ModelError, match="no checkpoint folder"):
            worker.ask("open", source="./missing", **OPTIONS)
        assert worker._process is not None
        worker._process.kill()
        with pytest.raises(ProfileError, match="ended with code -9; was there too little memory"):
            worker.ask("load", stream=[1, 2, 3])
    finally:
        worker.close()


def test_ctrl_c_ends_it_and_its_workers() -> None:
    command = [sys.executable, "-m", "moeopt", "profile", str(MODEL), "--repeats", "10000", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (workers := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert not any(worker.is_running() for worker in workers)
