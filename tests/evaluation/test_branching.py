"""Options that share their prompt in one row: the likelihoods of separate rows, for fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from moeopt.evaluation import Evaluator
from moeopt.evaluation.batches import pack
from moeopt.models import patched
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import Example, MultipleChoiceTask, Request, Scores, Task, TextTask

Question = tuple[Sequence[int], Sequence[Sequence[int]]]
PLANS = {
    "no plan": None,
    "one-hot": Plan.one_hot([[0, 2], [3, 1]], experts=4, k=2),
    "dense": Plan(
        (LayerPlan(4, 2, w_em=np.eye(4)[[0, 1]] + 0.1, w_rm=np.eye(4)[[1, 2]] + 0.05, router="prob"),) * 2  # type: ignore[arg-type]
    ),
}
PROMPT = (256, 10, 11, 12, 13, 14, 15)
QUESTIONS: dict[str, list[Question]] = {
    "options of several tokens": [(PROMPT, [(1, 2, 3), (4, 5), (6, 7, 8, 9)]), ((256, 9, 9, 9), [(1, 2), (3, 4, 5)])],
    "prefixes of each other": [(PROMPT, [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)])],
    "differing in the last token": [(PROMPT, [(1, 2, 3), (1, 2, 4), (1, 2, 5)]), ((256, 1), [(1, 2, 3), (1, 2, 4)])],
    "equal": [(PROMPT, [(1, 2, 3), (1, 2, 3), (4, 5), (4, 5)])],
    "one token beside several": [(PROMPT, [(1,), (2, 3), (4,), (5, 6, 7)])],
    "one prompt twice": [(PROMPT, [(1, 2), (3, 4)]), (PROMPT, [(1, 2), (5, 6)])],
    "prompts that are prefixes": [(PROMPT[:4], [(13, 14, 1), (13, 2)]), (PROMPT, [(1, 2), (3, 4)])],
    "a prompt of one token": [((256,), [(1, 2, 3), (4, 5, 6)]), (PROMPT, [(1, 2), (3, 4)])],
    "of very different lengths": [(PROMPT * 5, [(1, 2), (3, 4)]), ((256,), [(7,) * 20, (8, 9)]), (PROMPT, [(1, 2)])],
}


def unused(*_: object) -> None:
    """A tokenizer that no one asks: the task brings its tokens."""
    raise AssertionError


class Given(Task):
    """Questions of token sequences as they are. The losses are those of all options: minus their log-likelihoods."""

    name = "given"

    def __init__(self, questions: Sequence[Question]) -> None:
        self.list = [
            Request(i, j, (*prompt, *option), len(prompt))
            for i, (prompt, options) in enumerate(questions)
            for j, option in enumerate(options)
        ]

    splits = ("search",)

    def examples(self, split: str) -> tuple[Example, ...]:
        raise NotImplementedError

    def requests(self, split: str, tokenizer: Any, limit: Any = None, max_length: Any = None) -> list[Request]:
        return self.list

    def reduce(self, split: str, requests: Any, log_likelihood: Any, greedy: Any) -> Scores:
        ones = np.ones(len(requests), np.float32)
        return Scores((-log_likelihood).astype(np.float32), ones, greedy.astype(np.float32))

    def fingerprint(self, split: str | None = None) -> str:
        return "given"

    def describe(self) -> dict[str, Any]:
        return {}


def one_at_a_time(model: Any, task: Given, plan: Plan | None) -> tuple[list[float], list[int]]:
    """Minus log-likelihood, and tokens that are the model's first choice, of every sequence, run on its own."""
    losses, greedy = [], []
    for request in task.list:
        with torch.no_grad(), patched(model, plan or Plan.identity(2, 4, 2)):
            scores = model(input_ids=torch.tensor([request.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        positions = range(request.scored_from, len(request.ids))
        losses.append(-sum(scores[t - 1, request.ids[t]].item() for t in positions))
        greedy.append(sum(int(scores[t - 1].argmax()) == request.ids[t] for t in positions))
    return losses, greedy


def tokens_needed(task: Given, *, branching: bool) -> int:
    """For each question its prompt once, and every option behind it once, without its last token, never an input."""
    if not branching:
        return sum(len(ids) for _, ids in {(r.example, r.ids[:-1]) for r in task.list})
    split = {(r.example, r.ids[: r.scored_from], r.ids[r.scored_from : -1]) for r in task.list}
    return sum(len(p) for _, p in {(i, p) for i, p, _ in split}) + sum(len(option) for *_, option in split)


def distinct_prompts(task: Given) -> bool:
    return len({r.ids[: r.scored_from] for r in task.list}) == len({r.example for r in task.list})


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest, make_mixtral: Any) -> Any:
    model = make_mixtral(layers=2, experts=4)
    model.set_attn_implementation(request.param)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan", "memory"), list(zip(QUESTIONS, cycle(PLANS), cycle([None, 0]))))
def test_likelihoods_are_those_of_one_sequence_at_a_time(model: Any, name: str, plan: str, memory: int | None) -> None:
    task = Given(QUESTIONS[name])
    losses, greedy = one_at_a_time(model, task, PLANS[plan])
    for batch_tokens in (1, 30, 4096):
        evaluator = Evaluator(model, unused, task, batch_tokens=batch_tokens, prefix_memory=memory)
        result = evaluator.evaluate(PLANS[plan])
        np.testing.assert_allclose(result.losses, losses, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(result.correct, greedy)
        needed = tokens_needed(task, branching=evaluator.branching)
        assert result.tokens == needed or (result.tokens < needed and not distinct_prompts(task))


@pytest.mark.parametrize("name", ["options of several tokens", "equal", "one token beside several"])
def test_every_prompt_token_is_run_once(model: Any, name: str) -> None:
    task = Given(QUESTIONS[name])
    evaluator = Evaluator(model, unused, task)
    assert evaluator.branching
    run: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _m, args: run.append(args[0].shape[:2].numel()))
    result = evaluator.evaluate()
    hook.remove()
    assert sum(run) == sum(batch.ids.numel() for batch in evaluator.batches)
    assert result.tokens == tokens_needed(task, branching=True) < tokens_needed(task, branching=False)
    assert sum(int((batch.ids[batch.mask.bool()] == 256).sum()) for batch in evaluator.batches) == len(
        {tuple(prompt) for prompt, _ in QUESTIONS[name]}
    )


def test_an_option_of_one_token_beside_a_longer_one(model: Any) -> None:
    """One branch behind a prompt is no branching at all: the shorter option needs a part of the longer one's row."""
    task = Given([(PROMPT, [(1,), (2, 3)]), ((256, 5, 5), [(1,), (2, 3)])])
    losses, _ = one_at_a_time(model, task, None)
    result = Evaluator(model, unused, task).evaluate()
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5, atol=2e-5)
    assert result.tokens == len(PROMPT) + 1 + 3 + 1


def test_options_that_differ_in_the_last_token_need_no_branches(model: Any) -> None:
    evaluator = Evaluator(model, unused, Given([(PROMPT, [(1,), (2,), (3,)])]))
    assert all(batch.sees is None for batch in evaluator.batches)
    assert evaluator.tokens == len(PROMPT)


token = st.integers(1, 4)
question = st.tuples(
    st.lists(token, min_size=1, max_size=5).map(lambda ids: (256, *ids)),
    st.lists(st.lists(token, min_size=1, max_size=4).map(tuple), min_size=1, max_size=4),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(questions=st.lists(question, min_size=1, max_size=4), batch_tokens=st.sampled_from([1, 17, 1024]))
def test_any_questions(model: Any, questions: list[Question], batch_tokens: int) -> None:
    task = Given(questions)
    losses, _ = one_at_a_time(model, task, None)
    evaluator = Evaluator(model, unused, task, batch_tokens=batch_tokens)
    result = evaluator.evaluate()
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5, atol=2e-5)
    assert result.tokens <= tokens_needed(task, branching=evaluator.branching)


@settings(max_examples=60, deadline=None)
@given(questions=st.lists(question, min_size=1, max_size=6), batch_tokens=st.integers(1, 60), branching=st.booleans())
def test_batches_score_every_token_of_every_option_once(
    questions: list[Question], batch_tokens: int, branching: bool
) -> None:
    requests = Given(questions).list
    scored: list[tuple[int, tuple[int, ...], int]] = []
    for batch in pack(requests, batch_tokens, branching=branching):
        width = batch.ids.shape[1]
        for cell, target, request in zip(batch.cell.tolist(), batch.target.tolist(), batch.request.tolist()):
            row, column = divmod(int(batch.cells[cell]), width)
            ids = batch.ids[row]
            if batch.sees is None or batch.position is None:
                context = ids[: column + 1].tolist()
            else:
                seen = batch.sees[row, column]
                context = ids[seen][batch.position[row][seen].argsort()].tolist()
            scored.append((request, tuple(context), target))
    expected = [(i, r.ids[:t], r.ids[t]) for i, r in enumerate(requests) for t in range(r.scored_from, len(r.ids))]
    assert sorted(scored) == sorted(expected)


@pytest.mark.parametrize("batch_tokens", [1, 40, 400])
def test_what_is_packed_stays_small(batch_tokens: int) -> None:
    """Masks are quadratic in the width of a row: no row may hold all questions, or windows, that begin alike."""
    requests = Given([((256,), [(i % 9, 1, i % 7, i % 5, 2)]) for i in range(100)]).list
    for branching in (False, True):
        batches = pack(requests, batch_tokens, branching=branching)
        assert max(batch.ids.numel() for batch in batches) <= max(batch_tokens, 5)


def test_rows_that_branch_stay_within_the_tokens_of_a_batch(make_mixtral: Any, tiny_tokenizer: Any) -> None:
    model = make_mixtral(layers=2, experts=4)
    texts = TextTask("texts", search=[f"text number {i} is here " * 6 for i in range(12)], window=32)
    common = [Example(str(i), "Answer:", (f" the option {i} a", f" another {i} b"), 0) for i in range(30)]
    for task in (texts, MultipleChoiceTask("one prompt", search=common)):
        longest = max(len(request.ids) for request in task.requests("search", tiny_tokenizer)) + 20  # a second option
        evaluator = Evaluator(model, tiny_tokenizer, task, batch_tokens=128)
        assert max(batch.ids.numel() for batch in evaluator.batches) <= max(128, longest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_off_by_rounding_only(make_mixtral: Any, dtype: torch.dtype) -> None:
    model = make_mixtral(layers=2, experts=4, dtype=dtype, initializer_range=0.05)
    task = Given(QUESTIONS["options of several tokens"])
    evaluator = Evaluator(model, unused, task)
    assert evaluator.branching
    losses, _ = one_at_a_time(model, task, None)
    np.testing.assert_allclose(evaluator.evaluate().losses, losses, rtol=0.01, atol=0.05)


# Models that cannot --------------------------------------------------------------------------------------------------


class Deaf(MixtralModel):
    """Ignores the mask: plain causal attention. Right padding does not matter to it, branches do."""

    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> MoeModelOutputWithPast:  # type: ignore[override]
        return super().forward(attention_mask=None, **kwargs)


class Counting(MixtralModel):
    """Ignores the positions it is given: those of branches would be wrong."""

    def forward(self, position_ids: Tensor | None = None, **kwargs: Any) -> MoeModelOutputWithPast:  # type: ignore[override]
        return super().forward(position_ids=None, **kwargs)


class Flat(MixtralModel):
    """Takes masks of two dimensions only."""

    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> MoeModelOutputWithPast:  # type: ignore[override]
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be (rows, width), got {tuple(attention_mask.shape)}")
        return super().forward(attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("kind", [Deaf, Counting])
def test_half_precision_does_not_hide_that_a_model_cannot_branch(make_mixtral: Any, kind: Any) -> None:
    model = make_mixtral(layers=2, experts=4, dtype=torch.bfloat16, initializer_range=0.1)
    model.model.__class__ = kind
    assert not Evaluator(model, unused, Given(QUESTIONS["options of several tokens"])).branching


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["window", Deaf, Counting, Flat])
@pytest.mark.parametrize("name", ["options of several tokens", "one token beside several"])
def test_models_that_cannot_branch_run_options_apart(make_mixtral: Any, attention: str, kind: Any, name: str) -> None:
    model = make_mixtral(layers=2, experts=4, **({"sliding_window": 4} if kind == "window" else {}))
    model.set_attn_implementation(attention)
    if kind != "window":
        model.model.__class__ = kind
    task = Given(QUESTIONS[name])
    evaluator = Evaluator(model, unused, task)
    assert not evaluator.branching
    losses, _ = one_at_a_time(model, task, None)
    result = evaluator.evaluate()
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5, atol=2e-5)
    assert result.tokens == tokens_needed(task, branching=False)


def test_checking_leaves_nothing_behind(make_mixtral: Any) -> None:
    evaluator = Evaluator(make_mixtral(layers=2, experts=4), unused, Given(QUESTIONS["equal"]))
    assert evaluator.branching
    assert evaluator.passes.runner.prefixes.nbytes == 0  # type: ignore[union-attr]
    assert evaluator.evaluate().layer_tokens == 2 * evaluator.tokens
