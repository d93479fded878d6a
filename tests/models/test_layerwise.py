"""A model in parts: the same bits as the whole, on every family; state across layers is refused; no trace is left."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralModel

from moeopt.errors import ModelError
from moeopt.evaluation import Evaluator
from moeopt.models import layerwise, moe_layers, patched
from moeopt.plan import Plan
from moeopt.tasks import Example, MultipleChoiceTask, TextTask

KEPT = [[0, 3, 5, 6], [7, 1, 2, 4], [1, 2, 3, 4]]
MASKS = {"none": None, "right": [[1] * 13, [1] * 8 + [0] * 5], "left": [[0] * 4 + [1] * 9, [1] * 13]}


def masked(ids: Tensor, kind: str) -> dict[str, Tensor]:
    mask = MASKS[kind]
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": torch.tensor(mask)}


@pytest.fixture(params=MASKS)
def inputs(request: pytest.FixtureRequest, ids: Tensor) -> dict[str, Tensor]:
    return masked(ids, request.param)


@torch.inference_mode()
def in_parts(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states (rows, width, hidden) that leave the last layer, and logits (rows, width, vocabulary)."""
    parts = layerwise(model)
    hidden, calls = parts.begin(inputs)
    for i, (layer, call) in enumerate(zip(parts.layers, calls)):
        with parts.loaded(i) as there:
            hidden = call(layer, hidden, there)
    return hidden, parts.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@torch.inference_mode()
def as_a_whole(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    left: list[Tensor] = []
    last = layerwise(model).layers[-1]
    handle = last.register_forward_hook(lambda _m, _i, out: left.append(out[0] if isinstance(out, tuple) else out))
    logits = model(**inputs, use_cache=False).logits
    handle.remove()
    return left[0], logits


def assert_same(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    (hidden, logits), (expected, expected_logits) = in_parts(model, inputs), as_a_whole(model, inputs)
    assert torch.equal(hidden, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5 if logits.dtype == torch.float32 else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_equal_the_whole_bit_for_bit(build_family: Any, family: str, dtype: torch.dtype, inputs: Any) -> None:
    assert_same(build_family(family, dtype=dtype), inputs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_windows(make_mixtral: Any, inputs: Any, attention: str) -> None:
    model = make_mixtral(sliding_window=4)
    model.set_attn_implementation(attention)
    assert_same(model, inputs)


def test_layers_of_different_attention(build_family: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    families = build_family.__globals__["FAMILIES"]
    kinds = ["full_attention", "sliding_attention"]
    changed = {
        "gpt_oss": {"layer_types": kinds[::-1], "sliding_window": 3},
        "qwen2_moe": {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 3},
    }
    for name, extra in changed.items():
        field, usual = families[name]
        monkeypatch.setitem(families, name, (field, usual | extra))
        model = build_family(name)
        assert_same(model, inputs)
        parts = layerwise(model)
        masks = [call.kwargs["attention_mask"] for call in parts.begin(inputs)[1]]
        assert masks[0] is not masks[1]


@pytest.mark.parametrize(
    ("name", "extra", "places"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2, "num_hidden_layers": 4}, (2, 3)),
        ("qwen2_moe", {"mlp_only_layers": [1, 3], "num_hidden_layers": 4}, (0, 2)),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}, (1, 3)),
        ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "num_hidden_layers": 4}, (1, 2)),
    ],
)
def test_dense_layers_before_and_between(
    build_family: Any,
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: Any,
    name: str,
    extra: dict[str, Any],
    places: tuple[int, ...],
) -> None:
    families = build_family.__globals__["FAMILIES"]
    field, usual = families[name]
    monkeypatch.setitem(families, name, (field, usual | extra | {"vocab_size": 300}))
    model = build_family(name)
    assert layerwise(model).moe == places
    for kind in MASKS:
        assert_same(model, masked(ids, kind))
    evaluator = Evaluator(model, tiny_tokenizer, words(), batch_tokens=64)
    fresh = Evaluator(model, tiny_tokenizer, words(), batch_tokens=64, prefix_memory=0)
    first = Plan.one_hot([[0, 1, 2], [3, 4, 5]], experts=7, k=2)
    second = Plan.one_hot([[0, 1, 2], [3, 4, 6]], experts=7, k=2)
    for plan in (first, second, first):
        result = evaluator.evaluate(plan)
        np.testing.assert_array_equal(result.losses, fresh.evaluate(plan).losses)
    assert result.layer_tokens == result.tokens * (4 - 3)
    assert evaluator.evaluate(second).layer_tokens == result.tokens
    third = Plan.one_hot([[0, 1, 2], [0, 1, 6]], experts=7, k=2)
    assert evaluator.evaluate(third).layer_tokens == result.tokens * (4 - places[1])


