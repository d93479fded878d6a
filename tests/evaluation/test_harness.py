"""Reports of lm-evaluation-harness on a live model: its own numbers, and everything left as found."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import moeopt
from moeopt.cli import main
from moeopt.errors import TaskError
from moeopt.evaluation import lm_eval_report
from moeopt.plan import Plan

KINDS = ("sums", "sums_word", "sums_written", "sums_text")
PLAN = Plan.one_hot([[0, 2], [1, 3]], experts=4, k=2)


def test_the_live_patched_model_gets_the_numbers_of_the_exported_checkpoint(
    harness_tasks, tiny_model, tiny_tokenizer, tmp_path
):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tiny_model.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    moeopt.export(PLAN, tmp_path / "small", model=str(tmp_path / "full"))
    manager = TaskManager(include_path=harness_tasks, include_defaults=False)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    expected = simple_evaluate(
        HFLM(pretrained=small, tokenizer=copy.deepcopy(tiny_tokenizer)),
        tasks=list(KINDS),
        task_manager=manager,
        bootstrap_iters=0,
    )
    report = lm_eval_report(tiny_model, tiny_tokenizer, KINDS, PLAN, include_path=harness_tasks, bootstrap_iters=0)
    for name in KINDS:
        for key, value in report[name].metrics.items():
            assert value == pytest.approx(expected["results"][name][key], rel=1e-5)
        assert list(report[name].documents) == [row["doc_hash"] for row in expected["samples"][name]]
        assert report[name].version == 2.0
    assert (
        report["sums_text"].metrics
        != lm_eval_report(tiny_model, tiny_tokenizer, "sums_text", include_path=harness_tasks, bootstrap_iters=0)[
            "sums_text"
        ].metrics
    )


def test_a_tokenizer_that_ends_every_text_gets_the_numbers_of_one_that_does_not(
    harness_tasks, tiny_model, tiny_tokenizer
):
    ending = copy.deepcopy(tiny_tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    options = {"include_path": harness_tasks, "limit": 8, "bootstrap_iters": 0}
    plain = lm_eval_report(tiny_model, tiny_tokenizer, KINDS, PLAN, **options)
    with pytest.warns(UserWarning, match=r"the tokenizer ends every text with \['</s>'\]: left out here"):
        report = lm_eval_report(tiny_model, ending, KINDS, PLAN, **options)
    assert {name: report[name].samples for name in KINDS} == {name: plain[name].samples for name in KINDS}
    assert ending("a")["input_ids"][-1] == 257


def test_model_tokenizer_and_random_states_are_left_as_found(harness_tasks, tiny_model, tiny_tokenizer):
    tiny_model.train()
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}

    def state() -> list[object]:
        numpy = np.random.get_state()  # noqa: NPY002
        sides = tiny_tokenizer.pad_token, tiny_tokenizer.padding_side, tiny_tokenizer.truncation_side
        return [random.getstate(), numpy[1].tolist(), torch.get_rng_state().tolist(), sides, tiny_model.training]

    before = state()
    lm_eval_report(tiny_model, tiny_tokenizer, ["sums", "sums_written"], PLAN, include_path=harness_tasks, limit=2)
    moeopt.tasks.get("lm_eval:sums", include_path=harness_tasks)
    assert state() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert not tiny_model.model.layers[0].mlp.gate._forward_hooks


def test_differences_are_paired_on_the_same_documents(harness_tasks, tiny_model, tiny_tokenizer):
    def report(plan: Plan | None, limit: int | None = None):
        return lm_eval_report(
            tiny_model, tiny_tokenizer, ["sums", "sums_text"], plan, include_path=harness_tasks, limit=limit
        )

    full, small = report(None), report(PLAN)
    for name in full.results:
        key = full[name].main
        interval = small[name].difference(full[name])
        assert interval.mean == pytest.approx(small[name].metrics[key] - full[name].metrics[key])
        assert interval.low <= interval.mean <= interval.high
        same = full[name].difference(full[name])
        assert same.mean == same.low == same.high == 0
    assert json.loads(json.dumps(small.to_json()))["results"]["sums"]["metrics"] == dict(small["sums"].metrics)
    with pytest.raises(TaskError, match="not of the same documents"):
        full["sums"].difference(report(None, limit=3)["sums"])
    with pytest.raises(TaskError, match="no 'acc' by document; did you mean 'acc,none'"):
        full["sums"].difference(small["sums"], "acc")
    with pytest.raises(TaskError, match="no task 'sum'; did you mean 'sums'"):
        full["sum"]


def test_the_command_sets_full_and_small_side_by_side(harness_tasks, tiny_model, tiny_tokenizer, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    PLAN.save(tmp_path / "plan.safetensors")
    command = ["lm-eval", str(tmp_path / "full"), "--include-path", str(harness_tasks), "--limit", "4"]
    out = tmp_path / "results.json"
    plan = ["--plan", str(tmp_path / "plan.safetensors"), "--out", str(out), "--dtype", "float32"]
    assert main([*command, "--tasks", "sums,sums_written", *plan]) == 0
    shown = capsys.readouterr().out
    assert "exact_match" in shown
    assert "small − full" in shown
    saved = json.loads(out.read_text())
    assert len(saved["small"]["results"]["sums"]["samples"]["acc,none"]) == 4
    for bad, message in ((["--tasks", "summs"], "did you mean 'sums'"), (["--tasks", "a,"], "names between commas")):
        assert main([*command, *bad]) == 2
        assert message in capsys.readouterr().err
    assert not Path(tmp_path / "offload").exists()
