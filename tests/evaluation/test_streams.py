"""Hidden states kept in memory are copied on a stream of their own; without a GPU, on streams that note what waits."""

from __future__ import annotations

import copy
import importlib
from contextlib import contextmanager
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from moeopt.evaluation import Evaluator, prefixes
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import TextTask

layerwise = importlib.import_module("moeopt.models.layerwise")  # whose function has its name in the package
TASK = TextTask("words", search=[f"document {i} says one two three four" for i in range(9)], window=24)


class Streams:
    """Stands for torch.cuda: copies run at once, in whatever stream; `log` says what was asked for in which order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = self.Stream("main", self)

    class Stream:
        def __init__(self, name: str, owner: Streams) -> None:
            self.name, self.log = name, owner.log

        def wait_stream(self, other: Any) -> None:
            self.log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            self.log.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            self.log.append("sent")
            return "arrival"

        def synchronize(self) -> None:
            self.log.append(f"host waits for {self.name}")

    def current_stream(self, device: Any) -> Any:
        return self.main

    @contextmanager
    def stream(self, stream: Any) -> Any:
        yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "current_stream", streams.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.Stream("side", streams))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: streams.log.append(f"held for {stream.name}")
    )
    monkeypatch.setattr(prefixes, "is_cuda", lambda device: True)
    monkeypatch.setattr(prefixes, "pinned_like", torch.empty_like)
    return streams


def test_states_go_out_and_come_back_on_a_side_stream(make_mixtral: Any, tiny_tokenizer: Any, streams: Streams) -> None:
    model = make_mixtral(layers=3)
    first = Plan.one_hot([[0, 1, 2, 3]] * 3, experts=8, k=2)
    other = Plan((*first.layers[:2], *Plan.one_hot([[4, 5, 6, 7]] * 3, experts=8, k=2).layers[2:]))
    fresh = Evaluator(model, tiny_tokenizer, TASK, batch_tokens=60, prefix_memory=0).evaluate(other)
    evaluator = Evaluator(model, tiny_tokenizer, TASK, batch_tokens=60, prefix_device="cpu")
    streams.log.clear()
    evaluator.evaluate(first)
    assert streams.log.count("side waits for main") == streams.log.count("held for side") >= 2 * len(evaluator.batches)
    streams.log.clear()
    reused = evaluator.evaluate(other)
    np.testing.assert_array_equal(reused.losses, fresh.losses)
    assert reused.layer_tokens == fresh.layer_tokens // 3
    batches = len(evaluator.batches)
    assert batches > 2
    # the next one is sent before this one is waited for, and its memory is held while the layer reads it
    turn = ["sent", "main waits for arrival", "held for main"]
    assert streams.log == ["sent", *turn * (batches - 1), *turn[1:]]


@pytest.mark.parametrize("short_of_memory", [False, True])
def test_the_next_layer_is_sent_before_this_one_is_dropped(
    make_mixtral: Any,
    tiny_tokenizer: Any,
    streams: Streams,
    monkeypatch: pytest.MonkeyPatch,
    short_of_memory: bool,
) -> None:
    matrix = np.eye(4, 8, dtype=np.float32) + 0.1
    plan = Plan((LayerPlan(8, 2, w_em=matrix, w_rm=matrix, router="prob"),) * 3)
    model = make_mixtral(layers=3)
    expected = Evaluator(model, tiny_tokenizer, TASK, batch_tokens=60, prefix_memory=0).evaluate(plan)
    away = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    evaluator = Evaluator(away, tiny_tokenizer, TASK, batch_tokens=60, prefix_memory=0)
    evaluator.evaluate(Plan.identity(3, 8, 2))
    values = layerwise._values

    def sent(module: Any, *rest: Any) -> Any:
        if short_of_memory:
            raise torch.OutOfMemoryError
        if module is away.model.layers[1].self_attn.q_proj:
            gone = away.model.layers[0].self_attn.q_proj.weight.is_meta
            streams.log.append("layer 0 is gone" if gone else "layer 0 is there")
        return values(module, *rest)

    monkeypatch.setattr(layerwise, "_values", sent)
    monkeypatch.setattr(layerwise, "is_cuda", lambda device: True)
    streams.log.clear()
    np.testing.assert_array_equal(evaluator.evaluate(plan).losses, expected.losses)
    assert streams.log.count("main waits for side") == (0 if short_of_memory else 2)
    assert ("layer 0 is there" in streams.log) != short_of_memory
    assert all(parameter.is_meta for parameter in away.model.layers.parameters())


def test_memory_that_cannot_be_pinned_is_said_once(
    make_mixtral: Any, tiny_tokenizer: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(state: Any) -> Any:
        raise RuntimeError("no memory to pin")

    monkeypatch.setattr(prefixes, "pinned_like", refused)
    evaluator = Evaluator(make_mixtral(), tiny_tokenizer, TASK, batch_tokens=60, prefix_device="cpu")
    plan = Plan.one_hot([[0, 1, 2, 3]] * 3, experts=8, k=2)
    with pytest.warns(UserWarning, match="not pinned: no memory to pin") as said:
        expected = evaluator.evaluate(plan)
    assert len(said) == 1
    np.testing.assert_array_equal(evaluator.evaluate(plan).losses, expected.losses)
