"""Running out of memory: smaller batches, the same losses; merged experts of one layer at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moeopt.errors import OutOfMemoryError
from moeopt.evaluation import Evaluator, passes
from moeopt.evaluation.memory import free_bytes, merged_bytes, ran_out
from moeopt.models import merging, moe_layers
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import Example, MultipleChoiceTask, TextTask

LAYERS, EXPERTS = 3, 4
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 79 GiB")
ERRORS = [
    OUT,
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
]
TASKS = {
    "text": TextTask("text", search=[f"line {i}: some text that goes on " * 4 for i in range(8)], window=64),
    "questions": MultipleChoiceTask(
        "questions", search=[Example(str(i), f"{'so ' * (i % 9)}is {i} odd?", ("n", "y"), i % 2) for i in range(20)]
    ),
}
ONE_HOT = Plan.one_hot([[0, 1], [2, 3], [3, 1]], experts=EXPERTS, k=2)


def merging_plan(seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)

    def matrix() -> np.ndarray:
        return (np.eye(EXPERTS)[[0, 2]] + 0.1 * rng.normal(size=(2, EXPERTS))).astype(np.float32)

    return Plan(tuple(LayerPlan(EXPERTS, 2, w_em=matrix(), w_rm=matrix(), router="prob") for _ in range(LAYERS)))


@pytest.fixture
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=LAYERS, experts=EXPERTS)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Any:
    return TASKS[request.param]


class Small:
    """A device on which a layer fits at most so many tokens: a hook that raises beyond them."""

    def __init__(self, module: nn.Module, error: BaseException = OUT) -> None:
        self.tokens, self.error = 1 << 30, error
        self.sizes: list[int] = []
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.sizes.append(args[0].shape[:-1].numel())
        if self.sizes[-1] > self.tokens:
            raise self.error


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "error"), list(zip(cycle([None, ONE_HOT, merging_plan()]), ERRORS)))
def test_batches_are_halved_until_they_fit(
    model: Any, tiny_tokenizer: Any, task: Any, plan: Plan | None, error: BaseException
) -> None:
    expected = Evaluator(model, tiny_tokenizer, task).evaluate(plan)
    evaluator = Evaluator(model, tiny_tokenizer, task, batch_tokens=1024)
    device = Small(model.model.layers[-1].mlp, error)
    longest = max(batch.ids.shape[1] for batch in evaluator.batches)
    device.tokens = 2 * longest + 1
    with pytest.warns(UserWarning, match=r"out of memory: going on with \d+ tokens a forward pass"):
        result = evaluator.evaluate(plan)
    np.testing.assert_allclose(result.losses, expected.losses, atol=1e-5)
    assert (result.tokens, result.layer_tokens) == (expected.tokens, expected.layer_tokens)
    assert evaluator.batch_tokens <= device.tokens < 4 * evaluator.batch_tokens
    device.sizes.clear()
    for _ in range(2):  # what fits is remembered, and nothing is lost
        np.testing.assert_array_equal(evaluator.evaluate(plan).losses, result.losses)
    assert max(device.sizes) <= device.tokens
    other = Plan.one_hot([[0, 1]] * LAYERS, experts=EXPERTS, k=2)
    fresh = Evaluator(model, tiny_tokenizer, task, batch_tokens=evaluator.batch_tokens)
    np.testing.assert_allclose(evaluator.evaluate(other).losses, fresh.evaluate(other).losses, atol=1e-5)


def test_memory_that_runs_out_in_a_later_rung(model: Any, tiny_tokenizer: Any, task: Any) -> None:
    rungs = (2, 4, Evaluator(model, tiny_tokenizer, task).examples)
    expected = list(Evaluator(model, tiny_tokenizer, task, rungs=rungs).race(ONE_HOT))
    evaluator = Evaluator(model, tiny_tokenizer, task, rungs=rungs)
    device = Small(model.model.layers[-1].mlp)
    race = evaluator.race(ONE_HOT)
    raced = [next(race), next(race)]
    device.tokens = 2 * max(batch.ids.shape[1] for batch in evaluator.batches)
    with pytest.warns(UserWarning, match="out of memory"):
        raced.append(next(race))
    for a, b in zip(raced, expected, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        assert a.tokens == b.tokens
    np.testing.assert_allclose(evaluator.evaluate(ONE_HOT).losses, expected[-1].losses, atol=1e-5)


@pytest.mark.parametrize("where", ["layer", "head"])
def test_the_end_is_one_sequence(model: Any, tiny_tokenizer: Any, task: Any, where: str) -> None:
    evaluator = Evaluator(model, tiny_tokenizer, task)
    device = Small(model.model.layers[-1].mlp if where == "layer" else model.lm_head)
    device.tokens = 0
    longest = max(batch.ids.shape[1] for batch in evaluator.batches)
    before = [batch.ids.shape for batch in evaluator.batches]
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(OutOfMemoryError, match=f"not even a single sequence, of {longest} tokens.*CUDA out of memory"),
    ):
        evaluator.evaluate(ONE_HOT)
    assert [batch.ids.shape for batch in evaluator.batches] == before  # a plan that fits does not pay for it
    device.tokens = 1 << 30
    assert np.isfinite(evaluator.evaluate(ONE_HOT).loss)


def test_the_end_is_not_several_options_of_one_question(model: Any, tiny_tokenizer: Any) -> None:
    options = tuple(f" the {word} answer of a few words" for word in ("first", "second", "third", "last"))
    task = MultipleChoiceTask("long options", search=[Example(str(i), f"Is it {i}?", options, 0) for i in range(4)])
    longest = max(len(request.ids) - 1 for request in task.requests("search", tiny_tokenizer))
    expected = Evaluator(model, tiny_tokenizer, task).evaluate()
    evaluator = Evaluator(model, tiny_tokenizer, task)
    assert max(batch.ids.shape[1] for batch in evaluator.batches) > longest
    Small(model.model.layers[-1].mlp).tokens = longest
    with pytest.warns(UserWarning, match="out of memory"):
        result = evaluator.evaluate()
    np.testing.assert_allclose(result.losses, expected.losses, atol=1e-5)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("no"), KeyboardInterrupt()], ids=repr
)
def test_other_errors_pass_through(
    model: Any, tiny_tokenizer: Any, error: BaseException, recwarn: pytest.WarningsRecorder
) -> None:
    evaluator = Evaluator(model, tiny_tokenizer, TASKS["text"])
    expected = evaluator.evaluate(ONE_HOT).losses
    other = Plan.one_hot([[0, 1]] * LAYERS, experts=EXPERTS, k=2)
    device = Small(model.model.layers[-1].mlp, error)
    device.tokens = 0
    with pytest.raises(type(error)) as raised:
        evaluator.evaluate(other)
    assert raised.value is error
    assert evaluator.batch_tokens == 1024
    assert not recwarn.list
    device.tokens = 1 << 30
    np.testing.assert_array_equal(evaluator.evaluate(ONE_HOT).losses, expected)


def test_what_says_that_memory_ran_out() -> None:
    assert all(map(ran_out, ERRORS))
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")):
        assert not ran_out(error)


def test_a_device_that_ran_out_while_a_model_is_taken_apart_can_be_tried_again(model: Any, tiny_tokenizer: Any) -> None:
    device = Small(model.model.layers[-1].mlp)
    device.tokens = 0
    with suppress(OutOfMemoryError, torch.OutOfMemoryError):
        Evaluator(model, tiny_tokenizer, TASKS["text"])
    device.tokens = 1 << 30
    evaluator = Evaluator(model, tiny_tokenizer, TASKS["text"], prefix_memory=1 << 20)
    assert evaluator.evaluate(ONE_HOT).layer_tokens == LAYERS * evaluator.tokens


# Merged experts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, dict[str, Tensor]]]]:
    """Every making of merged experts: bytes of all buffers then alive, and the buffers."""
    made: list[tuple[int, dict[str, Tensor]]] = []
    alive: dict[int, weakref.ref[Tensor]] = {}
    merge_into = merging.merge_into

    def watch(target: dict[str, Tensor], *given: Any) -> None:
        merge_into(target, *given)
        alive.update({id(tensor): weakref.ref(tensor) for tensor in target.values()})
        tensors = {id(t): t for ref in alive.values() if (t := ref()) is not None}
        made.append((sum(t.nbytes for t in tensors.values()), target))

    monkeypatch.setattr(merging, "merge_into", watch)
    yield made
    made.clear()


def one_layer(model: Any, plan: Plan) -> int:
    return merged_bytes(moe_layers(model)[:1], plan)


@pytest.mark.slow
@pytest.mark.parametrize("rungs", [None, (2, 5, 20)])
@pytest.mark.parametrize("memory", [0, None])
def test_scratch_makes_a_layer_once_a_rung_and_holds_one(
    model: Any, tiny_tokenizer: Any, buffers: Any, rungs: Any, memory: int | None
) -> None:
    expected = [
        e.losses
        for e in Evaluator(model, tiny_tokenizer, TASKS["questions"], batch_tokens=40, rungs=rungs).race(
            merging_plan(1)
        )
    ]
    evaluator = Evaluator(
        model,
        tiny_tokenizer,
        TASKS["questions"],
        batch_tokens=40,
        rungs=rungs,
        merged_weights="scratch",
        prefix_memory=memory,
    )
    assert len(evaluator.batches) > 2 * len(evaluator.rungs)
    plan, layer = merging_plan(1), one_layer(model, merging_plan(1))
    evaluator.evaluate(merging_plan(2))
    buffers.clear()
    gc.collect()
    for evaluation, losses in zip(evaluator.race(plan), expected, strict=True):
        np.testing.assert_array_equal(evaluation.losses, losses)
        assert len(buffers) == LAYERS
        assert {size for size, _ in buffers} == {layer}
        buffers.clear()
    gc.collect()
    assert evaluator.passes.cache.nbytes == 0


def test_resident_makes_a_layer_once_and_again_only_when_it_changes(
    model: Any, tiny_tokenizer: Any, buffers: Any
) -> None:
    evaluator = Evaluator(
        model, tiny_tokenizer, TASKS["text"], batch_tokens=64, prefix_memory=0, merged_weights="resident"
    )
    evaluator.evaluate(merging_plan(9))  # what is checked once is checked now
    first, second = merging_plan(1), merging_plan(2)
    mixed = Plan((*first.layers[:2], second.layers[2]))
    made = []
    for plan in (first, first, mixed, first, ONE_HOT, first):
        before = len(buffers)
        evaluator.evaluate(plan)
        made.append(len(buffers) - before)
    assert made == [LAYERS, 0, 1, 1, 0, 0]
    assert evaluator.passes.cache.nbytes == LAYERS * one_layer(model, first)
    assert merged_bytes(moe_layers(model), first) == LAYERS * one_layer(model, first)
    assert merged_bytes(moe_layers(model), ONE_HOT) == 0
    evaluator.clear()
    assert evaluator.passes.cache.nbytes == 0


@pytest.mark.parametrize("share", [0.5, 1.9, 2.1, 10.0])
def test_auto_falls_to_scratch_when_memory_is_short(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    plan = merging_plan()
    needed = LAYERS * one_layer(model, plan)
    asked: list[torch.device] = []

    def free(device: torch.device) -> int:
        asked.append(device)
        return int(share * needed)

    expected = Evaluator(model, tiny_tokenizer, TASKS["text"], merged_weights="resident").evaluate(plan).losses
    monkeypatch.setattr(passes, "free_bytes", free)
    evaluator = Evaluator(model, tiny_tokenizer, TASKS["text"])
    asked.clear()  # which asked what hidden states may take
    np.testing.assert_array_equal(evaluator.evaluate(plan).losses, expected)
    assert asked == [torch.device("cpu")]
    assert evaluator.passes.cache.nbytes == (needed if share > 2 else 0)
    evaluator.evaluate(ONE_HOT)
    assert len(asked) == 1


def test_what_is_held_already_need_not_be_free(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = merging_plan()
    needed = LAYERS * one_layer(model, plan)
    left = [3 * needed]
    monkeypatch.setattr(passes, "free_bytes", lambda device: left[0])
    evaluator = Evaluator(model, tiny_tokenizer, TASKS["text"], prefix_memory=0)
    evaluator.evaluate(plan)
    left[0] = 0
    evaluator.evaluate(plan)
    assert evaluator.passes.cache.merges == LAYERS
    evaluator.evaluate(merging_plan(1))
    assert evaluator.passes.cache.merges == 2 * LAYERS


def test_running_out_frees_what_was_kept(model: Any, tiny_tokenizer: Any) -> None:
    evaluator = Evaluator(model, tiny_tokenizer, TASKS["text"], merged_weights="resident")
    evaluator.evaluate(merging_plan(1))
    evaluator.evaluate(ONE_HOT)
    held: list[tuple[int, int]] = []
    calls: Iterator[int] = iter(range(1 << 30))

    def hook(_module: nn.Module, _args: Any) -> None:
        held.append((evaluator.passes.cache.nbytes, evaluator.passes.runner.prefixes.nbytes))  # type: ignore[union-attr]
        if next(calls) == 0:
            raise OUT

    model.model.layers[-1].mlp.register_forward_pre_hook(hook)
    with pytest.warns(UserWarning, match="out of memory"):
        evaluator.evaluate(Plan.one_hot([[0, 1]] * LAYERS, experts=EXPERTS, k=2))
    assert min(held[0]) > 0
    assert held[1] == (0, 0)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert free_bytes(torch.device("cpu")) > 1 << 20
    assert free_bytes(torch.device("meta")) > 1 << 20


def test_nothing_is_held_between_rungs_but_what_is_kept(model: Any, tiny_tokenizer: Any) -> None:
    """While a pruner decides, or another thread evaluates, the hidden states of a rung are not needed any more."""
    evaluator = Evaluator(model, tiny_tokenizer, TASKS["questions"], rungs=(5, 20), prefix_memory=0)
    evaluator.evaluate()
    seen: list[weakref.ref[Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(weakref.ref(out)))
    race = evaluator.race(ONE_HOT)
    next(race)
    gc.collect()
    assert len(seen) > LAYERS
    assert all(ref() is None for ref in seen)
    race.close()  # type: ignore[attr-defined]
