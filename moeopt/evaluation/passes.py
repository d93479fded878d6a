"""Forward passes over requests, rung after rung: as few as plans need, with smaller batches where memory runs out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moeopt.errors import ModelError, NonFiniteLossError, OutOfMemoryError
from moeopt.evaluation.batches import Batch, pack
from moeopt.evaluation.branching import may_branch
from moeopt.evaluation.evaluation import Evaluation
from moeopt.evaluation.memory import free_bytes, merged_bytes, ran_out
from moeopt.evaluation.runners import Active, LayerMajor, LogitsOf, Run, Whole, state_of
from moeopt.evaluation.scoring import score
from moeopt.evaluation.throughput import batch_tokens_for
from moeopt.models import (
    MergedCache,
    MergedWeights,
    evaluation_mode,
    layerwise,
    lock_of,
    moe_layers,
    patched,
    plan_in_force,
    without_plan,
)
from moeopt.models.layerwise import input_device
from moeopt.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.evaluation.teacher import Teacher
    from moeopt.tasks import Request, Scores, Task

PREFIX_MEMORY = 1 << 30


class Reading(Protocol):
    """What is read off the logits of a forward pass, and what that says of examples."""

    columns: int
    """Numbers that are summed for each request."""

    def read(self, rung: int, batch: Batch, logits_of: LogitsOf) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of some entries of a batch: the request that each counts for, (entries,), and numbers, (columns, entries)."""

    def reduce(self, requests: Sequence[Request], sums: NDArray[np.float64]) -> tuple[Scores, dict[str, float]]:
        """Scores of examples, and metrics by name, from the sums (columns, requests) of the first so many requests."""


class Answers:
    """Reads how likely the answers are: the log-likelihood of every request, and how many of its tokens come first.

    Args:
        task: makes scores of them.
        split: which the requests are of.
        kind: which loss, as `score` of `Evaluator`.
    """

    columns = 2

    def __init__(self, task: Task, split: str, kind: str) -> None:
        self.task, self.split, self.kind = task, split, kind

    def read(self, rung: int, batch: Batch, logits_of: LogitsOf) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return batch.request.numpy(), np.stack([values.double() for values in score(batch, logits_of)])

    def reduce(self, requests: Sequence[Request], sums: NDArray[np.float64]) -> tuple[Scores, dict[str, float]]:
        scores = self.scores(requests, sums[0], sums[1].astype(np.int64))
        return scores, self.task.metrics(self.split, scores)

    def scores(
        self, requests: Sequence[Request], log_likelihood: NDArray[np.float64], greedy: NDArray[np.int64]
    ) -> Scores:
        """As `Task.reduce`, with the loss that is minimised."""
        scores = self.task.reduce(self.split, requests, log_likelihood, greedy)
        if self.kind == "metric":
            return replace(scores, losses=1 - scores.correct)
        if self.kind == "choice":
            assert scores.choice is not None
            return replace(scores, losses=scores.choice)
        return scores


def _that_fits(device: torch.device) -> int:
    """Bytes for hidden states of earlier plans where none are asked for; fewer where memory is short, which is said."""
    fits = free_bytes(device) // 4
    if fits < PREFIX_MEMORY:
        warnings.warn(
            f"hidden states of earlier plans get {fits >> 20} MiB of {device}, not {PREFIX_MEMORY >> 20}: a quarter of "
            "what is free; prefix_device='cpu' keeps them in RAM, prefix_memory= says how many bytes",
            stacklevel=2,
        )
    return min(fits, PREFIX_MEMORY)


