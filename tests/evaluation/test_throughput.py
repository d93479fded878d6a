"""How many tokens a forward pass takes: measured on an accelerator, kept in the study, 1,024 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moeopt
from moeopt import Evaluator
from moeopt.evaluation import passes, throughput
from moeopt.evaluation.throughput import smallest_near_best, throughputs
from moeopt.study import recipe
from moeopt.tasks import TextTask

TASK = TextTask("words", search=[f"document {i} says one two three four" for i in range(6)], window=24)


class Device:
    """Whose clock goes on by what a run takes: `launch` seconds, and a token in 1 / `rate`."""

    def __init__(self, launch: float, rate: float, tokens: float = float("inf")) -> None:
        self.launch, self.rate, self.tokens, self.now = launch, rate, tokens, 0.0
        self.ran: list[int] = []

    def run(self, size: int) -> int:
        self.ran.append(size)
        if size > self.tokens:
            raise torch.OutOfMemoryError("out of memory")
        self.now += self.launch + size / self.rate
        return size

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("device", "largest_tried", "chosen"),
    [
        (Device(0.0, 1e5), 32768, 1024),  # the fewest, where more bring nothing
        (Device(1.0, 1e5), 32768, 32768),
        (Device(0.001, 1e6), 32768, 16384),  # 0.943 of the device's rate, where 32k reach 0.970, and 8k 0.891
        (Device(1.0, 1e5, tokens=5000), 8192, 4096),
        (Device(1.0, 1e5, tokens=0), 1024, 1024),
    ],
)
def test_the_fewest_tokens_near_the_best_are_taken(device: Device, largest_tried: int, chosen: int) -> None:
    rates = throughputs(device.run, lambda size: True, clock=device.clock)
    assert max(device.ran) == largest_tried
    assert all(rate == pytest.approx(size / (device.launch + size / device.rate)) for size, rate in rates.items())
    assert smallest_near_best(rates) == chosen


def test_what_does_not_fit_is_not_tried_and_other_errors_are_raised() -> None:
    device = Device(1.0, 1e5)
    assert list(throughputs(device.run, lambda size: size <= 4096, clock=device.clock)) == [1024, 2048, 4096]

    def broken(size: int) -> int:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        throughputs(broken, lambda size: True)


@pytest.mark.parametrize("layer_major", [True, False], ids=["by layers", "whole"])
def test_an_accelerator_is_measured_once_and_that_is_said(
    make_mixtral: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, layer_major: bool
) -> None:
    model = make_mixtral(layers=2)
    expected = Evaluator(model, tiny_tokenizer, TASK)
    assert expected.batch_tokens == 1024
    if not layer_major:
        monkeypatch.setattr(passes, "layerwise", _refused)
    monkeypatch.setattr(throughput, "is_accelerator", lambda device: True)
    monkeypatch.setattr(throughput, "_wait_for", lambda device: None)
    sizes: list[int] = []

    def found(run: Callable[[int], int], fits: Callable[[int], bool]) -> dict[int, float]:
        for size in (64, 128):
            assert fits(size)
            sizes.append(run(size))
        return {64: 1.0, 128: 2.0}

    monkeypatch.setattr(throughput, "throughputs", found)
    with pytest.warns(UserWarning, match=r"batch_tokens is 128, .* reached on cpu \(64: 1 tokens/s, 128: 2 tokens/s\)"):
        evaluator = Evaluator(model, tiny_tokenizer, TASK)
    assert evaluator.batch_tokens == 128
    assert len(sizes) == 2
    assert all(0 < tokens <= size for tokens, size in zip(sizes, (64, 128)))
    assert Evaluator(model, tiny_tokenizer, TASK).batch_tokens == 128
    assert len(sizes) == 2
    assert evaluator.evaluate().losses == pytest.approx(expected.evaluate().losses, rel=1e-5)


def _refused(model: Any) -> None:
    raise moeopt.errors.ModelError("it keeps state")


def test_a_study_keeps_the_number(make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    model, storage = make_mixtral(layers=2), f"sqlite:///{tmp_path}/study.db"
    space = moeopt.PruneSpace.of(model, keep=4)

    def objective(**options: Any) -> moeopt.Objective:
        return moeopt.Objective(model, tiny_tokenizer, TASK, space, **options)

    made = moeopt.create_study("s", objective=objective(batch_tokens=48), storage=storage)
    assert recipe.read(made).objective["batch_tokens"] == 48
    on = objective()
    assert on.evaluator.batch_tokens == 1024
    study = moeopt.create_study("s", objective=on, storage=storage, load_if_exists=True)
    assert on.evaluator.batch_tokens == on.settings["batch_tokens"] == 48
    moeopt.optimize(study, on, n_trials=2)
    given, late = objective(batch_tokens=32), objective()
    for each in (given, late):
        each.check(study)
    assert (given.evaluator.batch_tokens, late.evaluator.batch_tokens) == (32, 48)
    assert moeopt.create_study("t", objective=objective(), storage=storage).user_attrs
