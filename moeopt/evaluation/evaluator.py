"""The evaluator: a plan in, losses of a task's examples out, for as few passes through layers as that takes."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from moeopt.defaults import Score as Score
from moeopt.errors import ModelError, NonFiniteLossError, OutOfMemoryError, TaskError, got
from moeopt.evaluation import mixing
from moeopt.evaluation.batches import Batch, pack
from moeopt.evaluation.branching import may_branch
from moeopt.evaluation.checks import check_parts, check_settings
from moeopt.evaluation.evaluation import Evaluation
from moeopt.evaluation.generating import Generation, Generator
from moeopt.evaluation.generating import race as race_generated
from moeopt.evaluation.memory import free_bytes, merged_bytes, ran_out
from moeopt.evaluation.prompts import decoded
from moeopt.evaluation.runners import Active, LayerMajor, Run, Whole, state_of
from moeopt.evaluation.scoring import score
from moeopt.evaluation.teacher import LABEL_FREE, Compression, Teacher
from moeopt.models import (
    MergedCache,
    Storage,
    evaluation_mode,
    layerwise,
    lock_of,
    moe_layers,
    patched,
    plan_in_force,
    without_plan,
)
from moeopt.plan import Plan
from moeopt.tasks.generation import GenerationTask
from moeopt.tasks.mixture import MixtureTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.tasks import Request, Scores, Task

PREFIX_MEMORY = 1 << 30


class Evaluator:
    """Evaluates plans on the same examples, tokenised and batched once.

    The same plan always gives bitwise the same losses. All batches go through a layer before the next one, so that
    merged or offloaded experts are made or moved once. A plan that shares its first layers with an earlier one starts
    where they part (prefix reuse), which changes no bit. A model that keeps state across layers is run whole instead,
    batch by batch. With `limit`, the examples are the first of the task's fixed random order, so that a larger limit
    holds the examples of a smaller one, in front. Threads that share a model take turns. When memory runs out, batches
    are halved, down to one sequence.

    Args:
        model: a causal language model, on one device or dispatched by accelerate. It is left as it was found.
        tokenizer: its tokenizer; a pad token is not needed.
        task: what to score.
        split: "search", "dev" or "test".
        limit: how many examples (windows, for text); None for all.
        batch_tokens: most padded tokens a forward pass; a longer sequence runs alone. More than 1k bring no speed.
        max_length: most tokens a sequence; None for the model's `max_position_embeddings`.
        rungs: rising numbers of examples after which `race` pauses, the last being all of them, or a function that
            gives them for a number of examples; None: no pause.
        prefix_memory: bytes for hidden states of earlier plans, oldest out; 0 turns prefix reuse off. None: 1 GiB if
            the model allows it.
        prefix_device: where they are kept, such as ``"cpu"``; None: where they were computed.
        storage: where merged experts live, see `moeopt.patched`. ``"auto"``: scratch if they would take more than half
            of the free memory.
        score: what a loss is. ``"likelihood"``: the task's own, smooth one; ``"choice"``, for tasks that choose among
            options: minus the log of the right option's share in the softmax over the options (see
            `moeopt.tasks.multiple_choice`), smooth, and blind to what all options share; ``"metric"``: 1 minus the
            correctness of
            the example, so that the mean loss is 1 minus the task's metric; for a `GenerationTask`, also in a mixture,
            the model then generates, and the metric is that of the text. ``"kl"`` and ``"acceptance"`` need no answers:
            how far the model under a plan is from the model without, see `moeopt.evaluation.teacher`. The loss of an
            example is then the mean over the positions behind which the task scores a token, its weight their number,
            and its correctness the share of them where both models have the same first choice. The full model runs
            once more, when a plan is first evaluated, after weights, attention or experts backend have changed, and
            after memory ran out.
        compression: how much of what the full model says is kept for that.
        requests: score these alone, of those that the task makes for the split; `limit` then only tells how many
            examples they are of.

    Attributes:
        examples: how many there are (windows, for text).
        rungs: as given, or one of all examples.
        layers: decoder layers of the model.
        teacher: what is known of the full model, and what that cost; None where the task's own scores are the loss.

    Raises:
        TaskError: if the split is empty, or an example does not fit; naming an argument that is not what it should be.
        ModelError: likewise for what is about the model; if `prefix_memory` is given and the model keeps state across
            layers.
        ValueError: when `rungs` are not such.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        *,
        split: str = "search",
        limit: int | None = None,
        batch_tokens: int = 1024,
        max_length: int | None = None,
        rungs: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
        prefix_memory: int | None = None,
        prefix_device: str | None = None,
        storage: Storage = "auto",
        score: Score = "likelihood",
        compression: Compression | None = None,
        requests: Sequence[Request] | None = None,
    ) -> None:
        check_parts(model, tokenizer, task)
        check_settings(
            split=split, limit=limit, batch_tokens=batch_tokens, max_length=max_length, prefix_memory=prefix_memory,
            prefix_device=prefix_device, storage=storage, compression=compression,
        )  # fmt: skip
        if score not in get_args(Score):
            raise TaskError(f"score must be one of {', '.join(get_args(Score))}, got {got(score)}")
        self.score: Score = score
        if score == "choice" and not task.chooses:
            raise TaskError(f"task {task.name!r} does not choose among options: score='choice' needs a task that does")
        config = model.config.get_text_config()
        if max_length is None:
            max_length = getattr(config, "max_position_embeddings", None)
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.split, self.limit, self.max_length = split, limit, max_length
        if requests is None:
            requests = task.requests(split, tokenizer, limit=limit, max_length=max_length)
        self._requests = sorted(requests, key=lambda request: request.example)
        numbers = [request.example for request in self._requests]
        distinct = sorted(set(numbers))
        self.examples = len(distinct)
        self.rungs = _checked_rungs(rungs(self.examples) if callable(rungs) else rungs, self.examples)
        ends = [int(np.searchsorted(numbers, distinct[size - 1], side="right")) for size in self.rungs]
        self._spans = list(zip([0, *ends], ends))
        self.teacher: Teacher | None = None
        if score in LABEL_FREE:
            rows = [self._requests[first:end] for first, end in self._spans]
            self.teacher = Teacher(rows, int(config.vocab_size), compression or Compression())
        self._cache, self._merged_in = MergedCache(), storage
        self._runner: LayerMajor | Whole = Whole(model, int(config.num_hidden_layers))
        with lock_of(model), torch.inference_mode(), evaluation_mode(model), without_plan(model):
            self._moe = moe_layers(model)
            try:
                parts = layerwise(model)
            except ModelError as error:
                if prefix_memory:
                    raise ModelError(f"hidden states cannot be reused: {error}") from None
            else:
                memory = PREFIX_MEMORY if prefix_memory is None else prefix_memory
                self._runner = LayerMajor(parts, memory, prefix_device)
            self._branching = may_branch(self._runner, model, self._requests)
        self.layers = self._runner.layers
        self._members: dict[str, mixing.Member] = {}
        if score == "metric" and isinstance(task, MixtureTask) and task.generates:
            each = None if prefix_memory is None else prefix_memory // len(task.members)
            own = task.own(self._requests)
            alone = partial(
                Evaluator, model, tokenizer, split=split, batch_tokens=batch_tokens, max_length=max_length,
                prefix_memory=each, prefix_device=prefix_device, storage=storage, score=score,
            )  # fmt: skip
            for key, (at, scale) in task.places(self._requests).items():
                counts = np.searchsorted(at, self.rungs)
                sizes = sorted({int(n) for n in counts if n})
                evaluator = alone(task.members[key], requests=own[key], limit=len(at), rungs=sizes)
                self._members[key] = mixing.Member(evaluator, at, scale)
        self._batches: list[list[Batch]] = []
        self._pack(batch_tokens)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The forward passes of all rungs."""
        return tuple(batch for rung in self._batches for batch in rung)

    @property
    def requests(self) -> Sequence[Request]:
        """The token sequences that are scored, those of an example together."""
        return self._requests

    @property
    def first_prompt(self) -> tuple[str, str]:
        """The first example's prompt as the model reads it, and what is scored behind it: see `prompts.decoded`."""
        return decoded(self.tokenizer, self._requests[0])

    @property
    def branching(self) -> bool:
        """Whether the options of a question share its prompt."""
        return self._branching

    @property
    def tokens(self) -> int:
        """Non-padding tokens that one evaluation runs."""
        return sum(batch.tokens for batch in self.batches)

    def clear(self, *, keep_teacher: bool = False) -> None:
        """Free the hidden states and merged experts of earlier plans, and what is known of the full model."""
        self._runner.clear()
        self._cache.clear()
        for member in self._members.values():
            member.evaluator.clear()
        if self.teacher is not None and not keep_teacher:
            self.teacher.forget()

    def clock(self) -> float:
        """Seconds, of which only differences mean something; while the full model is learnt, they stand still."""
        return time.perf_counter() - (0.0 if self.teacher is None else self.teacher.seconds)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the token sequences, what is scored of them, and how."""
        digest = hashlib.sha256(b"" if self.score == "likelihood" else self.score.encode())
        if self.teacher is not None:
            digest.update(repr((self.teacher.compression.top_p, self.teacher.most)).encode())
        if self._generates:
            digest.update(repr((self.task.metric, self._generator.prompts)).encode())
        for name, member in self._members.items():
            digest.update(repr((name, member.evaluator.fingerprint)).encode())
        for request in self._requests:
            digest.update(repr((request.example, request.option, request.ids, request.scored_from)).encode())
        return digest.hexdigest()[:16]

    def evaluate(self, plan: Plan | None = None) -> Evaluation:
        """Scores the model under `plan` on all examples; None means the model as it is.

        Raises:
            PlanError: if the plan does not fit the model.
            ModelError: if the model has no MoE layers that a plan can act on.
            NonFiniteLossError: if a loss is NaN or infinite, with the first MoE layer whose output is not finite.
            OutOfMemoryError: if a single sequence does not fit.
        """
        *_, last = self.race(plan)
        return last

    def full_model(self) -> Evaluation:
        """Scores the model without any plan, also within `moeopt.patched`; raises as `evaluate`.

        Where losses are distances from it they are 0, for which nothing is run.
        """
        if self.teacher is None:
            with without_plan(self.model):
                return self.evaluate()
        scores, metrics = self.teacher.itself(self._requests, "kl" if self.score == "kl" else "acceptance")
        active = float(np.mean(self._stock()))
        return Evaluation(scores.losses, scores.weights, scores.correct, 0, 0, 0.0, active, metrics)

    def race(self, plan: Plan | None = None, known: Evaluation | None = None) -> Iterator[Evaluation]:
        """Scores the model under `plan` rung after rung: after each, what is known of the examples so far.

        Nothing is computed before it is asked for. Tokens, layer-tokens and seconds are those of all rungs so far.

        Args:
            plan: as for `evaluate`, which also says what is raised.
            known: what the plan got on the first so many examples before; rungs that it covers are not run.
        """
        if self._generates:
            yield from race_generated(partial(self._generated, plan), self.rungs, known)
            return
        if self._members:
            yield from mixing.race(self._members, self.rungs, plan, known)
            return
        sums = np.zeros((2 if self.teacher is None else 3, len(self._requests)))
        tokens = layer_tokens = padded = 0
        seconds = active = 0.0
        for rung, (size, (first, end)) in enumerate(zip(self.rungs, self._spans)):
            started = self.clock()
            run: Run | None = None
            covered, measured = (0, 0.0) if known is None else (len(known.losses), known.active)
            if covered < size:
                with lock_of(self.model):
                    run = self._run(rung, plan, sums[:, first:end])
                tokens += sum(batch.tokens for batch in self._batches[rung])
                layer_tokens += run.layer_tokens
                measured = run.active()
            places = sum(batch.ids.numel() for batch in self._batches[rung])
            padded += places
            active += places * measured
            scores, metrics = self._reduce(sums[:, :end])
            found = np.stack([scores.losses, scores.weights, scores.correct]).astype(np.float32)
            if known is not None:
                found[:, :covered] = known.scores[:, :size]
                metrics = {}
            seconds += self.clock() - started
            costs = tokens, layer_tokens, seconds
            evaluation = Evaluation(found[0], found[1], found[2], *costs, active / padded, metrics)
            if run is not None and size == self.examples:
                self._runner.judge(run.trail, evaluation.loss)
            yield evaluation

    def generate(self, plan: Plan | None = None) -> Generation:
        """What the model writes under `plan` for all examples of a `GenerationTask`; None means the model as it is.

        Decoding is greedy, whatever generation config the checkpoint ships. Batches hold answers of like length; their
        size moves the logits by rounding only.

        Raises:
            TaskError: if the task is not one to generate for.
            PlanError, ModelError, NonFiniteLossError, OutOfMemoryError: as `evaluate`.
        """
        return self._generated(plan, 0, self.examples)

    @property
    def _generates(self) -> bool:
        return self.score == "metric" and isinstance(self.task, GenerationTask)

    @cached_property
    def _generator(self) -> Generator:
        if not isinstance(self.task, GenerationTask):
            raise TaskError(f"task {self.task.name!r} is not answered by generating; a GenerationTask is")
        prompts = self.task.prompts_of(self._requests)
        return Generator(
            self.model, self.tokenizer, self.task, prompts, split=self.split, batch_tokens=self.batch_tokens
        )

    def _generated(self, plan: Plan | None, first: int, end: int) -> Generation:
        generator = self._generator
        with lock_of(self.model), self._under(plan) as active:
            return generator.run(first, end, active)

    def _reduce(self, sums: NDArray[np.float64]) -> tuple[Scores, dict[str, float]]:
        """Scores and metrics from what the first so many requests got."""
        requests = self._requests[: sums.shape[1]]
        if self.teacher is not None:
            return self.teacher.reduce(requests, sums, "kl" if self.score == "kl" else "acceptance")
        scores = self.scores_of(requests, sums[0], sums[1].astype(np.int64))
        return scores, self.task.metrics(self.split, scores)

    def scores_of(
        self, requests: Sequence[Request], log_likelihood: NDArray[np.float64], greedy: NDArray[np.int64]
    ) -> Scores:
        """Per example, the loss that `score` names, from the log-likelihoods of some requests, as `Task.reduce`."""
        scores = self.task.reduce(self.split, requests, log_likelihood, greedy)
        if self.score == "metric":
            return replace(scores, losses=1 - scores.correct)
        if self.score == "choice":
            assert scores.choice is not None
            return replace(scores, losses=scores.choice)
        return scores

    def _run(self, rung: int, plan: Plan | None, sums: NDArray[np.float64]) -> Run:
        """Fills in what the requests of a rung got, (values, requests), with smaller batches if memory runs out.

        Where not even the smallest do, it is the plan that is too large: the next one has batches as before.
        """
        before = self.batch_tokens, self._branching
        while True:
            try:
                return self._attempt(rung, plan, sums)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                reason = str(error).partition("\n")[0]
            try:
                self._halve_batches(reason)
            except OutOfMemoryError:
                batch_tokens, self._branching = before
                self._pack(batch_tokens)
                raise

    def _attempt(self, rung: int, plan: Plan | None, sums: NDArray[np.float64]) -> Run:
        sums[:] = 0
        with ExitStack() as stack:
            if self.teacher is not None:
                self._learn(rung, self.teacher)
            active = stack.enter_context(self._under(plan))
            run = self._runner.run(rung, self._batches[rung], active)
            for batch, logits_of in stack.enter_context(closing(run.outputs)):
                if self.teacher is not None:
                    request, values = self.teacher.compare(rung, batch, logits_of)
                else:
                    request, values = batch.request.numpy(), np.stack([t.double() for t in score(batch, logits_of)])
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
                run = self._runner.run(rung, self._batches[rung], self._stock)
                with closing(run.outputs):
                    teacher.learn(rung, run.outputs)
            teacher.layer_tokens += run.layer_tokens
        finally:
            teacher.seconds += time.perf_counter() - started

    @contextmanager
    def _under(self, plan: Plan | None) -> Iterator[Active]:
        """The model ready to run under a plan (None: the one in force); yields what tells its active experts."""
        plan = plan_in_force(self.model) if plan is None else plan
        with torch.inference_mode(), evaluation_mode(self.model):
            if plan is None:
                yield self._stock
                return
            with patched(self.model, plan, storage=self._where_merged(plan), cache=self._cache) as state:
                yield partial(getattr, state, "active")

    def _stock(self) -> tuple[float, ...]:
        """Experts that a token runs in each MoE layer of the model as it is."""
        return tuple(float(layer.k) for layer in self._moe)

    def _where_merged(self, plan: Plan) -> Storage:
        if self._merged_in != "auto" or not any(layer.makes_experts for layer in plan.layers):
            return self._merged_in
        needed = merged_bytes(self._moe, plan) - self._cache.nbytes
        free = free_bytes(next(self.model.parameters()).device)
        return "auto" if needed <= free // 2 else "scratch"

    def _pack(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._batches = [
            pack(self._requests[first:end], batch_tokens, branching=self._branching) for first, end in self._spans
        ]

    def _halve_batches(self, reason: str) -> None:
        self.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        largest = max(batch.ids.numel() for batch in self.batches)
        if self._branching and all(len(batch.ids) == 1 for batch in self.batches):
            warnings.warn("out of memory: going on with every option in a row of its own", stacklevel=2)
            self._branching = False
            self._pack(self.batch_tokens)
            return
        if all(len(batch.ids) == 1 for batch in self.batches):
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
            for layer in self._moe:
                handle = layer.block.register_forward_hook(lambda _m, _i, out, index=layer.index: watch(index, out))
                stack.callback(handle.remove)
            for _ in Whole(self.model, self.layers).run(0, [batch]).outputs:
                pass
        if bad:
            raise NonFiniteLossError(f"the loss is not finite: the MoE output of layer {bad[0]} is not", layer=bad[0])
        raise NonFiniteLossError("the loss is not finite, though the output of every MoE layer is", layer=None)


def _checked_rungs(rungs: Sequence[int] | None, examples: int) -> tuple[int, ...]:
    chosen = (examples,) if rungs is None else tuple(rungs)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] != examples:
        raise ValueError(f"rungs must be rising numbers of examples that end at all {examples}, got {rungs!r}")
    return chosen