@pytest.mark.parametrize("config", ["output_hidden_states", "output_router_logits", "output_attentions"])
def test_outputs_asked_for_in_the_config_do_not_matter(make_mixtral: Any, inputs: Any, config: str) -> None:
    model = make_mixtral()
    model.set_attn_implementation("eager")
    setattr(model.config, config, True)
    assert_same(model, inputs)


def words() -> TextTask:
    pairs = zip(["red", "old", "big", "sad"], "abcd")
    texts = [f"the {a} {b} sat on a mat {i} times" + " or so" * i for i, (a, b) in enumerate(pairs)]
    return TextTask("words", search=texts, window=24)


# Models that keep state across layers -------------------------------------------------------------------------------


class Layer(MixtralDecoderLayer):
    """A decoder layer whose forward is `rule(layer, box, run, hidden states)`; a model's layers share `box`.

    It is a module, so that copies of the model do not share it.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.rule[0](self, self.box, lambda h: super(Layer, self).forward(h, *args, **kwargs), hidden_states)


def is_first(layer: Layer) -> bool:
    return layer.self_attn.layer_idx == 0


def value_residual(layer: Layer, box: Any, run: Any, hidden: Tensor) -> Tensor:
    """Layers after the first add a part of what entered it."""
    if is_first(layer):
        box.held = hidden
        return run(hidden)
    return run(hidden) + 0.5 * box.held


def lengths(layer: Layer, box: Any, run: Any, hidden: Tensor) -> Tensor:
    """All layers use a table that the first one makes from the positions: ids do not show in it."""
    if is_first(layer):
        box.held = 0.1 * torch.arange(hidden.shape[1])[None, :, None]
    return run(hidden) + box.held


def alternating(layer: Layer, box: Any, run: Any, hidden: Tensor) -> Tensor:
    """Every call negates what the next call adds."""
    box.held = -(box.held or 1.0)
    return run(hidden) + box.held


def in_place(layer: Layer, box: Any, run: Any, hidden: Tensor) -> Tensor:
    return hidden.add_(0.1 * run(hidden))


def pair(layer: Layer, box: Any, run: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Its output, and its input beside it."""
    return run(hidden), hidden


