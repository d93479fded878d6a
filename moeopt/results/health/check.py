"""The check itself: prompts, and what both models answer to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moeopt.errors import TaskError, got
from moeopt.evaluation.checks import check_parts
from moeopt.evaluation.generating import Generator
from moeopt.evaluation.store import digest
from moeopt.models import evaluation_mode, fingerprint, moe_layers, patched, without_plan
from moeopt.results.health.answers import LIMITS, MEASURES, NEW_TOKENS, PROMPTS, Answer, Health, Measure, told
from moeopt.tasks import Task
from moeopt.tasks.generation import Prompt
from moeopt.tasks.prompting import templated
from moeopt.tasks.tokens import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.evaluation.runners import Active
    from moeopt.plan import Plan
    from moeopt.tasks import Request


class HealthCheck:
    """`check(plan) -> Health`: the full model answers once, however many plans are held against it.

    Args:
        model, tokenizer: the full model, as `moeopt.load` returns them.
        source: a task, whose prompts are answered (of a text, the first half of each window), or texts.
        split: of the task.
        limit: use the first so many examples of the task.
        new_tokens: most tokens of an answer; a task that is answered by generating may say fewer, and what ends one.
        chat: whether texts are messages of the tokenizer's chat template (tasks say so themselves).
        batch_tokens: as for `Evaluator`.
        limits: what of `LIMITS` is to be otherwise.

    Raises:
        TaskError: when an argument is out of range, the task lacks the split, or a prompt has no tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        source: Task | Sequence[str],
        *,
        split: str = "dev",
        limit: int | None = PROMPTS,
        new_tokens: int = NEW_TOKENS,
        chat: bool = False,
        batch_tokens: int = 1024,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in {"new_tokens": new_tokens, "batch_tokens": batch_tokens}.items():
            if type(value) is not int or value < 1:
                raise TaskError(f"{name} must be an integer of at least 1, got {got(value)}")
        unknown = [name for name in limits or {} if name not in LIMITS]
        if unknown:
            raise TaskError(f"a limit is of one of {', '.join(LIMITS)}, got {unknown[0]!r:.80}")
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and new_tokens >= most:
            raise TaskError(f"new_tokens must be below the {most} tokens that the model takes, got {new_tokens}")
        if isinstance(source, Task):
            check_parts(model, tokenizer, source)
            prompts = _prompts_of_task(source, split, tokenizer, limit, most, new_tokens)
            self.source = f"task {source.name}, split {split}"
        else:
            prompts = _prompts_of_texts(source, tokenizer, chat, new_tokens)
            self.source = "given texts"
        room = None if most is None else most - new_tokens
        prompts = [_shortened(prompt, i, room, new_tokens) for i, prompt in enumerate(prompts)]
        self.model, self.new_tokens, self.limits = model, new_tokens, {**LIMITS, **(limits or {})}
        self.prompts = tuple(str(tokenizer.decode(list(p.ids), skip_special_tokens=False)) for p in prompts)
        self._generator = Generator(
            model, tokenizer, prompts, lambda texts, first: {}, self._under, metric="", rungs=(len(prompts),),
            batch_tokens=batch_tokens,
        )  # fmt: skip

    @cached_property
    def of(self) -> str:
        """16 hex digits that name model, prompts and limits."""
        asked = [(prompt.ids, prompt.stop, prompt.max_new_tokens) for prompt in self._generator.prompts]
        return digest(fingerprint(self.model), asked, sorted(self.limits.items()))

    @cached_property
    def full(self) -> tuple[Answer, ...]:
        """What the full model answers."""
        return self._answers(None)

    def __call__(self, plan: Plan) -> Health:
        """Hold the model under a plan against the full one.

        Raises:
            PlanError, ModelError: as `moeopt.patched`.
            NonFiniteLossError: when logits are not numbers.
            OutOfMemoryError: when a single sequence does not fit.
        """
        small = self._answers(plan)
        measures = {}
        both = [(told(full, full), told(small, full)) for full, small in zip(self.full, small)]
        for name in MEASURES:
            values = np.array([[each[name] for each in pair] for pair in both], np.float64)
            measures[name] = Measure(name, values[:, 0], values[:, 1], self.limits.get(name))
        return Health(plan.fingerprint, self.of, self.source, self.prompts, self.full, small, self.new_tokens, measures)

    def _answers(self, plan: Plan | None) -> tuple[Answer, ...]:
        prompts = self._generator.prompts
        written = self._generator.run(plan, 0, len(prompts))
        return tuple(
            Answer(text, ids, len(ids) < prompt.max_new_tokens)
            for text, ids, prompt in zip(written.texts, written.answers, prompts)
        )

    @contextmanager
    def _under(self, plan: Plan | None) -> Iterator[Active]:
        with torch.inference_mode(), evaluation_mode(self.model):
            if plan is None:
                with without_plan(self.model):
                    yield lambda: tuple(float(layer.k) for layer in moe_layers(self.model))
            else:
                with patched(self.model, plan) as state:
                    yield lambda: state.active


def _prompts_of_task(
    task: Task, split: str, tokenizer: Any, limit: int | None, most: int | None, new_tokens: int
) -> list[Prompt]:
    """What is answered of the first examples of a task: all that stands before what is scored."""
    start = len(Encoder(tokenizer).start)
    prompts: list[Prompt] = []

    def add(task: Task, requests: Sequence[Request]) -> None:
        if task.members:
            for name, requested in task.by_member(requests).items():  # type: ignore[attr-defined]
                add(task.members[name], requested)
        elif task.generates:
            prompts.extend(task.prompts_of(requests))  # type: ignore[attr-defined]
        else:
            first = {request.example: request for request in reversed(requests)}
            for request in reversed(first.values()):
                scored_from = request.scored_from if request.scored_from > max(1, start) else len(request.ids) // 2
                prompts.append(Prompt(request.example, request.ids[:scored_from], (), new_tokens))

    add(task, task.requests(split, tokenizer, limit=limit, max_length=most))
    return prompts


def _prompts_of_texts(texts: Sequence[str], tokenizer: Any, chat: bool, new_tokens: int) -> list[Prompt]:
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise TaskError(f"prompts must be a task or a list of texts, got {got(texts)}")
    encoder = Encoder(tokenizer)
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [templated(tokenizer, messages, add_generation_prompt=True) for messages in turns]
    return [Prompt(i, tuple(encoder(text, special=not chat)), (), new_tokens) for i, text in enumerate(texts)]


def _shortened(prompt: Prompt, number: int, room: int | None, new_tokens: int) -> Prompt:
    """The prompt as number so many, without its beginning where it has more tokens than there is room for."""
    if not prompt.ids:
        raise TaskError(f"prompt {number + 1} has no tokens")
    ids = prompt.ids if room is None else prompt.ids[-room:]
    return Prompt(number, ids, prompt.stop, min(new_tokens, prompt.max_new_tokens))
