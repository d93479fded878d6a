"""Tasks of lm-evaluation-harness as objectives: its prompts, tokens and metrics, in splits that never overlap."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.evaluation import Evaluator, lm_eval_report


def get(name: str, folder: Path, **options: Any) -> tasks.Task:
    return tasks.get(f"lm_eval:{name}", include_path=folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shots"),
    [("sums", 0), ("sums", 3), ("sums_word", 2), ("sums_two_prompts", 1), ("sums_alone", 2), ("all_sums", 0)],
)
def test_loss_and_metrics_are_those_of_the_harness(name, shots, harness_tasks, tiny_model, tiny_tokenizer):
    fractions = (0.0, 0.0, 1.0) if name == "sums_word" else (0.4, 0.2, 0.4)
    task = get(name, harness_tasks, num_fewshot=shots, fractions=fractions)
    evaluation = Evaluator(tiny_model, tiny_tokenizer, task, split="test").evaluate(None)
    report = lm_eval_report(tiny_model, tiny_tokenizer, name, include_path=harness_tasks, num_fewshot=shots)
    theirs = report[name].samples["acc,none"]
    if name != "all_sums":
        places = [int(example.id.split()[-1]) for example in task.examples("test")]
        np.testing.assert_array_equal(evaluation.correct, [theirs[i] for i in places])
    if name != "sums_alone":
        assert len(theirs) == len(evaluation.losses) == (80 if name == "all_sums" else 40)
        assert evaluation.metrics["acc"] == pytest.approx(report[name].metrics["acc,none"])
    assert ("acc_norm" in evaluation.metrics) == (name != "sums_word")
    assert report[name].difference(report[name]).mean == 0


def test_log_likelihoods_are_those_of_the_harness(harness_tasks, tiny_model, tiny_tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    task = get("sums", harness_tasks, num_fewshot=2)
    pairs = [(example.prompt, option) for example in task.examples("test") for option in example.options]
    lm = HFLM(pretrained=tiny_model, tokenizer=copy.deepcopy(tiny_tokenizer), batch_size=3)
    expected = [lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)[0][0] for pair in pairs]
    evaluation = Evaluator(tiny_model, tiny_tokenizer, task, split="test").evaluate(None)
    right = [2 * i + example.answer for i, example in enumerate(task.examples("test"))]
    tokens = [len(pairs[i][1]) for i in right]  # a token is a byte
    np.testing.assert_allclose(evaluation.losses, [-expected[i] / n for i, n in zip(right, tokens)], rtol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_as_in_the_harness(harness_tasks, tiny_model, tiny_tokenizer):
    task = get("sums", harness_tasks, num_fewshot=5)
    with pytest.warns(UserWarning, match="40 of 40 prompts were cut"):
        ours = Evaluator(tiny_model, tiny_tokenizer, task, split="test", max_length=24)
    assert max(len(request.ids) for request in task.requests("test", tiny_tokenizer)) > 25
    evaluation = ours.evaluate(None)
    report = lm_eval_report(
        tiny_model, tiny_tokenizer, "sums", include_path=harness_tasks, num_fewshot=5, max_length=24
    )
    assert evaluation.metrics["acc"] == pytest.approx(report["sums"].metrics["acc,none"])


@pytest.mark.parametrize("name", ["sums", "sums_alone"])
def test_splits_do_not_overlap_and_no_prompt_shows_its_answer_or_a_later_split(name, harness_tasks):
    plain, shown = get(name, harness_tasks), get(name, harness_tasks, num_fewshot=4)
    assert plain.splits == shown.splits == ("search", "dev", "test")
    questions = {split: {example.prompt for example in plain.examples(split)} for split in plain.splits}
    assert not questions["search"] & questions["dev"]
    assert not (questions["search"] | questions["dev"]) & questions["test"]
    for split, hidden in (("search", questions["dev"] | questions["test"]), ("dev", questions["test"])):
        assert {e.id for e in plain.examples(split)} == {e.id for e in shown.examples(split)}
        for example in shown.examples(split):
            *examples, question = example.prompt.split("\n\n")
            assert len(examples) == 4
            asked = {text.partition("=")[0] + "=" for text in examples}
            assert question in questions[split]
            assert not asked & (hidden | {question})


def test_a_metric_that_the_harness_cannot_aggregate_is_named(harness_tasks, tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "three.yaml").write_text(
        f"include: {harness_tasks / 'base'}\ntask: three\n"
        'doc_to_target: "{{a % 3}}"\ndoc_to_choice: [x, y, z]\nmetric_list: [{metric: f1, aggregation: f1}]\n'
    )
    evaluator = Evaluator(tiny_model, tiny_tokenizer, get("three", tmp_path), split="test")
    with pytest.raises(TaskError, match=r"'three' cannot aggregate 'f1' \(ValueError: Target is multiclass"):
        evaluator.evaluate()


def test_describe_names_versions(harness_tasks):
    import lm_eval

    described = get("sums", harness_tasks, num_fewshot=1).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["template"] == f"lm_eval {lm_eval.__version__}"
    assert described["tasks"]["sums"] == {
        "version": 2.0, "output_type": "multiple_choice", "num_fewshot": 1, "data_set": ["json", None],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sum", {}, r"unknown task 'sum'; did you mean 'sums'\?"),
        ("sums_written", {"metric": "acc"}, "'lm_eval:sums_written' has no metric 'acc' .it has exact_match"),
        ("sums", {"num_fewshot": -1}, "num_fewshot must be an integer of at least 0, got -1"),
        ("sums", {"most": 0}, "most must be at least 1, got 0"),
        ("sums", {"data": "nowhere.jsonl"}, "data file nowhere.jsonl does not exist"),
        ("sums_alone", {"num_fewshot": 40}, "too few documents .* to show 40 of"),
        ("sums", {"shots": 1}, "'lm_eval:sums' has no option 'shots'"),
    ],
)
def test_bad_input_gets_one_clear_error(name, options, message, harness_tasks):
    with pytest.raises(TaskError, match=message):
        get(name, harness_tasks, **options)


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n"
    )
    with pytest.raises(TaskError, match=r"'t' .data set 'json'. cannot be loaded .FileNotFoundError.*local files"):
        get("t", tmp_path)
    (tmp_path / "u.yaml").write_text("task: u\ndoc_to_text: !function gone.f\n")
    with pytest.raises(TaskError, match=r"unknown task 'v'.*u.yaml cannot be read"):
        get("v", tmp_path)
