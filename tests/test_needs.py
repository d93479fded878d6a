"""What a search will need is told before it starts, and what does not fit is refused or made smaller then."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

import moeopt
from moeopt.errors import StudyError
from moeopt.evaluation import memory, passes
from moeopt.methods import Calibration, registry
from moeopt.report.terminal import needs_table
from moeopt.study import needs, needs_of
from moeopt.tasks import TextTask


@pytest.fixture(scope="module")
def text():
    return TextTask("text", search=["".join(chr(40 + i * j % 50) for i in range(90)) for j in (3, 7, 11)], window=30)


@pytest.fixture
def merging(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    space = moeopt.EEPSpace.of(model, keep=4)
    return moeopt.Objective(model, tiny_tokenizer, text, space, limit=4)


def by_name(objective, **options):
    return {row.what: row for row in needs_of(objective, **options).rows}


def test_every_row_is_what_it_takes(merging, tmp_path):
    model = merging.evaluator.model
    storage = f"sqlite:///{tmp_path}/study.db"
    rows = by_name(merging, n_trials=100, warm_starts=["ream", "loss_aware"], storage=storage)
    assert rows["weights"].bytes == sum(p.nbytes for p in model.parameters())
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert rows["merged experts"].bytes == sum(p.nbytes for p in experts) // 2
    assert rows["method ream"].bytes > 0 < rows["method loss_aware"].bytes
    study = moeopt.create_study("s", objective=merging, storage=storage, sampler="random")
    moeopt.optimize(study, merging, n_trials=3)
    stored = max(len(str(trial.system_attrs)) for trial in study.trials)
    each = by_name(merging)["trials"].bytes
    assert rows["trials"].bytes == 100 * each
    assert stored / 4 < each  # no less than what a pruning takes, give or take what is beside the genotype
    console = Console(width=120, file=io.StringIO())
    console.print(needs_table(needs_of(merging, storage=storage)))
    assert {"merged experts", "of storage"} <= {*re.findall("merged experts|of storage", console.file.getvalue())}


def test_what_does_not_fit_is_refused_before_anything_runs(merging, monkeypatch, tmp_path):
    monkeypatch.setattr(needs, "free_bytes", lambda device: 1 << 20)
    file = tmp_path / "study.db"
    with pytest.raises(StudyError, match=r"needs about .* GB of cpu, .* are free; most of it, .* reused prefixes"):
        moeopt.create_study("s", objective=merging, storage=f"sqlite:///{file}", warm_starts=["naee"])
    assert not file.exists()


def test_merged_experts_that_fill_memory_are_made_anew(merging, monkeypatch):
    whole = by_name(merging)["merged experts"].bytes
    monkeypatch.setattr(passes, "free_bytes", lambda device: whole + 1)
    row = by_name(merging)["merged experts"]
    assert row.bytes * len(merging.evaluator.passes.moe) == whole
    assert "scratch" in row.how


def test_prefixes_get_a_quarter_of_little_memory(make_mixtral, tiny_tokenizer, text, monkeypatch):
    monkeypatch.setattr(passes, "free_bytes", lambda device: 1 << 24)
    with pytest.warns(UserWarning, match="get 4 MiB of cpu, not 1024"):
        evaluator = moeopt.Evaluator(make_mixtral(), tiny_tokenizer, text, limit=2)
    assert evaluator.passes.runner.prefixes.budget == 1 << 22
    assert memory.free_bytes(torch.device("cpu")) > 1 << 24


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_method_says_what_it_holds(name, make_mixtral, tiny_tokenizer, text):
    calibration = Calibration(make_mixtral(), tiny_tokenizer, text, limit=2)
    budget = registry.Budget(calibration.shape.experts, calibration.shape.k, 4, 2)
    sizes = [needs.CalibrationSize(tokens, 1024, 3, 32, 4) for tokens in (1 << 10, 1 << 20)]
    few, many = (registry.get(name).bytes_held(budget, size) for size in sizes)
    assert 0 <= few <= many
