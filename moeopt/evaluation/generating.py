"""Greedy generation: batched and left-padded, each answer ended by its own stop texts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moeopt.errors import NonFiniteLossError, OutOfMemoryError
from moeopt.evaluation.batches import grouped
from moeopt.evaluation.evaluation import Evaluation
from moeopt.evaluation.memory import ran_out
from moeopt.evaluation.runners import Active
from moeopt.models import lock_of
from moeopt.models.layerwise import input_device
from moeopt.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.tasks.generation import Prompt

PLACES = 16
"""A batch has so many places for tokens, prompts and answers together, for every one of the evaluator's `batch_tokens`:
but for the prompts, a forward pass runs one token a row."""
PROBED = 8
"""Tokens that are written to see whether padding matters."""
NEAR = 8
"""Tokens decoded in front of those that a stop text can span: the first one may be part of a character."""


@dataclass(frozen=True, eq=False)
class Generation:
    """What a model wrote for some examples, in the task's order.

    `texts` end before the stop text; `answers` are the token ids that they are of, those of a stop text included, an
    end-of-sequence token not. `metrics` are the task's, by name, the reported one first, each float32 (examples,).
    `tokens` counts those of prompts and answers, `layer_tokens` is that times the decoder layers;
    `seconds` is wall time. `active` is the mean number of experts that a token ran in an MoE layer; padding counts like
    any token.
    """

    texts: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    metrics: Mapping[str, NDArray[np.float32]]
    tokens: int
    layer_tokens: int
    seconds: float
    active: float

    @property
    def means(self) -> dict[str, float]:
        """The mean of every metric."""
        return {name: float(values.astype(np.float64).mean()) for name, values in self.metrics.items()}


class Generator:
    """Writes answers to prompts, with the plan in force for the model.

    Args:
        model: a causal language model, in eval mode while it generates.
        tokenizer: its tokenizer; a pad token is not needed.
        prompts: what to generate from, each of an example of its own.
        judge: gives metrics of texts, from the position of the first one's prompt, as `GenerationTask.judge`.
        under: as `Passes.under`.
        metric: names what is reported.
        rungs: rising numbers of examples.
        batch_tokens: a batch has `PLACES` times as many places for tokens; a longer sequence runs alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        judge: Callable[[Sequence[str], int], Mapping[str, NDArray[np.float32]]],
        under: Callable[[Plan | None], AbstractContextManager[Active]],
        *,
        metric: str,
        rungs: Sequence[int],
        batch_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.metric, self.rungs = model, tokenizer, metric, rungs
        self.prompts, self.judge, self.under = list(prompts), judge, under
        self.places = PLACES * batch_tokens
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        shipped = getattr(model.generation_config, "eos_token_id", None)
        self._ends = {*([shipped] if isinstance(shipped, int) else shipped or ()), tokenizer.eos_token_id} - {None}
        self._ends |= _special(tokenizer, {text for prompt in self.prompts for text in prompt.stop})

    def race(self, plan: Plan | None, earlier: Evaluation | None) -> Iterator[Evaluation]:
        """As `Evaluator.race`, by the task's reported metric: the loss is 1 minus that."""
        covered = at = 0 if earlier is None else len(earlier.losses)
        done: list[Generation] = []
        for size in self.rungs:
            if at < size:
                done.append(self.run(plan, at, size))
                at = size
            names = done[0].metrics if done else ()
            judged = {name: np.concatenate([g.metrics[name] for g in done]) for name in names}
            correct = next(iter(judged.values()), np.zeros(0, np.float32))
            correct = np.concatenate([np.zeros(covered, np.float32), correct])[:size]
            actives = [(len(g.texts), g.active) for g in done]
            if earlier is not None:
                actives.append((covered, earlier.active))
            yield Evaluation(
                1 - correct,
                np.ones_like(correct),
                correct,
                sum(g.tokens for g in done),
                sum(g.layer_tokens for g in done),
                sum(g.seconds for g in done),
                sum(n * active for n, active in actives) / sum(n for n, _ in actives),
                {name: float(values.astype(np.float64).mean()) for name, values in judged.items()},
            ).with_earlier(earlier)

    def clear(self) -> None:
        """Nothing to free."""

    def identity(self) -> tuple[object, ...]:
        return ((self.metric, self.prompts),)

    def run(self, plan: Plan | None, first: int, end: int) -> Generation:
        """Answers under a plan (None: the one in force) to the prompts from `first` up to, not including, `end`.

        Raises:
            NonFiniteLossError: if the model's logits are not numbers.
            OutOfMemoryError: if a single sequence does not fit.
        """
        with lock_of(self.model), self.under(plan) as active:
            return self._run(first, end, active)

    def _run(self, first: int, end: int, active: Active) -> Generation:
        started = time.perf_counter()
        prompts = self.prompts[first:end]
        answers: dict[int, list[int]] = {}
        while left := [prompt for prompt in prompts if prompt.example not in answers]:
            try:
                for batch in self._batches(left):
                    answers.update(zip((prompt.example for prompt in batch), self._write(batch)))
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                reason = str(error).partition("\n")[0]
            self._halve(left, reason)
        written = tuple(tuple(answers[prompt.example]) for prompt in prompts)
        texts = tuple(self._text(ids, prompt.stop) for ids, prompt in zip(written, prompts))
        tokens = sum(len(prompt.ids) + len(ids) for ids, prompt in zip(written, prompts))
        metrics = self.judge(texts, first)
        ran = active()
        seconds = time.perf_counter() - started
        return Generation(texts, written, metrics, tokens, tokens * self.layers, seconds, sum(ran) / len(ran))

    def _batches(self, prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
        """The prompts in batches; each of one length, where padding would change what is written."""
        alike = [prompts]
        if not self._pads:
            by_length = groupby(sorted(prompts, key=lambda p: len(p.ids)), lambda p: len(p.ids))
            alike = [list(same) for _, same in by_length]
        return [b for same in alike for b in grouped(same, lambda p: len(p.ids) + p.max_new_tokens, self.places)]

    @cached_property
    def _pads(self) -> bool:
        """Whether the shortest prompt is answered alike alone and padded to the longest one.

        With a cache of keys and values any is; states of linear attention may not know the padding (MiniMax's).
        """
        if _cache_for(self.model) is not None:
            return True
        ends = (choose(self.prompts, key=lambda p: len(p.ids)) for choose in (min, max))
        pair = [replace(prompt, stop=(), max_new_tokens=PROBED) for prompt in ends]
        return self._write(pair)[0] == self._write(pair[:1])[0]

    def _write(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of every answer, those of a stop text included, an end-of-sequence token not.

        Whenever half of the rows have their answers, only the others go on.
        """
        width = max(len(prompt.ids) for prompt in prompts)
        device = input_device(self.model)
        ids = torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
        cache = _cache_for(self.model)
        longest = max(prompt.max_new_tokens for prompt in prompts)
        rows = list(range(len(prompts)))
        answers: list[list[int]] = [[] for _ in prompts]
        with _stock_generation(self.model):
            while rows:
                stops = _Stops(self, [prompts[row] for row in rows], width, early=cache is not None)
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    stopping_criteria=[stops],
                    logits_processor=[_Finite()],
                    generation_config=GenerationConfig(max_new_tokens=longest + width - ids.shape[1]),
                )
                for place, row in enumerate(rows):
                    if stops.ends[place] is not None:
                        answers[row] = output[place, width : stops.ends[place]].tolist()
                on = [place for place in range(len(rows)) if stops.ends[place] is None]
                if on and cache is not None:
                    unfinished = torch.tensor(on, device=device)
                    cache.batch_select_indices(unfinished)
                    ids = output[unfinished]
                    mask = torch.cat([mask[unfinished], mask.new_ones(len(on), ids.shape[1] - mask.shape[1])], dim=1)
                rows = [rows[place] for place in on]
        return answers

    def ended(self, prompt: Prompt, answer: Sequence[int]) -> int | None:
        """How many of an answer's tokens belong to it, if its last token ends it."""
        if answer[-1] in self._ends:
            return len(answer) - 1
        if len(answer) >= prompt.max_new_tokens or self._stopped(answer, prompt.stop):
            return len(answer)
        return None

    def _stopped(self, answer: Sequence[int], stop: Sequence[str]) -> bool:
        if not stop:
            return False
        span = max(len(text.encode()) for text in stop) + NEAR  # a token is at least a byte
        tail = self._decoded(answer[-span:])
        return any(text in tail for text in stop)

    def _text(self, answer: Sequence[int], stop: Sequence[str]) -> str:
        text = self._decoded(answer)
        return text[: min((text.find(end) for end in stop if end in text), default=len(text))]

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _halve(self, prompts: Sequence[Prompt], reason: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        sizes = [len(prompt.ids) + prompt.max_new_tokens for prompt in prompts]
        batches = grouped(sizes, lambda size: size, self.places)
        if all(len(batch) == 1 for batch in batches):
            raise OutOfMemoryError(f"not even a single sequence, of {max(sizes)} tokens, fits into memory: {reason}")
        self.places = max(1, min(self.places, max(len(batch) * batch[0] for batch in batches)) // 2)
        warnings.warn(f"out of memory: going on with {self.places} tokens a batch to generate", stacklevel=2)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Notes where each row's answer ends; with `early`, generation ends when half of the rows have ended."""

    def __init__(self, generator: Generator, prompts: Sequence[Prompt], width: int, *, early: bool) -> None:
        self.generator, self.prompts, self.width, self.early = generator, prompts, width, early
        self.ends: list[int | None] = [None] * len(prompts)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        open_rows = [place for place, end in enumerate(self.ends) if end is None]
        for place, answer in zip(open_rows, input_ids[open_rows, self.width :].tolist()):
            length = self.generator.ended(self.prompts[place], answer)
            self.ends[place] = None if length is None else self.width + length
        ended = [end is not None for end in self.ends]
        over = self.early and sum(ended) * 2 >= len(ended)
        return torch.tensor([over or end for end in ended], device=input_ids.device)


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Leaves logits as they are, and refuses those that are not numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise NonFiniteLossError("the model's logits are not numbers", layer=None)
        return scores


def _special(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """The tokens of texts such as "<|im_end|>" that decoding leaves out, so that no answer ever contains them."""
    vocabulary = tokenizer.get_vocab()
    tokens = {vocabulary[text] for text in texts if text in vocabulary}
    return {token for token in tokens if not tokenizer.decode([token], skip_special_tokens=True)}


@contextmanager
def _stock_generation(model: PreTrainedModel) -> Iterator[None]:
    """Greedy and without penalties, whatever the checkpoint's own generation config says; that one is back on exit."""
    shipped = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


def _cache_for(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache from which rows can be dropped; None for a model that keeps other states than keys and values."""
    supported = getattr(model, "_supports_default_dynamic_cache", lambda: True)()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True)) if supported else None
    plain = cache is not None and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
    return cache if plain else None