class Passes:
    """Runs the requests of an evaluator under plans. The model is left as it was found.

    Args:
        model: as for `Evaluator`, like the options of these names.
        requests: those of an example together.
        rungs: rising numbers of examples.
        ends: for every rung, how many requests they have.
        reading: what the logits are read for.
        teacher: the reading, where that is of the full model, which it learns by passes as well.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        rungs: Sequence[int],
        ends: Sequence[int],
        reading: Reading,
        *,
        teacher: Teacher | None,
        batch_tokens: int | None,
        prefix_memory: int | None,
        prefix_device: str | None,
        merged_weights: MergedWeights,
    ) -> None:
        self.model, self.reading, self.teacher = model, reading, teacher
        self.requests, self.rungs, self.spans = requests, rungs, list(zip([0, *ends], ends))
        self.cache, self.merged_weights = MergedCache(), merged_weights
        self.runner: LayerMajor | Whole = Whole(model, int(model.config.get_text_config().num_hidden_layers))
        with lock_of(model), torch.inference_mode(), evaluation_mode(model), without_plan(model):
            self.moe = moe_layers(model)
            try:
                parts = layerwise(model)
            except ModelError as error:
                if prefix_memory:
                    raise ModelError(f"hidden states cannot be reused: {error}") from None
            else:
                memory = _that_fits(input_device(model)) if prefix_memory is None else prefix_memory
                self.runner = LayerMajor(parts, memory, prefix_device)
            self.branching = may_branch(self.runner, model, requests)
            if batch_tokens is None:
                batch_tokens = batch_tokens_for(self.runner, model, requests)
        self._pack(batch_tokens)

    def repack(self, batch_tokens: int) -> None:
        """Go on with so many padded tokens a forward pass; nothing of earlier passes is kept."""
        if batch_tokens != self.batch_tokens:
            self.clear()
            if self.teacher is not None:
                self.teacher.forget()
            self._pack(batch_tokens)

    def clear(self) -> None:
        """Free the hidden states and merged experts of earlier plans."""
        self.runner.clear()
        self.cache.clear()

    def identity(self) -> tuple[object, ...]:
        """Nothing: the requests say it all."""
        return ()

    def clock(self) -> float:
        """As `Evaluator.clock`."""
        return time.perf_counter() - (0.0 if self.teacher is None else self.teacher.seconds)

    def race(self, plan: Plan | None, earlier: Evaluation | None) -> Iterator[Evaluation]:
        """As `Evaluator.race`."""
        sums = np.zeros((self.reading.columns, len(self.requests)))
        tokens = layer_tokens = padded = 0
        seconds = active = 0.0
        for rung, (size, (first, end)) in enumerate(zip(self.rungs, self.spans)):
            started = self.clock()
            run: Run | None = None
            if earlier is not None and len(earlier.losses) >= size:
                measured = earlier.active
            else:
                with lock_of(self.model):
                    run = self._run(rung, plan, sums[:, first:end])
                tokens += sum(batch.tokens for batch in self.batches[rung])
                layer_tokens += run.layer_tokens
                measured = run.active()
            places = sum(batch.ids.numel() for batch in self.batches[rung])
            padded += places
            active += places * measured
            # Sums of rungs that were not run are 0: what they would give is replaced by what is known of them.
            scores, metrics = self.reading.reduce(self.requests[:end], sums[:, :end])
            seconds += self.clock() - started
            losses, weights, correct = np.stack([scores.losses, scores.weights, scores.correct]).astype(np.float32)
            evaluation = Evaluation(losses, weights, correct, tokens, layer_tokens, seconds, active / padded, metrics)
            evaluation = evaluation.with_earlier(earlier)
            if run is not None and rung == len(self.rungs) - 1:
                self.runner.judge(run.trail, evaluation.loss)
            yield evaluation

    @contextmanager
    def under(self, plan: Plan | None) -> Iterator[Active]:
        """The model ready to run under a plan (None: the one in force); yields what tells its active experts."""
        plan = plan_in_force(self.model) if plan is None else plan
        with torch.inference_mode(), evaluation_mode(self.model):
            if plan is None:
                yield self.stock
                return
            with patched(self.model, plan, merged_weights=self.where_merged(plan), cache=self.cache) as state:
                yield partial(getattr, state, "active")

    def stock(self) -> tuple[float, ...]:
        """Experts that a token runs in each MoE layer of the model as it is."""
        return tuple(float(layer.k) for layer in self.moe)

    def _run(self, rung: int, plan: Plan | None, sums: NDArray[np.float64]) -> Run:
        """Fills in what the requests of a rung got, (columns, requests), with smaller batches if memory runs out.

        Where not even the smallest do, it is the plan that is too large: the next one has batches as before.
        """
        before = self.batch_tokens, self.branching
        while True:
            try:
                return self._attempt(rung, plan, sums)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside of `except`, where the error's traceback would still hold the tensors that took the memory.
            try:
                self._halve_batches(reason)
            except OutOfMemoryError:
                batch_tokens, self.branching = before
                self._pack(batch_tokens)
                raise

    def _attempt(self, rung: int, plan: Plan | None, sums: NDArray[np.float64]) -> Run:
        sums[:] = 0
        with ExitStack() as stack:
            if self.teacher is not None:
                self._learn(rung, self.teacher)
            active = stack.enter_context(self.under(plan))
            run = self.runner.run(rung, self.batches[rung], active)
            for batch, logits_of in stack.enter_context(closing(run.outputs)):
                request, values = self.reading.read(rung, batch, logits_of)
                if not np.isfinite(values).all():
                    self._raise_non_finite(batch)
                for total, value in zip(sums, values):
                    np.add.at(total, request, value)
            run.keep()
        return run

    def _learn(self, rung: int, teacher: Teacher) -> None:
        """Lets the teacher see the model without a plan, unless it has; nothing of that run is kept for plans."""
        if teacher.knows(rung, state_of(self.model)):
            return
        started = time.perf_counter()
        try:
            with torch.inference_mode(), evaluation_mode(self.model), without_plan(self.model):
                run = self.runner.run(rung, self.batches[rung], self.stock)
                with closing(run.outputs):
                    teacher.learn(rung, run.outputs)
            teacher.layer_tokens += run.layer_tokens
        finally:
            teacher.seconds += time.perf_counter() - started

    def where_merged(self, plan: Plan) -> MergedWeights:
        """Where a plan's merged experts live now: as asked, or in scratch if they took over half of the free memory."""
        if self.merged_weights != "auto" or not any(layer.makes_experts for layer in plan.layers):
            return self.merged_weights
        needed = merged_bytes(self.moe, plan) - self.cache.nbytes
        free = free_bytes(next(self.model.parameters()).device)
        return "auto" if needed <= free // 2 else "scratch"

    def _pack(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.batches = [
            pack(self.requests[first:end], batch_tokens, branching=self.branching) for first, end in self.spans
        ]

    def _halve_batches(self, reason: str) -> None:
        self.clear()
        if self.teacher is not None:
            self.teacher.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batches = [batch for rung in self.batches for batch in rung]
        largest = max(batch.ids.numel() for batch in batches)
        single = all(len(batch.ids) == 1 for batch in batches)
        if self.branching and single:
            warnings.warn("out of memory: going on with every option in a row of its own", stacklevel=2)
            self.branching = False
            self._pack(self.batch_tokens)
            return
        if single:
            raise OutOfMemoryError(f"not even a single sequence, of {largest} tokens, fits into memory: {reason}")
        smaller = max(1, min(self.batch_tokens, largest) // 2)
        warnings.warn(f"out of memory: going on with {smaller} tokens a forward pass", stacklevel=2)
        self._pack(smaller)

    def _raise_non_finite(self, batch: Batch) -> NoReturn:
        """Runs the batch again, watching the MoE blocks, and raises."""
        bad: list[int] = []
        real = batch.mask.bool().flatten()

        def watch(index: int, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not hidden.reshape(len(real), -1)[real.to(hidden.device)].isfinite().all():
                bad.append(index)

        with ExitStack() as stack:
            for layer in self.moe:
                handle = layer.block.register_forward_hook(lambda _m, _i, out, index=layer.index: watch(index, out))
                stack.callback(handle.remove)
            for _ in Whole(self.model, self.runner.layers).run(0, [batch]).outputs:
                pass
        if bad:
            raise NonFiniteLossError(f"the loss is not finite: the MoE output of layer {bad[0]} is not", layer=bad[0])
        raise NonFiniteLossError("the loss is not finite, though the output of every MoE layer is", layer=None)
