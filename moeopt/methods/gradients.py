"""The derivative of a task's loss by what every MoE layer gives: activations only, no gradient of any weight.

The loss is a function of the log-likelihoods of the task's requests. Their coefficients (the loss's derivative by each)
come from the task's own `reduce`; what they weigh is followed back from the logits to the output of every MoE block.
Each layer is run again from the hidden states that entered it, so that no more than one layer's activations are held
at a time, beside the hidden states between layers, which a few examples at a time share a fixed memory for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeopt.evaluation import Evaluator
from moeopt.evaluation.batches import Batch, pack
from moeopt.evaluation.runners import hidden_dtype
from moeopt.evaluation.scoring import score
from moeopt.methods.layer_activations import Hook, LayerActivations
from moeopt.models import evaluation_mode, layerwise, lock_of, moe_layers, patched, routing_rules, without_plan
from moeopt.models.layerwise import Call, Layerwise, input_device
from moeopt.plan import Plan

if TYPE_CHECKING:
    from moeopt.tasks import Request

MEMORY = 1 << 30
"""Bytes for the hidden states between layers of the examples that are run at a time."""
ROWS = 64
"""Cells whose logits, and their derivatives, are in memory at a time."""
STEP = 0.05
"""By how much log-likelihoods are moved to find the loss's derivative by them, in nats."""

Observe = Callable[[LayerActivations, Tensor], None]
States = list[Tensor]


