"""The evaluator: a plan in, losses of a task's examples out, for as few passes through layers as that takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray

from moeopt.defaults import Score as Score
from moeopt.errors import TaskError, got, without_storage
from moeopt.evaluation.batches import Batch
from moeopt.evaluation.checks import check_parts, check_settings
from moeopt.evaluation.evaluation import Evaluation
from moeopt.evaluation.generating import Generation, Generator
from moeopt.evaluation.mixing import Members
from moeopt.evaluation.passes import Answers, Passes
from moeopt.evaluation.prompts import decoded
from moeopt.evaluation.teacher import LABEL_FREE, Compression, Teacher
from moeopt.models import MergedWeights, is_exact, without_plan
from moeopt.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.tasks import Request, Scores, Task
    from moeopt.tasks.generation import GenerationTask


class Scorer(Protocol):
    """One kind of score: forward passes over requests, generated text, or the scorers of a mixture's members."""

    def race(self, plan: Plan | None, earlier: Evaluation | None) -> Iterator[Evaluation]:
        """As `Evaluator.race`."""

    def clear(self) -> None:
        """Free what is kept from one plan to the next."""

    def identity(self) -> Iterable[object]:
        """What decides the scores beside the requests, for `Evaluator.fingerprint`."""


class Evaluator:
    """Evaluates plans on the same examples, tokenised and batched once.

    The same plan always gives bitwise the same losses, where the model is `exact`. All batches go through a layer
    before the next one, so that merged or offloaded experts are made or moved once. A plan that shares its first layers
    with an earlier one starts where they part (prefix reuse), which changes no bit, or none that running it again would
    not. A model that keeps state across layers is run whole instead, batch by batch. With `limit`, the examples are the
    first of the task's fixed random order, so that a larger limit holds the examples of a smaller one, in front.
    Threads that share a model take turns. When memory runs out, batches are halved, down to one sequence.

    Args:
        model: a causal language model, on one device or dispatched by accelerate. It is left as it was found.
        tokenizer: its tokenizer; a pad token is not needed.
        task: what to score.
        split: "search", "dev" or "test".
        limit: how many examples (windows, for text); None for all.
        batch_tokens: most padded tokens a forward pass; a longer sequence runs alone. None: 1,024 on a CPU, where more
            bring no speed; on an accelerator what a short measurement finds, see `throughput.batch_tokens_for`.
        max_length: most tokens a sequence; None for the model's `max_position_embeddings`.
        rungs: rising numbers of examples after which `race` pauses, the last being all of them, or a function that
            gives them for a number of examples; None: no pause.
        prefix_memory: bytes for hidden states of earlier plans, oldest out; 0 turns prefix reuse off. None: 1 GiB if
            the model allows it.
        prefix_device: where they are kept, such as ``"cpu"``; None: where they were computed.
        merged_weights: where they live, see `moeopt.patched`. ``"auto"``: scratch if they would take more than half
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
        requests: the token sequences that are scored, those of an example together.
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

    @without_storage
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        *,
        split: str = "search",
        limit: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        rungs: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
        prefix_memory: int | None = None,
        prefix_device: str | None = None,
        merged_weights: MergedWeights = "auto",
        score: Score = "likelihood",
        compression: Compression | None = None,
        requests: Sequence[Request] | None = None,
    ) -> None:
        check_parts(model, tokenizer, task)
        check_settings(
            split=split, limit=limit, batch_tokens=batch_tokens, max_length=max_length, prefix_memory=prefix_memory,
            prefix_device=prefix_device, merged_weights=merged_weights, compression=compression,
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
        self.requests: Sequence[Request] = sorted(requests, key=lambda request: request.example)
        numbers = [request.example for request in self.requests]
        distinct = sorted(set(numbers))
        self.examples = len(distinct)
        self.rungs = _checked_rungs(rungs(self.examples) if callable(rungs) else rungs, self.examples)
        ends = [int(np.searchsorted(numbers, distinct[size - 1], side="right")) for size in self.rungs]
        self.teacher: Teacher | None = None
        self._answers = Answers(task, split, score)
        if score in LABEL_FREE:
            by_rung = [self.requests[first:end] for first, end in zip([0, *ends], ends)]
            self.teacher = Teacher(by_rung, int(config.vocab_size), compression or Compression(), score)
        self.passes = Passes(
            model, self.requests, self.rungs, ends, self.teacher or self._answers, teacher=self.teacher,
            batch_tokens=batch_tokens, prefix_memory=prefix_memory, prefix_device=prefix_device,
            merged_weights=merged_weights,
        )  # fmt: skip
        self.layers = self.passes.runner.layers
        self._scorer: Scorer = self.passes
        if score == "metric" and task.generates and not task.members:
            self._scorer = self._generator
        elif score == "metric" and task.generates:
            alone = partial(
                Evaluator, model, tokenizer, split=split, batch_tokens=self.batch_tokens, max_length=max_length,
                prefix_device=prefix_device, merged_weights=merged_weights, score=score,
            )  # fmt: skip
            memory = None if prefix_memory is None else prefix_memory // len(task.members)
            self._scorer = Members(task, self.requests, self.rungs, partial(alone, prefix_memory=memory))

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The forward passes of all rungs."""
        return tuple(batch for rung in self.passes.batches for batch in rung)

    @property
    def first_prompt(self) -> tuple[str, str]:
        """The first example's prompt as the model reads it, and what is scored behind it: see `prompts.decoded`."""
        return decoded(self.tokenizer, self.requests[0])

    @property
    def branching(self) -> bool:
        """Whether the options of a question share its prompt."""
        return self.passes.branching

    @property
    def exact(self) -> bool:
        """Whether the self-checks so far held bit for bit; else within rounding, as a warning said.

        Those of merged experts run when a plan first merges. Where they did not, the same plan may give other losses in
        another process or after other plans, by less than `noise_floor`, which racing allows for.
        """
        return is_exact(self.model)

    @property
    def batch_tokens(self) -> int:
        """Most padded tokens a forward pass: as given or found, or fewer after memory ran out."""
        return self.passes.batch_tokens

    @property
    def tokens(self) -> int:
        """Non-padding tokens that one evaluation runs."""
        return sum(batch.tokens for batch in self.batches)

    def clear(self, *, keep_teacher: bool = False) -> None:
        """Free the hidden states and merged experts of earlier plans, and what is known of the full model."""
        self.passes.clear()
        self._scorer.clear()
        if self.teacher is not None and not keep_teacher:
            self.teacher.forget()

    def clock(self) -> float:
        """Seconds, of which only differences mean something; while the full model is learnt, they stand still."""
        return self.passes.clock()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the token sequences, what is scored of them, and how."""
        digest = hashlib.sha256(b"" if self.score == "likelihood" else self.score.encode())
        if self.teacher is not None:
            digest.update(repr((self.teacher.compression.top_p, self.teacher.most)).encode())
        for part in self._scorer.identity():
            digest.update(repr(part).encode())
        for request in self.requests:
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
        scores, metrics = self.teacher.itself(self.requests)
        active = float(np.mean(self.passes.stock()))
        return Evaluation(scores.losses, scores.weights, scores.correct, 0, 0, 0.0, active, metrics)

    def race(self, plan: Plan | None = None, earlier: Evaluation | None = None) -> Iterator[Evaluation]:
        """Scores the model under `plan` rung after rung: after each, what is known of the examples so far.

        Nothing is computed before it is asked for. Tokens, layer-tokens and seconds are those of all rungs so far.

        Args:
            plan: as for `evaluate`, which also says what is raised.
            earlier: what the plan got on the first so many examples before; rungs that it covers are not run.
        """
        return self._scorer.race(plan, earlier)

    def generate(self, plan: Plan | None = None) -> Generation:
        """What the model writes under `plan` for all examples of a `GenerationTask`; None means the model as it is.

        Decoding is greedy, whatever generation config the checkpoint ships. Batches hold answers of like length; their
        size moves the logits by rounding only.

        Raises:
            TaskError: if the task is not one to generate for.
            PlanError, ModelError, NonFiniteLossError, OutOfMemoryError: as `evaluate`.
        """
        return self._generator.run(plan, 0, self.examples)

    @cached_property
    def _generator(self) -> Generator:
        if not self.task.generates or self.task.members:
            raise TaskError(f"task {self.task.name!r} is not answered by generating; a GenerationTask is")
        task = cast("GenerationTask", self.task)
        return Generator(
            self.model, self.tokenizer, task.prompts_of(self.requests), partial(task.judge, self.split),
            self.passes.under, metric=task.metric, rungs=self.rungs, batch_tokens=self.batch_tokens,
        )  # fmt: skip

    def scores_of(
        self, requests: Sequence[Request], log_likelihood: NDArray[np.float64], greedy: NDArray[np.int64]
    ) -> Scores:
        """Per example, the loss that `score` names, from the log-likelihoods of some requests, as `Task.reduce`."""
        return self._answers.scores(requests, log_likelihood, greedy)


def _checked_rungs(rungs: Sequence[int] | None, examples: int) -> tuple[int, ...]:
    chosen = (examples,) if rungs is None else tuple(rungs)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] != examples:
        raise ValueError(f"rungs must be rising numbers of examples that end at all {examples}, got {rungs!r}")
    return chosen
