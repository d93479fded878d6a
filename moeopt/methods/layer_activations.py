"""What an MoE layer sees of a batch, and the hooks that put it together while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.errors import MethodError
from moeopt.methods.sequences import Batch
from moeopt.models import MoELayer, RoutingRule, routing_tensor

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """What one MoE layer saw of one batch; padding is left out.

    Args:
        layer, rule: the layer and how it routes.
        hidden: hidden states that enter its experts, (tokens, hidden).
        logits: its router's, (tokens, n).
        gates, index: weights and numbers of the k experts it picks, (tokens, k); without the router's factors of
            experts, which count as theirs: `outputs` have them.
        routed: what its experts gave, weighted and summed, (tokens, hidden).
        sequence: which sequence each token belongs to, int64 (tokens,).
        every: `outputs`, where they are known already.
        target: what the routed experts should have given, (tokens, hidden), where that is not `routed`.
        entered: `residual`, where it is known.
    """

    layer: MoELayer
    rule: RoutingRule
    hidden: Tensor
    logits: Tensor
    gates: Tensor
    index: Tensor
    routed: Tensor
    sequence: Tensor
    every: Tensor | None = None
    target: Tensor | None = None
    entered: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """The hidden states that the norm before the block took, to which the block's output is added.

        (tokens, hidden).

        Raises:
            MethodError: when what enters the block is not what a norm beside it gave.
        """
        if self.entered is None:
            raise MethodError(
                f"{self.layer.name}: what enters {type(self.layer.block).__name__} is not what a norm beside it gave, "
                "so that the hidden states before it are not known; use another method"
            )
        return self.entered

    @cached_property
    def probabilities(self) -> Tensor:
        """The router's scores of all n experts, float32 (tokens, n)."""
        return self.rule.scores(self.logits).float()

    @cached_property
    def picks(self) -> tuple[Tensor, Tensor]:
        """Gates g, float32, largest first, and numbers of the experts picked, both (tokens, k).

        The router's own weights, which sum to 1 only where it renormalises, as REAP's code takes them.
        """
        if self.rule.score == "sparsemixer":
            gates, order = self.gates.float().sort(dim=-1, descending=True)
            return gates, self.index.gather(1, order)
        top, order = self.probabilities.gather(1, self.index).sort(dim=-1, descending=True)
        return self.gated(top), self.index.gather(1, order)

    def chosen(self, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Which experts would run, and with what weights, if the layer had none but those kept, with their logits.

        Args:
            kept: sets of experts, bool (sets, n).
            k: how many of them run.

        Returns:
            Numbers, int64, and weights, float32, both (tokens, sets, k).
        """
        if self.rule.score == "sparsemixer":
            weights, index = self.rule.select(self.logits[:, None, :].masked_fill(~kept, -torch.inf), k)
            return index, weights.float()
        p = self.probabilities[:, None, :].masked_fill(~kept, 0.0)
        if self.rule.score != "sigmoid":
            p = p / p.sum(-1, keepdim=True).clamp_min(TINY)
        choice = (p if self.correction is None else p + self.correction).masked_fill(~kept, -torch.inf)
        ranked, index = self.rule.limited(choice, outside=-torch.inf).topk(k, dim=-1)
        # where the groups that a token chooses have fewer left than run
        scores = p.gather(-1, index).masked_fill(ranked == -torch.inf, 0.0)
        return index, self.gated(scores)

    def gated(self, scores: Tensor) -> Tensor:
        """The weights that the layer makes of the scores of the experts that run, (..., k)."""
        if self.rule.normalised:
            scores = scores / self._divisor(scores.sum(-1, keepdim=True))
        return scores * self.rule.scale

    def factor(self, total: Tensor) -> Tensor:
        """What `gated` multiplies scores with that sum to `total`, of any shape.

        Raises:
            MethodError: where weights are not made of scores alone.
        """
        if self.rule.score == "sparsemixer":
            raise MethodError(
                f"{self.layer.name} weighs its picks by the logits near the largest (sparsemixer), which methods that "
                "weigh kept sets do not know; use frequency, reap or ean"
            )
        if not self.rule.normalised:
            return torch.full_like(total, self.rule.scale)
        return self.rule.scale / self._divisor(total)

    def _divisor(self, total: Tensor) -> Tensor:
        return (total + self.rule.epsilon).clamp_min(TINY)

    @property
    def depends_on_set(self) -> bool:
        """Whether what is kept changes the weights, or the order of choice, of experts that run in any case."""
        softmax = self.rule.score != "sigmoid"
        return self.rule.groups > 1 or (softmax and (self.correction is not None or not self.rule.normalised))

    @cached_property
    def full_weights(self) -> Tensor:
        """Weights of the layer as it is, float32 (tokens, n), 0 for experts that do not run."""
        everything = torch.ones(1, self.layer.n, dtype=torch.bool, device=self.logits.device)
        index, weights = self.chosen(everything, self.layer.k)
        return torch.zeros_like(self.probabilities).scatter(-1, index[:, 0], weights[:, 0])

    @cached_property
    def correction(self) -> Tensor | None:
        """What the router adds to its scores for the choice of experts only, (n,)."""
        name = self.rule.correction
        return None if name is None else routing_tensor(self.layer, name).reshape(-1).to(self.logits.device)

    @cached_property
    def outputs(self) -> Tensor:
        """Every expert's output without its gate, for every token: (n, tokens, hidden), in the model's dtype."""
        if self.every is not None:
            return self.every
        return torch.stack([self._output(j, slice(None)) for j in range(self.layer.n)])

    def detached(self) -> LayerActivations:
        """The same apart from the graph that gave it."""
        names = ("hidden", "logits", "gates", "routed")
        return replace(self, **{name: getattr(self, name).detach() for name in names})

    def without_states(self, tokens: slice = slice(None)) -> LayerActivations:
        """The same without hidden states: what routing needs; of some of the tokens."""
        nothing = self.hidden.new_empty(0, self.hidden.shape[1])  # not a view, which would hold the whole
        thinned = {name: getattr(self, name)[tokens] for name in ("logits", "gates", "index", "sequence")}
        if tokens.step not in (None, 1):
            thinned = {name: tensor.clone() for name, tensor in thinned.items()}
        return replace(self, hidden=nothing, routed=nothing, every=None, target=None, entered=None, **thinned)

    def output(self, expert: int, tokens: Tensor | slice) -> Tensor:
        """One expert's output without its gate, (tokens, hidden)."""
        computed = self.every is not None or "outputs" in self.__dict__
        return self.outputs[expert][tokens] if computed else self._output(expert, tokens)

    def _output(self, expert: int, tokens: Tensor | slice) -> Tensor:
        hidden = self.hidden[tokens]
        number = torch.full((len(hidden), 1), expert, device=hidden.device)
        output: Tensor = self.layer.experts(hidden, number, torch.ones_like(number, dtype=torch.float32))
        factors = factors_of(self.layer, self.rule)
        return output if factors is None else _scaled(output, factors[expert])


def factors_of(layer: MoELayer, rule: RoutingRule) -> Tensor | None:
    """What the router multiplies the weights of each expert with, (n,), if it does."""
    device = layer.experts.down_proj.device if isinstance(layer.experts.down_proj, Tensor) else None
    return None if rule.factor is None else routing_tensor(layer, rule.factor).to(device)


def _scaled(outputs: Tensor, factors: Tensor) -> Tensor:
    return (outputs.float() * factors.float()).to(outputs.dtype)


Observe = Callable[[LayerActivations], None]
"""Called with what a layer saw of a batch."""


class Hook:
    """Forward hooks of one MoE layer's router, experts and block that put together a `LayerActivations`."""

    def __init__(self, layer: MoELayer, rule: RoutingRule, observe: Observe, current: list[Batch]) -> None:
        self.layer, self.rule, self.observe, self.current = layer, rule, observe, current
        self.factors = factors_of(layer, rule)
        self._tensors: dict[str, Tensor] = {}
        self.busy = False  # while `observe` runs experts again, which must not be noted
        self._norms: list[tuple[Tensor, Tensor]] = []

    def attach(self, stack: ExitStack, siblings: Iterable[nn.Module] = ()) -> None:
        """Hang them on the layer until the stack closes; `siblings` are modules beside its block."""
        layer = self.layer
        places = [(layer.router, self.router), (layer.experts, self.experts), (layer.block, self.block)]
        for module, note in [*places, *((sibling, self.sibling) for sibling in siblings)]:
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        stack.callback(layer.block.register_forward_pre_hook(self.entering, with_kwargs=True).remove)

    def sibling(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Of modules beside the block: what one took and gave, of which the norm before the block is told."""
        taken = args[0] if args else kwargs.get("hidden_states")
        if isinstance(taken, Tensor) and isinstance(output, Tensor) and not self.busy:
            self._norms.append((taken, output))

    def entering(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block runs."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        # The norm before the block is the sibling that gave the very tensor that enters it. What it took is the
        # residual stream, which no module of its own passes through.
        taken = [taken for taken, given in self._norms if given is hidden and taken.shape == given.shape]
        self._norms.clear()
        if taken:
            self._tensors["entered"] = taken[-1].reshape(-1, taken[-1].shape[-1])

    def router(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        self._tensors |= {
            "hidden": hidden.reshape(-1, hidden.shape[-1]),
            "logits": self.rule.logits_of(output[0]),
            "gates": output[1] if self.factors is None else output[1] / self.factors[output[2]],
            "index": output[2],
        }

    def experts(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.busy:
            entered: Tensor = args[0] if args else kwargs["hidden_states"]
            self._tensors |= {
                "hidden": entered.reshape(-1, entered.shape[-1]),
                "routed": output.reshape(-1, output.shape[-1]),
            }

    def run(
        self, forward: Any, experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """What the experts give, made of every expert's output, which is kept.

        Each expert runs once for all tokens, as their only pick, at weight 1.
        """
        if self.busy:
            given: Tensor = forward(experts, hidden_states, top_k_index, top_k_weights)
            return given
        ones = torch.ones(len(hidden_states), 1, device=hidden_states.device, dtype=top_k_weights.dtype)
        every = torch.stack(
            [forward(experts, hidden_states, torch.full_like(top_k_index[:, :1], j), ones) for j in range(self.layer.n)]
        )
        self._tensors["every"] = every if self.factors is None else _scaled(every, self.factors[:, None, None])
        tokens = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
        weighted = every[top_k_index, tokens].float() * top_k_weights[..., None].float()
        return weighted.sum(1).to(hidden_states.dtype)

    def block(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = self.current[0]
        tensors, self._tensors = self._tensors, {}
        every, real = tensors.pop("every", None), batch.mask.bool().flatten()
        if not real.all():
            tensors = {name: t[real.to(t.device)] for name, t in tensors.items()}
            every = None if every is None else every[:, real.to(every.device)]
        if not (tensors["routed"] if every is None else every).isfinite().all():
            raise MethodError(
                f"{self.layer.name}: what its experts give is not finite in {tensors['routed'].dtype}; load the model "
                "in another dtype, such as bfloat16 or float32"
            )
        self.busy = True
        try:
            self.observe(LayerActivations(self.layer, self.rule, sequence=batch.sequence, every=every, **tensors))
        finally:
            self.busy = False
