"""The health report: what is told of generated answers, full against small, and when that is called broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeMixtral
from rich.console import Console
from transformers import PreTrainedTokenizerFast

import moeopt
from moeopt import Plan, report
from moeopt.cli import main
from moeopt.errors import TaskError
from moeopt.evaluation.generating import Generator
from moeopt.results.health import LIMITS, MEASURES, Answer, Health, HealthCheck, Measure
from moeopt.results.health.answers import ENOUGH, FIRST, GRAM, LOOP, loops, repeated, told
from moeopt.tasks import Example, GenerationTask, MixtureTask, MultipleChoiceTask, TextTask

LOSS_AWARE = [(4, 5), (3, 4), (2, 4), (3, 6), (0, 7), (2, 3)]
"""What `loss_aware` keeps of the shipped model on 64 questions of its skill roman."""
TEXTS = ["one two", "three four five", "six"]


def plan(model: Any, kept: list[int]) -> Plan:
    shape = moeopt.shape_of(model)
    return Plan.one_hot([kept] * shape.layers, experts=shape.experts, k=min(shape.k, len(kept)))


def test_repetition_and_loops_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        ids = rng.integers(3, size=rng.integers(0, 30)).tolist()
        if rng.random() < 0.5:
            piece = rng.integers(9, size=rng.integers(1, 8)).tolist()
            ids += piece * rng.integers(1, 9)
        grams = [ids[i : i + GRAM] for i in range(len(ids) - GRAM + 1)]
        again = sum(gram in grams[:i] for i, gram in enumerate(grams))
        assert repeated(ids) == pytest.approx(again / len(grams) if grams else 0.0)
        looping = any(
            ids[-times * period :] == ids[-period:] * times and times * period >= LOOP
            for period in range(1, len(ids) + 1)
            for times in range(3, len(ids) // period + 1)
        )
        assert loops(ids) == looping
        seen.add(looping)
    assert seen == {True, False}


def answer(ids: list[int], text: str = "text", ended: bool = True) -> Answer:
    return Answer(text, tuple(ids), ended)


@pytest.mark.parametrize(
    ("small", "expected"),
    [
        (answer([*range(12)]), {}),
        (answer([*range(5)]), {"early": 1.0, "differs": 1 - 5 / FIRST}),
        (answer([*range(5)], ended=False), {"overlong": 1.0, "differs": 1 - 5 / FIRST}),
        (answer([0, 1, 9, *range(3, 12)]), {"differs": 1 - 2 / FIRST}),
        (answer([], " \n"), {"empty": 1.0, "early": 1.0, "differs": 1.0}),
        (answer([0, *[7] * 14]), {"repeated": 10 / 12, "loops": 1.0, "differs": 1 - 1 / FIRST}),
    ],
)
def test_what_is_told_of_an_answer(small: Answer, expected: dict[str, float]) -> None:
    full = answer([*range(12)])
    measured = told(small, full)
    assert measured.pop("length") == len(small.ids)
    assert measured == pytest.approx({**dict.fromkeys(LIMITS, 0.0), **expected})


def measure(small: list[float], limit: float | None = 0.1) -> Measure:
    return Measure("loops", np.zeros(len(small)), np.array(small), limit)


def test_a_verdict_asks_for_the_whole_interval_and_for_enough_prompts() -> None:
    assert measure([0.0] * ENOUGH).verdict == "holds"
    assert measure([0.0] * (ENOUGH - 1)).verdict == "unclear"
    assert measure([1.0] * 2 + [0.0] * ENOUGH).verdict == "unclear"
    assert measure([1.0] * 5 + [0.0] * ENOUGH).verdict == "broken"
    assert measure([1.0] * ENOUGH, limit=None).verdict is None


@pytest.fixture
def model(make_mixtral: MakeMixtral) -> Any:
    return make_mixtral(layers=2, experts=4, seed=3)


def test_answers_are_those_of_greedy_generation_and_the_full_model_answers_once(
    model: Any, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run = Generator.run

    def counted(self: Generator, under: Plan | None, *at: int) -> Any:
        ran.append(under)
        return run(self, under, *at)

    monkeypatch.setattr(Generator, "run", counted)
    check = HealthCheck(model, tiny_tokenizer, TEXTS, new_tokens=12)
    small, identity = plan(model, [1, 2]), plan(model, [0, 1, 2, 3])
    healths = check(small), check(identity)
    assert ran.count(None) == 1
    for health, under in zip(healths, (small, identity)):
        assert health.full is check.full
        for text, written in zip(TEXTS, health.small):
            ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.inference_mode(), moeopt.patched(model, under):
                whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257)
            new = whole[0, ids.shape[1] :].tolist()
            assert list(written.ids) == (new[: new.index(257)] if 257 in new else new)
    same = healths[1]
    assert all((m.small == m.full).all() and m.change.mean == 0 for m in same.measures.values())
    assert same.verdict == "unclear"
    assert "too few" in str(same)


def test_prompts_of_every_kind_of_task(model: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [Example(f"{i}", f"question {i}:", (" yes", " no"), i % 2) for i in range(4)]
    choice = MultipleChoiceTask("choice", dev=asked)
    written = GenerationTask("written", dev=asked, stop="\n", max_new_tokens=3)
    text = TextTask("text", dev=["a text of 31 bytes, told twice." * 2], window=32)
    mixture = MixtureTask([(choice, 1.0), (written, 1.0)])
    for task in (choice, written, mixture):
        check = HealthCheck(model, tiny_tokenizer, task, limit=2, new_tokens=8)
        assert sorted(check.prompts) == sorted(f"<s>{e.prompt}" for e in task.examples("dev")[:2])
    assert {len(a.ids) <= 3 for a in HealthCheck(model, tiny_tokenizer, written, new_tokens=8).full} == {True}
    halves = HealthCheck(model, tiny_tokenizer, text, limit=2, new_tokens=8)
    assert [len(tiny_tokenizer(p, add_special_tokens=False)["input_ids"]) for p in halves.prompts] == [16, 16]


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("one text", {}, "prompts must be a task or a list of texts"),
        ([], {}, "prompts must be a task or a list of texts"),
        (TEXTS, {"new_tokens": 0}, "new_tokens must be an integer of at least 1, got 0"),
        (TEXTS, {"new_tokens": 600}, "new_tokens must be below the 512 tokens"),
        (TEXTS, {"limits": {"loop": 1}}, "a limit is of one of repeated, .*, got 'loop'"),
        (TEXTS, {"chat": True}, "no chat template"),
    ],
)
def test_what_is_no_check_is_refused(
    model: Any, tiny_tokenizer: PreTrainedTokenizerFast, source: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        HealthCheck(model, tiny_tokenizer, source, **options)


def made(text: str, prompts: int = ENOUGH) -> Health:
    full, small = answer([*range(12)]), answer([0, *[7] * 14], text)
    at_full, at_small = told(full, full), told(small, full)
    measures = {
        name: Measure(name, np.full(prompts, at_full[name]), np.full(prompts, at_small[name]), LIMITS.get(name))
        for name in MEASURES
    }
    return Health("print", "of", "given texts", (text,) * prompts, (full,) * prompts, (small,) * prompts, 64, measures)


def test_a_report_is_written_and_its_texts_run_nothing(tmp_path: Path) -> None:
    health = made("\x1b[31m<script>alert(1)</script>\u202e\n")
    assert health.verdict == "broken"
    assert {reason.partition(":")[0] for reason in health.reasons} == {"repeated", "loops", "differs"}
    report.save(health, tmp_path / "new" / "health.json")
    record = json.loads((tmp_path / "new" / "health.json").read_text())
    assert record == json.loads(json.dumps(health.record))
    assert (tmp_path / "new" / "health.csv").read_text().count("alert") == 2 * ENOUGH
    page = (tmp_path / "new" / "health.html").read_text()
    assert "<script>alert" not in page
    assert "script-src 'none'" in page
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.view(health))
    shown = console.export_text()
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown
    assert "its answers fall apart on 30 prompts" in " ".join(shown.split())


def test_a_plan_that_keeps_its_loss_and_fails_its_health_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    model, tokenizer = moeopt.load(moeopt.demo.MODEL)
    task = moeopt.demo.skill_task("roman")
    small = Plan.one_hot(LOSS_AWARE, experts=8, k=2)
    dev = moeopt.Evaluator(model, tokenizer, task, split="dev", limit=100, score="choice")
    change = moeopt.paired_bootstrap(dev.evaluate(small), dev.evaluate())
    assert change.within(0.02) == "holds"
    small.save(tmp_path / "small.safetensors")
    sections = moeopt.demo.skill_task("text").examples("dev")
    lines = [line for e in sections for line in e.options[0].splitlines() if len(line) > 40][:32]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    command = ["health", str(moeopt.demo.MODEL), "--plan", str(tmp_path / "small.safetensors"), "--new-tokens", "32"]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, *prompts, "--out", str(tmp_path / "health.json")]) == 1
    assert "its answers fall apart on 32 prompts" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "health.json").read_text())["verdict"] == "broken"

    assert "give either --task" in refused(command)
    assert "give either --task" in refused([*command, *prompts, "--task", "boolq"])
    assert "must be a .json file" in refused([*command, *prompts, "--out", "health.txt"])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}')
    assert "line 2: 'prompt' must be a text" in refused([*command, "--prompts", str(tmp_path / "rows.jsonl")])
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "has no prompts" in refused([*command, "--prompts", str(tmp_path / "empty.txt")])
