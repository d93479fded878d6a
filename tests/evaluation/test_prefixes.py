"""Prefix reuse: never another bit, exactly the layers that a plan needs, within the budget, never anything stale."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralForCausalLM

from moeopt.errors import NonFiniteLossError
from moeopt.evaluation import Evaluator
from moeopt.evaluation.prefixes import PrefixCache
from moeopt.evaluation.runners import TRAILS, LayerMajor
from moeopt.models import patched
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import Example, MultipleChoiceTask

LAYERS, EXPERTS, PLENTY = 4, 4, 1 << 30
QUESTIONS = [Example(str(i), f"{'so ' * (i % 4)}is {i} odd?", ("n", "y"), i % 2) for i in range(12)]
TASK = MultipleChoiceTask("questions", search=QUESTIONS)


def dense(seed: int, router: Any = "prob") -> LayerPlan:
    rng = np.random.default_rng(seed)
    w_em, w_rm = (np.eye(EXPERTS)[[0, 2]] + 0.1 * rng.normal(size=(2, EXPERTS)) for _ in range(2))
    return LayerPlan(EXPERTS, 2, w_em=w_em.astype(np.float32), w_rm=w_rm.astype(np.float32), router=router)


def kept(*numbers: int) -> LayerPlan:
    return LayerPlan(EXPERTS, 2, kept=numbers)


CHOICES = (kept(0, 1, 2, 3), kept(0, 1), kept(2, 3), kept(3, 2), dense(0), dense(1), dense(2, "logit"))
BASE = Plan((kept(0, 1), kept(1, 3), kept(0, 2), kept(2, 3)))
MERGING = Plan((dense(1), dense(2), dense(3), dense(4)))


def parting(at: int, base: Plan = BASE) -> Plan:
    """A plan that differs from `base` first, and only, at MoE layer `at`."""
    return Plan((*base.layers[:at], kept(1, 0, 3), *base.layers[at + 1 :]))


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> MixtralForCausalLM:
    return make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Callable[..., Evaluator]:
    return lambda model=model, **options: Evaluator(model, tiny_tokenizer, TASK, batch_tokens=60, **options)


def cache(evaluator: Evaluator) -> PrefixCache:
    assert isinstance(evaluator.passes.runner, LayerMajor)
    return evaluator.passes.runner.prefixes


def layer_bytes(evaluator: Evaluator) -> int:
    """Bytes of the hidden states of all examples between two layers."""
    hidden = evaluator.model.config.hidden_size
    return sum(4 * hidden * batch.ids.numel() for rung in evaluator.passes.batches for batch in rung)


def held(evaluator: Evaluator) -> int:
    """Bytes of the different tensors that a cache really holds."""
    tensors = {id(t): t for entry in cache(evaluator)._entries.values() for t in entry.states}
    return sum(t.nbytes for t in tensors.values())


steps = st.lists(
    st.tuples(st.lists(st.sampled_from(range(len(CHOICES))), min_size=LAYERS, max_size=LAYERS), st.integers(1, 3)),
    min_size=2,
    max_size=7,
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=steps,
    layers=st.sampled_from([1, 2, 3, 5, 9, 20, 1000]),
    rungs=st.sampled_from([None, (3, 12), (2, 5, 12)]),
    device=st.sampled_from([None, "cpu"]),
)
def test_any_sequence_of_plans_gives_the_same_bits(
    make: Any, steps: Any, layers: int, rungs: Any, device: str | None
) -> None:
    plain = make(rungs=rungs, prefix_memory=0)
    budget = layers * layer_bytes(plain) // 2
    reusing = make(rungs=rungs, prefix_memory=budget, prefix_device=device)
    for chosen, stop in steps:  # a plan is raced to some rung, as when it is pruned
        plan = Plan(tuple(CHOICES[i] for i in chosen))
        for _, got, expected in zip(range(stop), reusing.race(plan), plain.race(plan)):
            np.testing.assert_array_equal(got.scores, expected.scores)
            assert got.tokens <= got.layer_tokens <= expected.layer_tokens == LAYERS * expected.tokens
            assert held(reusing) == cache(reusing).nbytes <= budget


def test_a_known_plan_needs_its_last_layer_only(make: Any) -> None:
    evaluator = make(prefix_memory=PLENTY)
    plans = [BASE, *(parting(at) for at in range(LAYERS))]
    costs = [evaluator.evaluate(plan).layer_tokens // evaluator.tokens for plan in plans]
    assert costs == [4, 4, 3, 2, 1]
    assert [evaluator.evaluate(plan).layer_tokens // evaluator.tokens for plan in plans[::-1]] == [1] * 5


@pytest.mark.parametrize("at", range(LAYERS))
@pytest.mark.parametrize("other", [kept(1, 0, 3), dense(5), dense(6, "logit")], ids=["one-hot", "prob", "logit"])
@pytest.mark.parametrize("base", [BASE, MERGING], ids=["one-hot", "dense"])
def test_layer_tokens_count_the_layers_from_the_first_difference(
    make: Any, base: Plan, other: LayerPlan, at: int
) -> None:
    evaluator = make(prefix_memory=PLENTY, rungs=(5, 12))
    before = evaluator.evaluate(base)
    changed = evaluator.evaluate(Plan((*base.layers[:at], other, *base.layers[at + 1 :])))
    assert before.layer_tokens == LAYERS * before.tokens
    assert changed.tokens == before.tokens
    assert changed.layer_tokens == (LAYERS - at) * before.tokens


def test_alternating_between_plans_that_keep_and_plans_that_merge(make: Any) -> None:
    evaluator = make(prefix_memory=PLENTY)
    merging = Plan((*BASE.layers[:3], dense(3)))
    for plan in (BASE, merging):
        evaluator.evaluate(plan)
    for plan in (BASE, merging, None, BASE, merging, None):
        last = evaluator.evaluate(plan)
    assert last.layer_tokens == last.tokens
    assert evaluator.evaluate(BASE).layer_tokens == last.tokens


def test_the_model_as_it_is_shares_with_plans_that_keep_everything(make: Any) -> None:
    evaluator = make(prefix_memory=PLENTY)
    evaluator.evaluate(None)
    everything = kept(0, 1, 2, 3)
    result = evaluator.evaluate(Plan((everything, everything, kept(0, 1), everything)))
    assert result.layer_tokens == 2 * result.tokens


def test_no_memory_keeps_nothing(make: Any) -> None:
    evaluator = make(prefix_memory=0)
    for _ in range(2):
        result = evaluator.evaluate(BASE)
        assert result.layer_tokens == LAYERS * result.tokens
    assert held(evaluator) == 0


def test_a_small_memory_keeps_fewer_layers_of_several_plans(make: Any) -> None:
    budget = TRAILS * 2 * layer_bytes(make())
    evaluator = make(prefix_memory=budget)
    others = [parting(3), parting(2), parting(1)]
    for plan in (BASE, *others):
        evaluator.evaluate(plan)
    for plan in (BASE, *others):
        result = evaluator.evaluate(plan)
        assert result.layer_tokens <= LAYERS // 2 * result.tokens
        assert held(evaluator) <= budget


# The cache alone ----------------------------------------------------------------------------------------------------


def states(count: int = 2) -> list[torch.Tensor]:
    return [torch.zeros(25) for _ in range(count)]  # 200 bytes


def test_the_longest_unused_trail_goes_first_and_the_best_last() -> None:
    held = PrefixCache(600)
    for i, (trail, loss) in enumerate([(b"good", 1.0), (b"old", 2.0), (b"new", 3.0)]):
        held.keep(trail, (0, 1, b"%d" % i), states())
        held.judge(trail, loss)
    assert held.longest([(0, 1, b"1")])
    held.keep(b"next", (0, 1, b"3"), states())  # "good" is the oldest, but the best
    assert held.nbytes == 600
    assert [held.longest([(0, 1, b"%d" % i)]) is not None for i in range(4)] == [True, True, False, True]
    held.judge(b"next", 0.5)
    held.keep(b"last", (0, 1, b"4"), states())
    assert [held.longest([(0, 1, b"%d" % i)]) is not None for i in range(5)] == [False, True, False, True, True]


def test_what_two_plans_share_is_held_once_and_until_neither_is_kept() -> None:
    held = PrefixCache(600)
    shared = (0, 1, b"shared")
    held.keep(b"a", shared, states())
    held.keep(b"a", (0, 2, b"a"), states())
    held.share(b"b", [shared, (0, 3, b"not kept")])
    held.keep(b"b", (0, 2, b"b"), states())
    assert held.nbytes == 600
    held.keep(b"c", (0, 2, b"c"), states())  # out goes "a", but not what "b" shares
    assert held.nbytes == 600
    assert held.longest([shared])
    assert held.longest([(0, 2, b"a")]) is None


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 2000),
    actions=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(1, 4), st.booleans()), max_size=40),
)
def test_whatever_is_kept_stays_within_the_budget(budget: int, actions: list[tuple[int, int, int, bool]]) -> None:
    held = PrefixCache(budget)
    for trail, key, count, judged in actions:
        name = b"%d" % trail
        held.share(name, [(0, 1, b"%d" % (key // 2))])
        held.keep(name, (0, 1, b"%d" % key), states(count))
        if judged:
            held.judge(name, float(key))
        tensors = {id(t): t for entry in held._entries.values() for t in entry.states}
        assert sum(t.nbytes for t in tensors.values()) == held.nbytes <= budget
        assert all(entry.trails for entry in held._entries.values())
        assert all(key in held._entries for keys in held._trails.values() for key in keys)
    held.clear()
    assert held.nbytes == 0
    assert not held._entries


def test_the_states_of_the_best_plan_outlast_those_of_many_others(make: Any) -> None:
    plain = make(prefix_memory=0)
    rng = np.random.default_rng(0)
    others = [Plan(tuple(kept(*rng.choice(4, 2, replace=False)) for _ in range(LAYERS))) for _ in range(30)]
    best = min(others, key=lambda plan: plain.evaluate(plan).loss)
    evaluator = make(prefix_memory=2 * LAYERS * layer_bytes(plain))
    evaluator.evaluate(best)
    for plan in others:
        if plan != best:
            evaluator.evaluate(plan)
    assert evaluator.evaluate(best).layer_tokens < LAYERS * evaluator.tokens


# Nothing stale ------------------------------------------------------------------------------------------------------


def write_in_place(model: Any) -> None:
    model.model.layers[1].mlp.experts.down_proj.mul_(1.5)


def write_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.add_(0.5)


def write_embedding(model: Any) -> None:
    model.model.embed_tokens.weight.mul_(1.1)


def replace_parameter(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(1.5 * experts.down_proj)


def assign_state(model: Any) -> None:
    model.load_state_dict({name: 1.05 * t for name, t in model.state_dict().items()}, assign=True)


def point_data_elsewhere(model: Any) -> None:
    weight = model.model.layers[1].mlp.gate.weight
    weight.data = weight.data.flip(0).clone()


def cast_up_and_down(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


CHANGES = [
    write_in_place,
    write_norm,
    write_embedding,
    replace_parameter,
    assign_state,
    point_data_elsewhere,
    cast_up_and_down,
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "plan"), [*zip(CHANGES, cycle([None, BASE, MERGING]))], ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("memory", [0, PLENTY])
def test_written_weights_are_never_taken_for_the_old_ones(
    make: Any, model: Any, change: Any, plan: Plan | None, memory: int
) -> None:
    model = copy.deepcopy(model)
    evaluator = make(model, prefix_memory=memory)
    before = evaluator.evaluate(plan).losses
    with torch.no_grad():
        change(model)
    after = evaluator.evaluate(plan).losses
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, make(copy.deepcopy(model)).evaluate(plan).losses)


def test_a_written_buffer_is_never_taken_for_the_old_one(tiny_tokenizer: Any) -> None:
    config = DeepseekV3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=2,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        initializer_range=0.3,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(config).eval()
    biases = [tensor for name, tensor in model.named_buffers() if "correction_bias" in name]
    assert len(biases) == 2
    for bias in biases:
        bias.copy_(torch.linspace(0, 0.1, 8))
    evaluator = Evaluator(model, tiny_tokenizer, TASK)
    plan = Plan.one_hot([[0, 1, 2, 3]] * 2, experts=8, k=2)
    before = evaluator.evaluate(plan).losses
    biases[0][:2] += 5.0
    after = evaluator.evaluate(plan).losses
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, Evaluator(model, tiny_tokenizer, TASK).evaluate(plan).losses)


@pytest.mark.parametrize("kind", ["experts", "attn"])
def test_another_implementation_is_another_model(make: Any, model: Any, kind: str) -> None:
    model = copy.deepcopy(model)
    choose = getattr(model, f"set_{kind}_implementation")
    evaluator = make(model)
    for name in ("eager", "sdpa" if kind == "attn" else "grouped_mm", "eager"):
        choose(name)
        result = evaluator.evaluate(BASE)
        assert result.layer_tokens == LAYERS * result.tokens
        np.testing.assert_array_equal(result.losses, make(copy.deepcopy(model)).evaluate(BASE).losses)


def test_a_plan_in_force_outside_is_seen(make: Any, model: Any) -> None:
    evaluator, plain = make(prefix_memory=PLENTY), make(prefix_memory=0)
    expected = {plan: plain.evaluate(plan).losses for plan in (None, BASE, parting(3), parting(1))}
    for outer in (BASE, parting(3), parting(1), BASE):
        with patched(model, outer):
            np.testing.assert_array_equal(evaluator.evaluate().losses, expected[outer])
            np.testing.assert_array_equal(evaluator.evaluate(parting(3)).losses, expected[parting(3)])
            np.testing.assert_array_equal(evaluator.evaluate().losses, expected[outer])
        np.testing.assert_array_equal(evaluator.evaluate().losses, expected[None])
    with patched(model, BASE):  # an evaluator that is made while a plan is in force
        within = make(prefix_memory=PLENTY)
    np.testing.assert_array_equal(within.evaluate().losses, expected[None])


def test_a_plan_without_a_finite_loss_leaves_nothing_behind(make: Any, model: Any) -> None:
    explosive = LayerPlan(EXPERTS, 2, w_em=np.full((2, EXPERTS), 1e38), w_rm=np.eye(EXPERTS)[:2])
    evaluator, plain = make(prefix_memory=PLENTY), make(prefix_memory=0)
    broken = Plan((*BASE.layers[:2], explosive, BASE.layers[3]))
    for _ in range(2):
        with pytest.raises(NonFiniteLossError) as error:
            evaluator.evaluate(broken)
        assert error.value.layer == 2
        assert held(evaluator) == 0
    np.testing.assert_array_equal(evaluator.evaluate(BASE).losses, plain.evaluate(BASE).losses)
    before = held(evaluator)
    with pytest.raises(NonFiniteLossError):
        evaluator.evaluate(broken)
    assert held(evaluator) == before
    assert evaluator.evaluate(BASE).layer_tokens == evaluator.tokens
    model = copy.deepcopy(model)
    spoilt = make(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError) as error:
        spoilt.evaluate(BASE)
    assert error.value.layer is None
    assert held(spoilt) == 0


def test_an_interrupted_plan_leaves_nothing_wrong_behind(make: Any, model: Any) -> None:
    evaluator, expected = make(prefix_memory=PLENTY), make(prefix_memory=0).evaluate(BASE).losses
    for layer in model.model.layers:
        calls = iter(range(1 << 30))

        def interrupt(*_: Any, calls: Any = calls) -> None:
            if next(calls) == 1:
                raise KeyboardInterrupt

        handle = layer.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluator.evaluate(BASE)
        handle.remove()
    np.testing.assert_array_equal(evaluator.evaluate(BASE).losses, expected)


def test_an_evaluator_and_its_model_can_be_freed(make_mixtral: Any, make: Any) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS)
    evaluator = make(model)
    evaluator.evaluate(BASE)
    evaluator.evaluate(Plan((dense(0),) * LAYERS))
    gone = weakref.ref(model), weakref.ref(evaluator), weakref.ref(model.model.layers[0])
    del model, evaluator
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
