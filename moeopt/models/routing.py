"""How a router turns logits into expert weights, learnt by probing it, and how a plan changes that."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeopt.errors import ModelError
from moeopt.models.layers import MoELayer, gate_weight, materialised
from moeopt.plan import LayerPlan

ScoringFunction = Literal["softmax", "selected", "sigmoid"]
EPSILONS = (1e-20, 1e-6)  # the first is too small to show, except where it keeps 0 / 0 from arising
PROBE_TOKENS = 256


@dataclass(frozen=True)
class RoutingRule:
    """A router as a function: hidden states -> logits -> scores -> top-k -> weights.

    Args:
        weight: name of the router's (n, hidden) weight.
        bias: name of the (n,) tensor added to the logits, if there is one.
        float32_logits: whether the logits are computed in float32, whatever the dtype of the hidden states.
        correction: name of the (n,) tensor added to the scores for the choice of experts only (DeepSeek-V3), if any.
        score: ``"softmax"`` or ``"sigmoid"`` of all logits, or ``"selected"``: softmax of the top-k logits only.
        float32_scores: whether scores are computed in float32 rather than in the dtype of the logits.
        renormalise: whether the top-k scores are divided by their sum (plus `epsilon`).
        epsilon: added to that sum.
        scale: constant factor of the weights.
        ordered: whether the experts of a token come in decreasing order of score.
    """

    weight: str
    bias: str | None
    float32_logits: bool
    correction: str | None
    score: ScoringFunction
    float32_scores: bool
    renormalise: bool
    epsilon: float
    scale: float
    ordered: bool

    @property
    def normalised(self) -> bool:
        """Whether the weights of a token sum to `scale`."""
        return self.renormalise or self.score == "selected"

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(tokens, hidden) by (m, hidden) -> (tokens, m)."""
        if self.float32_logits:
            return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        return F.linear(hidden.to(weight.dtype), weight, bias)

    def scores(self, logits: Tensor) -> Tensor:
        """(tokens, m) logits -> (tokens, m) scores; for ``"selected"``, the softmax of all logits."""
        logits = logits.float() if self.float32_scores else logits
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)

    def select(self, logits: Tensor, k: int, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(tokens, m) logits -> weights and expert numbers, both (tokens, k), by the stock rule."""
        if self.score == "selected":
            logits = logits.float() if self.float32_scores else logits
            top, index = logits.topk(k, dim=-1, sorted=self.ordered)
            top = top.softmax(-1)
        elif correction is None:
            top, index = self.scores(logits).topk(k, dim=-1, sorted=self.ordered)
        else:
            scores = self.scores(logits)
            index = (scores + correction).topk(k, dim=-1, sorted=self.ordered).indices
            top = scores.gather(-1, index)
        if self.renormalise:
            top = top / (top.sum(-1, keepdim=True) + self.epsilon)
        return top * self.scale, index


def learn_rule(layer: MoELayer, likely: RoutingRule | None = None) -> RoutingRule:
    """The rule that reproduces the layer's router bit for bit on seeded random hidden states of several scales.

    Args:
        layer: whose router is called once, on a few hundred tokens.
        likely: a rule to try first, such as that of the layer before.

    Raises:
        ModelError: when no rule known to moeopt reproduces the router.
    """
    probe = _Probe.run(layer)
    if likely is not None and probe.reproduced_by(likely):
        return likely
    # Which tensor is the bias, and in what dtype logits are, shows in the logits alone; what is made of them is tried
    # only for what reproduces these.
    for wide, bias in itertools.product((False, True), probe.vectors("bias")):
        logits_only = RoutingRule(probe.weight, bias, wide, None, "softmax", True, False, 0.0, 1.0, True)
        if not probe.same_logits(logits_only):
            continue
        both, corrections = (True, False), probe.vectors("correction")
        for score, renormalise, float32, epsilon, ordered, correction in itertools.product(
            get_args(ScoringFunction), both, both, EPSILONS, both, corrections
        ):
            rule = RoutingRule(probe.weight, bias, wide, correction, score, float32, renormalise, epsilon, 1.0, ordered)
            rule = replace(rule, scale=probe.scale(rule))  # the one number that is no choice: read off the weights
            if probe.reproduced_by(rule):
                return rule
    raise ModelError(
        f"{layer.name}: moeopt does not know the routing rule of {type(layer.router).__name__}: softmax or sigmoid, "
        "renormalised or not, scaled or not, none reproduces the weights that it returns for random hidden states"
    )


@dataclass(frozen=True)
class _Probe:
    """What a router returned for seeded random hidden states, and the tensors it may have used."""

    weight: str
    tensors: Mapping[str, Tensor]
    hidden: Tensor
    output: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def run(cls, layer: MoELayer) -> _Probe:
        name = gate_weight(layer.router, layer.n)[0]
        candidates = [*layer.router.named_parameters(), *layer.router.named_buffers()]
        names = [name, *(other for other, t in candidates if t.numel() == layer.n and other != name)]
        hidden = probe_tokens(layer, PROBE_TOKENS)
        with torch.no_grad():  # `forward`, so that no hook takes part; a copy, as a router may work in place
            output = layer.router.forward(hidden.clone())
        device = output[0].device
        tensors = {other: materialised(layer.router, other).to(device) for other in names}
        return cls(name, tensors, hidden.to(device), output)

    def vectors(self, kind: Literal["bias", "correction"]) -> list[str | None]:
        nonzero = [name for name, t in self.tensors.items() if name != self.weight and bool(t.any())]
        return [*(name for name in nonzero if (name.rpartition(".")[2] == "bias") == (kind == "bias")), None]

    def logits(self, rule: RoutingRule) -> Tensor:
        bias = None if rule.bias is None else self.tensors[rule.bias]
        return rule.logits(self.hidden, self.tensors[rule.weight], bias)

    def select(self, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        correction = None if rule.correction is None else self.tensors[rule.correction].reshape(-1)
        return rule.select(self.output[0], self.output[1].shape[-1], correction)

    @torch.no_grad()
    def same_logits(self, rule: RoutingRule) -> bool:
        return torch.equal(self.logits(rule).to(self.output[0].dtype), self.output[0])

    @torch.no_grad()
    def scale(self, rule: RoutingRule) -> float:
        ratio = (self.output[1].double().sum() / self.select(rule)[0].double().sum()).item()
        return float(f"{ratio:.4g}") if abs(ratio - 1) > 0.01 else 1.0

    @torch.no_grad()
    def reproduced_by(self, rule: RoutingRule) -> bool:
        if {rule.weight, rule.bias, rule.correction} - {None} - set(self.tensors) or not self.same_logits(rule):
            return False
        weights, index = self.select(rule)
        return torch.equal(index, self.output[2]) and torch.equal(weights.to(self.output[1].dtype), self.output[1])


def probe_tokens(layer: MoELayer, tokens: int) -> Tensor:
    """(tokens, hidden) seeded random hidden states in the layer's dtype, of scales from 1/32 to 2."""
    hidden = torch.randn(tokens, layer.hidden, generator=torch.Generator().manual_seed(layer.index))
    # of small ones all scores are alike, of large ones one outweighs all: epsilons, dtypes and ties show in either
    hidden *= torch.logspace(-5, 1, tokens, base=2.0)[:, None]
    parameter = gate_weight(layer.router, layer.n)[1]
    return hidden.to("cpu" if parameter.is_meta else parameter.device, layer.dtype)


class MappedRouter:
    """A forward hook that makes a layer's router choose among the plan's experts.

    The router's logits, (tokens, n), are returned as they are. Weights and expert numbers are those of `plan`: numbers
    of the *original* experts where the plan keeps experts, 0..r-1 where it makes them, and its novices' then r..n-1.

    Attributes:
        calls: how often the hook ran.
    """

    def __init__(self, layer: MoELayer, rule: RoutingRule, plan: LayerPlan, *, renumber: bool | None = None) -> None:
        self.rule, self.plan = rule, plan
        self.calls = 0
        self._zero: Tensor | None = None
        self._active: Tensor | None = None
        self._tokens = 0
        self._tensors: dict[str, Tensor] = {}
        rows, whole = plan.router_rows, plan.picks_among_all
        if rule.correction is not None and not whole and (plan.router == "prob" or rows is None):
            raise ModelError(
                f"{layer.name}: {type(layer.router).__name__} corrects its choice of experts by a bias; a mapping of "
                f'probabilities or logits (router="{plan.router}") does not say how: keep experts with router="rows"'
            )
        self._tensors |= _numbers(plan, not plan.makes_experts if renumber is None else renumber)
        if plan.router == "prob":
            self._tensors["w_rm"] = torch.from_numpy(plan.router_matrix.copy())
            return
        for role, name in (("weight", rule.weight), ("bias", rule.bias), ("correction", rule.correction)):
            if name is None:
                continue
            source = materialised(layer.router, name)
            source = source.reshape(-1) if role != "weight" else source
            if whole:
                self._tensors[role] = source
            elif rows is not None:
                self._tensors[role] = source[list(rows)]
            else:
                matrix = torch.from_numpy(plan.router_matrix.copy()).to(source.device)
                self._tensors[role] = (matrix @ source.float()).to(source.dtype)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        logits, weights, _ = output
        if self.plan.router == "prob":
            top, index = self._by_probability(logits)
        else:
            hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
            hidden = hidden.reshape(-1, hidden.shape[-1]).to(logits.device)
            weight, bias, correction = (self._on(logits.device, role) for role in ("weight", "bias", "correction"))
            assert weight is not None
            mapped = self.rule.logits(hidden, weight, bias).to(logits.dtype)
            whole, index = self.rule.select(mapped, self.plan.k, correction)
            top = self._without_skipped(whole, index)
            if self.plan.skip and self.rule.normalised:
                # to the sum that they had, not to 1: `scale` and `epsilon` are in it
                rest = top.sum(-1, keepdim=True)
                top = top * (whole.sum(-1, keepdim=True) / rest.masked_fill(rest == 0, 1.0))
        numbers = self._on(logits.device, "numbers")
        return logits, top.to(weights.dtype), index if numbers is None else numbers[index]

    def _without_skipped(self, top: Tensor, index: Tensor) -> Tensor:
        """Scores or weights (tokens, k) of those picked, with those below beta times the largest made 0.

        Counts the experts that run, where these are not k for every token: neither skipped nor replaced by novices.
        """
        runs = self._on(index.device, "runs")
        if not self.plan.skip and runs is None:
            return top
        largest = top.amax(-1, keepdim=True)
        remaining = top.masked_fill((top < self.plan.skip * largest) & (top < largest), 0.0)
        active = ((remaining != 0) if runs is None else (remaining != 0) & runs[index]).sum()
        self._active = active if self._active is None else self._active + active
        self._tokens += len(top)
        return remaining

    def _by_probability(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w_rm = self._on(logits.device, "w_rm")
        assert w_rm is not None
        mapped = self.rule.scores(logits).float() @ w_rm.T
        clamp = self.plan.negative == "clamp"
        top, index = (mapped.clamp(min=0) if clamp else mapped).topk(self.plan.k, dim=-1, sorted=self.rule.ordered)
        top = self._without_skipped(top, index)
        total = top.sum(-1, keepdim=True)
        if clamp:
            # counted on the device: a Python number here would make a GPU wait in every layer
            empty = total == 0
            self._zero = empty.sum() if self._zero is None else self._zero + empty.sum()
            total = total.masked_fill(empty, 1.0)
        return (top / total if self.rule.normalised else top) * self.rule.scale, index

    def _on(self, device: torch.device, role: str) -> Tensor | None:
        tensor = self._tensors.get(role)
        if tensor is not None and tensor.device != device:
            tensor = self._tensors[role] = tensor.to(device)
        return tensor

    @property
    def active(self) -> float:
        """Mean number of experts run per token so far, k without skipping and novices."""
        return self.plan.k if self._active is None else int(self._active) / self._tokens

    @property
    def zero_tokens(self) -> int:
        """Tokens so far whose k largest mapped probabilities were all 0, so that the layer added nothing."""
        return 0 if self._zero is None else int(self._zero)


def _numbers(plan: LayerPlan, original: bool) -> dict[str, Tensor]:
    """What tells the experts that the planned router picks from one another.

    Args:
        plan: of the layer.
        original: whether they have the numbers of the full model's experts.

    Returns:
        "numbers", (r,) or (n,), of what is picked, unless they are those of the picks; "runs", bool (n,), which of what
        is picked are experts, where not all are.
    """
    if plan.novices is not None:
        places = torch.tensor(plan.places)
        runs = {"runs": places < plan.kept_experts}
        return runs if original else {**runs, "numbers": places}
    originals = torch.tensor(plan.kept) if original else None
    if plan.aliases is None:
        return {} if originals is None else {"numbers": originals}
    aliases = torch.tensor(plan.aliases)
    return {"numbers": aliases if originals is None else originals[aliases]}