class LossGradients:
    """Runs the examples of an evaluator forth and back, under any plan that keeps experts as they are.

    Where losses are distances from the full model (kl, acceptance), which no first-order term can change there, the
    derivatives are those of minus the log-likelihood of tokens drawn from the model at every scored position: their
    squares estimate the curvature of the divergence (the Fisher information).

    Args:
        evaluator: model, task and examples, and what a loss is; ``"metric"`` has no derivative.
        memory: bytes for the hidden states between layers.

    Attributes:
        tokens: non-padding tokens that one run takes through the model.
        weight: once a run ended, the sum of the examples' weights; of distances, the scored positions.
    """

    def __init__(self, evaluator: Evaluator, *, memory: int = MEMORY) -> None:
        self.evaluator, self.model = evaluator, evaluator.model
        with lock_of(self.model), torch.inference_mode(), evaluation_mode(self.model), without_plan(self.model):
            self.layers, self.rules = moe_layers(self.model), routing_rules(self.model)
            self.parts: Layerwise = layerwise(self.model)
        config = self.model.config.get_text_config()
        token_bytes = len(self.parts.layers) * int(config.hidden_size) * hidden_dtype(self.model).itemsize
        self._chunks = list(self._chunked(max(1, memory // token_bytes)))
        self.tokens = sum(batch.tokens for _, batches in self._chunks for batch in batches)

    def _chunked(self, most: int) -> Iterator[tuple[Sequence[Request], list[Batch]]]:
        """The requests of a few whole examples at a time, `most` tokens or one example, and their batches."""
        by_example: dict[int, list[Request]] = {}
        for request in self.evaluator.requests:
            by_example.setdefault(request.example, []).append(request)
        chunk: list[Request] = []
        for requests in by_example.values():
            if chunk and sum(len(request.ids) for request in (*chunk, *requests)) > most:
                yield chunk, self._batches(chunk)
                chunk = []
            chunk += requests
        yield chunk, self._batches(chunk)

    def _batches(self, requests: Sequence[Request]) -> list[Batch]:
        return pack(requests, self.evaluator.batch_tokens, branching=self.evaluator.branching)

    def run(self, observe: Observe, plan: Plan | None = None) -> float:
        """Calls `observe` with what every MoE layer sees of every batch, and dL/dy, (tokens, hidden), y being what its
        experts give and L the weighted *sum* of the losses of all examples: last layer first for every few examples.

        Returns:
            The weighted mean loss under the plan; NaN for distances from the full model.
        """
        total = losses = 0.0
        self.weight = float("nan")
        self._draws = torch.Generator().manual_seed(0)
        with lock_of(self.model), torch.no_grad(), evaluation_mode(self.model), ExitStack() as stack:
            stack.enter_context(without_plan(self.model) if plan is None else patched(self.model, plan))
            for requests, batches in self._chunks:
                loss, weight = self._chunk(requests, batches, observe)
                losses, total = losses + loss, total + weight
        self.weight = total
        return losses / total

    def _chunk(self, requests: Sequence[Request], batches: list[Batch], observe: Observe) -> tuple[float, float]:
        device, dtype = input_device(self.model), hidden_dtype(self.model)
        begun = [self.parts.begin(batch.inputs(device, dtype)) for batch in batches]
        calls = [layer_calls for _, layer_calls in begun]
        entering: list[States] = [[hidden for hidden, _ in begun]]
        for i, layer in enumerate(self.parts.layers):
            with self.parts.loaded(i) as there:
                entering.append([batch_calls[i](layer, h, there) for batch_calls, h in zip(calls, entering[-1])])
        last = entering.pop()
        with self.parts.head_loaded():
            if self.evaluator.teacher is None:
                coefficients, loss, weight = self._coefficients(requests, *self._scored(len(requests), batches, last))
            else:
                coefficients, loss, weight = None, float("nan"), float(sum(len(batch.cells) for batch in batches))
            back = [self._from_head(batch, hidden, coefficients) for batch, hidden in zip(batches, last)]
        for i in reversed(range(len(self.parts.layers))):
            back = self._through(i, batches, calls, entering.pop(), back, observe)
        return loss, weight

    def _scored(
        self, requests: int, batches: list[Batch], last: States
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Log-likelihoods, and how many scored tokens are the model's first choice, both (requests,)."""
        sums, greedy = np.zeros(requests), np.zeros(requests, np.int64)
        for batch, hidden in zip(batches, last):
            likelihood, hits = score(batch, self._logits_of(batch, hidden))
            np.add.at(sums, batch.request.numpy(), likelihood.double().numpy())
            np.add.at(greedy, batch.request.numpy(), hits.numpy())
        return sums, greedy

    def _logits_of(self, batch: Batch, hidden: Tensor) -> Callable[[slice], Tensor]:
        scored = hidden.flatten(0, 1)[batch.cells.to(hidden.device)]
        return lambda part: self.parts.head(scored[part])

    def _coefficients(
        self, requests: Sequence[Request], sums: NDArray[np.float64], greedy: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], float, float]:
        """The derivative of the weighted sum of losses by each log-likelihood, (requests,), that sum, and the weights'.

        Central differences: an example's loss takes the log-likelihoods of its own options alone, so that one option of
        every example is moved at a time, and any task's own `reduce` serves.
        """

        def losses_at(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            scores = self.evaluator.scores_of(requests, values, greedy)
            return scores.losses.astype(np.float64), scores.weights.astype(np.float64)

        losses, weights = losses_at(sums)
        numbers = np.unique([request.example for request in requests], return_inverse=True)[1]
        order = np.zeros(len(requests), np.int64)  # the place of each request among those of its example
        for i in range(1, len(requests)):
            order[i] = order[i - 1] + 1 if numbers[i] == numbers[i - 1] else 0
        slopes = np.zeros(len(requests))
        for place in range(int(order.max()) + 1):
            moved = order == place
            up, down = (losses_at(sums + sign * STEP * moved)[0] for sign in (1, -1))
            slopes[moved] = ((up - down) * weights / (2 * STEP))[numbers[moved]]
        return slopes, float((losses * weights).sum()), float(weights.sum())

    def _from_head(self, batch: Batch, hidden: Tensor, coefficients: NDArray[np.float64] | None) -> Tensor:
        """dL/dh of the hidden states that left the last layer, (rows, width, hidden).

        Args:
            batch, hidden: what ran.
            coefficients: the loss's derivatives by the log-likelihoods, (requests,); None: of tokens that are drawn.
        """
        cells = batch.cells.to(hidden.device)
        scored = hidden.flatten(0, 1)[cells]
        gradient = torch.zeros_like(scored, dtype=torch.float32)
        for first in range(0, len(cells), ROWS):  # logits of all cells at once would be cells x vocabulary
            with torch.enable_grad():
                piece = scored[first : first + ROWS].detach().requires_grad_()
                likelihood = self.parts.head(piece).log_softmax(1, dtype=torch.float32)
                if coefficients is None:
                    row = torch.arange(len(piece))
                    target = likelihood.detach().exp().cpu().multinomial(1, generator=self._draws)[:, 0]
                    weights = torch.full((len(piece),), -1.0)
                else:
                    mine = (batch.cell >= first) & (batch.cell < first + ROWS)
                    row, target = batch.cell[mine] - first, batch.target[mine]
                    weights = torch.from_numpy(coefficients)[batch.request[mine]].float()
                row, target, weights = (t.to(likelihood.device) for t in (row, target, weights))
                (slope,) = torch.autograd.grad((weights * likelihood[row, target]).sum(), piece)
            gradient[first : first + ROWS] = slope
        whole = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        whole.flatten(0, 1)[cells] = gradient.to(hidden.dtype)
        return whole

    def _through(
        self, i: int, batches: list[Batch], calls: list[list[Call]], entering: States, back: States, observe: Observe
    ) -> States:
        """dL/dh of the hidden states that enter decoder layer `i`, from those that leave it."""
        moe = [layer for layer, place in zip(self.layers, self.parts.moe) if place == i]
        current: list[Any] = []
        outputs: list[Tensor] = []
        acts: list[LayerActivations] = []
        left: States = []
        # `outputs` are of the graph: autograd gives dL/dy beside dL/dh, and is asked for no weight's gradient
        hooks = [Hook(layer, self.rules[layer.index], acts.append, current) for layer in moe]

        def note(_module: Any, _args: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():  # not the experts that `observe` asks for
                outputs.append(output)

        with ExitStack() as stack:
            there = stack.enter_context(self.parts.loaded(i))
            for hook in hooks:
                stack.callback(hook.layer.experts.register_forward_hook(note).remove)
                hook.attach(stack)
            for batch, batch_calls, hidden, gradient in zip(batches, calls, entering, back):
                current[:] = [_Real(batch)]
                with torch.enable_grad():
                    start = hidden.detach().requires_grad_()
                    output = batch_calls[i](self.parts.layers[i], start, there)
                    grads = torch.autograd.grad(output, [start, *outputs], gradient.to(output.device))
                left.append(grads[0])
                real = batch.mask.bool().flatten()
                for what, slope in zip(acts, grads[1:]):
                    observe(what.detached(), slope.reshape(-1, slope.shape[-1])[real.to(slope.device)])
                outputs.clear()
                acts.clear()
        return left


class _Real:
    """What a `Hook` asks of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.mask = batch.mask
        self.sequence = batch.mask.nonzero()[:, 0]