class Body(MixtralModel):
    """A model whose layers are run by `loop(layers, hidden states, run)`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(hidden.shape[1])[None] if position_ids is None else position_ids
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions,
        )
        given = {"attention_mask": mask, "position_embeddings": self.rotary_emb(hidden, position_ids=positions)}
        left = self.loop[0](list(self.layers), hidden, lambda layer, *h, **named: layer(*h, **named, **given))
        return MoeModelOutputWithPast(last_hidden_state=self.norm(left))


Loop = Callable[[list[nn.Module], Tensor, Callable[..., Any]], Tensor]


def in_turn(change: Callable[[list[nn.Module]], list[nn.Module]] = list, scale: float = 1.0, skip: float = 0.0) -> Loop:
    """Layers in another order, on scaled hidden states, and what entered the first added to what leaves the last."""

    def loop(layers: list[nn.Module], hidden: Tensor, run: Callable[..., Any]) -> Tensor:
        first = hidden
        for layer in change(layers):
            hidden = run(layer, scale * hidden)
        return hidden + skip * first

    return loop


def by_name(layers: list[nn.Module], hidden: Tensor, run: Callable[..., Any]) -> Tensor:
    """Calls layers by keyword, which is fine."""
    for layer in layers:
        hidden = run(layer, hidden_states=hidden)
    return hidden


def pairs(layers: list[nn.Module], hidden: Tensor, run: Callable[..., Any]) -> Tensor:
    before = torch.zeros_like(hidden)
    for layer in layers:
        output = run(layer, hidden + before)
        hidden, before = output if isinstance(output, tuple) else (output, before)
    return hidden


def altered(model: Any, rule: Callable[..., Any] | None = None, loop: Loop | None = None) -> Any:
    box: Any = nn.Module()
    box.held = None
    for part in model.model.layers if rule is not None else ():
        part.__class__, part.rule, part.box = Layer, (rule,), box  # in a tuple, which is no submodule nor method
    if loop is not None:
        model.model.__class__, model.model.loop = Body, (loop,)
    return model


STATEFUL: dict[str, tuple[Callable[..., Any] | None, Loop | None]] = {
    "value residual": (value_residual, None),
    "table of the first layer": (lengths, None),
    "alternating calls": (alternating, None),
    "pairs": (pair, pairs),
    "scaled between layers": (None, in_turn(scale=1.25)),
    "backwards": (None, in_turn(lambda layers: layers[::-1])),
    "first layer twice": (None, in_turn(lambda layers: [*layers, layers[0]])),
    "skip to the head": (None, in_turn(skip=1.0)),
    "faint skip to the head": (None, in_turn(skip=0.01)),
}


@pytest.fixture(params=STATEFUL)
def stateful(request: pytest.FixtureRequest, make_mixtral: Any) -> Any:
    return altered(make_mixtral(), *STATEFUL[request.param])


def test_state_across_layers_is_refused(stateful: Any, tiny_tokenizer: Any, snapshot: Any) -> None:
    before = snapshot(stateful)
    for _ in range(2):
        with pytest.raises(ModelError):
            layerwise(stateful)
        with pytest.raises(ModelError, match="hidden states cannot be reused"):
            Evaluator(stateful, tiny_tokenizer, words(), prefix_memory=1 << 20)
    assert snapshot(stateful) == before


@pytest.mark.parametrize("kind", [kind for kind in STATEFUL if kind != "alternating calls"])
def test_state_across_layers_is_still_evaluated_right(kind: str, make_mixtral: Any, tiny_tokenizer: Any) -> None:
    """But for what depends on how often it was called."""
    stateful, task = altered(make_mixtral(), *STATEFUL[kind]), words()
    for plan in (None, Plan.one_hot(KEPT, experts=8, k=2)):
        losses = []
        for request in task.requests("search", tiny_tokenizer):
            ids = torch.tensor([request.ids])
            with torch.no_grad(), patched(stateful, plan or Plan.identity(3, 8, 2)):
                scores = stateful(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            losses.append(-scores.gather(1, ids[0, 1:, None]).mean().item())
        for batch_tokens in (1, 60):
            evaluation = Evaluator(stateful, tiny_tokenizer, task, batch_tokens=batch_tokens).evaluate(plan)
            np.testing.assert_allclose(evaluation.losses, losses, atol=1e-5)
            assert evaluation.layer_tokens == 3 * evaluation.tokens


def test_a_layer_that_works_in_place_is_refused_or_right(make_mixtral: Any, tiny_tokenizer: Any) -> None:
    model = altered(make_mixtral(), in_place)
    evaluator = Evaluator(model, tiny_tokenizer, words(), batch_tokens=60)
    first = evaluator.evaluate().losses
    for _ in range(2):
        np.testing.assert_array_equal(evaluator.evaluate().losses, first)


def test_layers_called_by_keyword_are_run_apart_and_no_trace_is_left(
    make_mixtral: Any, ids: Tensor, snapshot: Any
) -> None:
    model = altered(make_mixtral(), loop=by_name)
    before = snapshot(model)
    assert_same(model, {"input_ids": ids})
    assert snapshot(model) == before


def test_a_refusal_ends_when_its_cause_does(make_mixtral: Any, ids: Tensor) -> None:
    model = altered(make_mixtral(), value_residual)
    with pytest.raises(ModelError):
        layerwise(model)
    for i, part in enumerate(model.model.layers):
        part.__class__ = MixtralDecoderLayer
        model.model.layers[i] = copy.deepcopy(part)
    assert_same(model, {"input_ids": ids})


def test_running_out_of_memory_is_no_property_of_the_model(make_mixtral: Any, ids: Tensor) -> None:
    model = make_mixtral()
    first = model.model.layers[0]
    handle = first.register_forward_hook(fails(torch.OutOfMemoryError("CUDA out of memory"), on=1))
    with pytest.raises((ModelError, torch.OutOfMemoryError)):
        layerwise(model)
    handle.remove()
    assert_same(model, {"input_ids": ids})


# Nothing is left behind ---------------------------------------------------------------------------------------------


def fails(error: BaseException, on: int) -> Callable[..., None]:
    """A forward hook that raises at its `on`-th call."""
    calls = iter(range(1, 1 << 30))

    def hook(*_: Any) -> None:
        if next(calls) == on:
            raise error

    return hook


@pytest.mark.parametrize(
    ("on", "error"), [(1, RuntimeError("broken")), (2, KeyboardInterrupt()), (4, RuntimeError("broken"))]
)
def test_everything_is_as_it_was_after_an_exception(
    make_mixtral: Any, tiny_tokenizer: Any, snapshot: Any, on: int, error: BaseException
) -> None:
    model = make_mixtral().train()
    model.model.layers[1].eval()
    modes, before = [module.training for module in model.modules()], snapshot(model)
    expected = Evaluator(model, tiny_tokenizer, questions(), batch_tokens=1).evaluate().losses
    raised = 0
    for part in (model.model.layers[1], model.model.layers[2].mlp, model.model.norm, model.model.embed_tokens):
        fresh = Evaluator(model, tiny_tokenizer, questions(), batch_tokens=1)
        handle = part.register_forward_hook(fails(error, on))
        try:
            fresh.evaluate(Plan.one_hot(KEPT, experts=8, k=2))
        except type(error):
            raised += 1
        handle.remove()
        assert snapshot(model) == before
        assert [module.training for module in model.modules()] == modes
        np.testing.assert_array_equal(fresh.evaluate().losses, expected)
    assert raised >= 2


# accelerate's offload -----------------------------------------------------------------------------------------------


class Counting(Mapping[str, Any]):
    """A weights map that counts how often each tensor is fetched."""

    def __init__(self, weights: Mapping[str, Any], prefix: str, counts: Counter[str]) -> None:
        self.weights, self.prefix, self.counts = weights, prefix, counts

    def __getitem__(self, name: str) -> Any:
        self.counts[f"{self.prefix}.{name}"] += 1
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def count_fetches(model: nn.Module) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "weights_map", None) is not None:
                part.weights_map = Counting(part.weights_map, name, counts)
    return counts


def dispatched(model: nn.Module, place: str, folder: str) -> nn.Module:
    outside = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    layers = {f"model.layers.{i}": place if i else "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, outside | layers, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "map to cpu": lambda model, folder: dispatched(model, "cpu", folder),
    "map to disk": lambda model, folder: dispatched(model, "disk", folder),
}


@pytest.fixture(params=OFFLOADS)
def offload(request: pytest.FixtureRequest, tmp_path: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: OFFLOADS[request.param](copy.deepcopy(model), str(tmp_path))


def questions() -> MultipleChoiceTask:
    examples = [
        Example(str(i), f"{'why ' * (i % 4)}is {i} odd?", ("no", "yes", "never")[: 2 + i % 2], i % 2) for i in range(9)
    ]
    return MultipleChoiceTask("questions", search=examples)


def plans(dense_plan: Any) -> list[Plan | None]:
    dense = dense_plan(router="prob")
    mixed = Plan((dense.layers[0], *Plan.one_hot(KEPT[1:], experts=8, k=2).layers))
    return [None, Plan.one_hot(KEPT, experts=8, k=2), dense, dense_plan(router="logit", seed=1), mixed]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offload", "merged_weights", "rungs"),
    [
        *((place, "auto", (2, 5, 9)) for place in OFFLOADS),
        ("map to disk", "auto", None),
        ("cpu", "resident", None),
        ("map to disk", "resident", None),
    ],
    indirect=["offload"],
)
def test_offloaded_layers_give_the_same_bits_and_are_loaded_once_a_rung(
    make_mixtral: Any, tiny_tokenizer: Any, dense_plan: Any, offload: Any, merged_weights: Any, rungs: Any
) -> None:
    model = make_mixtral()
    away = offload(model)
    options: dict[str, Any] = {"batch_tokens": 24, "merged_weights": merged_weights, "rungs": rungs, "prefix_memory": 0}
    here, there = (Evaluator(m, tiny_tokenizer, questions(), **options) for m in (model, away))
    assert all(len(batches) > 1 for batches in there.passes.batches)
    for plan in plans(dense_plan):
        with patched(away, plan or Plan.identity(3, 8, 2)):  # what is learnt of a model once is learnt now
            counts = count_fetches(away)
        np.testing.assert_array_equal(there.evaluate(plan).losses, here.evaluate(plan).losses)
        fetched = {name: n for name, n in counts.items() if ".layers." in name and ".gate." not in name}
        away_layers = [i for i, layer in enumerate(moe_layers(away)) if layer.experts.down_proj.is_meta]
        assert {f"model.layers.{i}.mlp.experts.down_proj" for i in away_layers} <= set(fetched)
        assert not away_layers or set(fetched.values()) == {len(there.rungs)}, fetched


@pytest.mark.slow
def test_prefixes_of_an_offloaded_model_are_reused(
    make_mixtral: Any, tiny_tokenizer: Any, dense_plan: Any, offload: Any
) -> None:
    model = make_mixtral()
    away = offload(model)
    here = Evaluator(model, tiny_tokenizer, questions(), batch_tokens=48, prefix_memory=0)
    there = Evaluator(away, tiny_tokenizer, questions(), batch_tokens=48)
    for plan in plans(dense_plan) * 2:
        np.testing.assert_array_equal(there.evaluate(plan).losses, here.evaluate(plan).losses)
        assert there.evaluate(plan).layer_tokens == there.tokens
    first = Plan.one_hot(KEPT, experts=8, k=2)
    last_differs = Plan.one_hot([*KEPT[:2], [0, 1, 2, 3]], experts=8, k=2)
    there.evaluate(first)
    assert there.evaluate(last_differs).layer_tokens == there.tokens


@pytest.mark.slow
def test_an_offloaded_model_is_left_as_it_was_after_an_exception(
    make_mixtral: Any, tiny_tokenizer: Any, offload: Any
) -> None:
    away = offload(make_mixtral())
    expected = Evaluator(away, tiny_tokenizer, questions(), batch_tokens=48).evaluate().losses

    def state() -> Any:
        return {n: (p.device, vars(m).get("forward")) for n, m in away.named_modules() for p in m.parameters()}

    before, plan = state(), Plan.one_hot(KEPT, experts=8, k=2)
    for on in (1, 4):
        for part in (away.model.layers[1].mlp.experts, away.model.layers[2].self_attn, away.lm_head):
            fresh = Evaluator(away, tiny_tokenizer, questions(), batch_tokens=24, prefix_memory=0)
            handle = part.register_forward_hook(fails(RuntimeError("broken"), on))
            with pytest.raises(RuntimeError, match="broken"):
                fresh.evaluate(plan)
            handle.remove()
            assert state() == before
    np.testing.assert_array_equal(
        Evaluator(away, tiny_tokenizer, questions(), batch_tokens=48).evaluate().losses, expected
    )
