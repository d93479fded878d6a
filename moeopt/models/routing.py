"""How a router turns logits into expert weights, learnt by probing it, and how a plan changes that."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeopt.errors import ModelError, PlanError
from moeopt.models import rounding
from moeopt.models.layers import OF_BLOCK, MoELayer, as_picks, call_router, gate_weight, given_tensors, routing_tensor
from moeopt.models.merging import merge
from moeopt.plan import LayerPlan

ScoringFunction = Literal["softmax", "selected", "sigmoid", "sparsemixer"]
GroupScore = Literal["max", "top2"]
EPSILONS = (1e-20, 1e-6)  # the first is too small to show, except where it keeps 0 / 0 from arising
PROBE_TOKENS = 256


@dataclass(frozen=True)
class RoutingRule:
    """A router as a function: hidden states -> logits -> scores -> top-k -> weights.

    A plan's r new experts are routed by the same rule, with what W_RM, (r, n), makes of the n experts' numbers:

    * ``router="rows"``: r of the rows of the weight, of the bias, of the correction and of the factors;
    * ``router="logit"``: logits by W_RM @ weight and W_RM @ bias, and the correction W_RM @ correction;
    * ``router="prob"``: scores W_RM s, of which weights are made, and the correction W_RM @ correction, which is added
      to them for the choice alone. With either, factors are W_RM @ factors.

    Where the choice is limited to groups, new expert i is in group ``i // (r / groups)``.

    Args:
        weight: name of the router's (n, hidden) weight.
        bias: name of the (n,) tensor added to the logits, if there is one.
        float32_logits: whether the logits are computed in float32, whatever the dtype of the hidden states.
        correction: name of the (n,) tensor added to the scores for the choice of experts only (DeepSeek-V3), if any; of
            one of the block, which gives it to its router (MiniMax-M2), behind ``"../"``.
        score: ``"softmax"`` or ``"sigmoid"`` of all logits, or ``"selected"``: softmax of the top-k logits only.
            ``"sparsemixer"`` (Phi-3.5-MoE, arXiv 2409.12136) weighs each pick by the softmax of the logits that are
            left and not below the largest of these by more than twice `jitter` of it.
        float32_scores: whether scores are computed in float32 rather than in the dtype of the logits.
        renormalise: whether the top-k scores are divided by their sum (plus `epsilon`).
        epsilon: added to that sum.
        scale: constant factor of the weights.
        ordered: whether the experts of a token come in decreasing order of score.
        groups: in how many groups of equally many consecutive experts a token chooses first; 1: there are none.
        kept_groups: how many of them it chooses.
        group_score: of corrected scores, ``"max"`` (DeepSeek-V2) or the sum of the two largest, ``"top2"`` (V3).
        zero_outside: what the scores of the other groups' experts become for the choice, 0 or minus infinity.
            With ``"max"`` weights are made of these scores, too.
        prepared: whether logits are of what the router makes of the hidden states first (Gemma 4: a norm, a scale):
            what enters the module that holds the weight.
        returns_scores: whether the first thing that the router returns are scores, not logits.
        multiplier: constant factor of the logits (Muse Spark).
        jitter: of ``"sparsemixer"``.
        factor: name of the (n,) tensor that the weights are multiplied with at last (Gemma 4), if there is one.
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
    groups: int = 1
    kept_groups: int = 1
    group_score: GroupScore = "top2"
    zero_outside: bool = False
    prepared: bool = False
    returns_scores: bool = False
    factor: str | None = None
    multiplier: float = 1.0
    jitter: float = 0.0

    @property
    def normalised(self) -> bool:
        """Whether the weights of a token sum to `scale`."""
        return self.renormalise or self.score == "selected"

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(tokens, hidden) by (m, hidden) -> (tokens, m)."""
        if self.float32_logits:
            logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        else:
            logits = F.linear(hidden.to(weight.dtype), weight, bias)
        return logits if self.multiplier == 1 else logits * self.multiplier

    def scores(self, logits: Tensor) -> Tensor:
        """(tokens, m) logits -> (tokens, m) scores; for ``"selected"``, the softmax of all logits."""
        logits = logits.float() if self.float32_scores else logits
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)

    def scores_of(self, returned: Tensor) -> Tensor:
        """The scores, (tokens, n), that the first thing a router returns stands for."""
        return returned if self.returns_scores else self.scores(returned)

    def logits_of(self, returned: Tensor) -> Tensor:
        """The logits, (tokens, n), that it stands for; of scores those whose softmax they are."""
        return returned.clamp_min(torch.finfo(returned.dtype).tiny).log() if self.returns_scores else returned

    def select(self, logits: Tensor, k: int, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(tokens, m) logits -> weights and expert numbers, both (tokens, k), by the stock rule."""
        if self.score == "selected":
            logits = logits.float() if self.float32_scores else logits
            top, index = logits.topk(k, dim=-1, sorted=self.ordered)
            top = top.softmax(-1)
        elif self.score == "sparsemixer":
            top, index = self._sparsely_mixed(logits, k)
        else:
            top, index = self.choose(self.scores(logits), k, correction)
        if self.renormalise:
            top = top / (top.sum(-1, keepdim=True) + self.epsilon)
        return top * self.scale, index

    def _sparsely_mixed(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        left, picks = logits, []
        for _ in range(k):
            largest, index = left.max(-1, keepdim=True)
            far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * self.jitter
            picks.append((left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index), index))
            left = left.scatter(-1, index, -torch.inf)
        weights, numbers = zip(*picks)
        return torch.cat(weights, -1), torch.cat(numbers, -1)

    def choose(self, scores: Tensor, k: int, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k experts that a token gets of m: their scores, and their numbers, both (..., k).

        Args:
            scores: (..., m); m is r or n.
            k: how many.
            correction: (m,), added to the scores for the choice.
        """
        choice = self.limited(scores if correction is None else scores + correction)
        if correction is None and (self.groups == 1 or self.group_score == "max"):
            return choice.topk(k, dim=-1, sorted=self.ordered)  # type: ignore[return-value]
        index = choice.topk(k, dim=-1, sorted=self.ordered).indices
        return scores.gather(-1, index), index

    def limited(self, choice: Tensor, outside: float | None = None) -> Tensor:
        """Corrected scores, (..., m), with those of experts outside of a token's groups made 0, -inf or `outside`."""
        if self.groups == 1:
            return choice
        grouped = choice.unflatten(-1, (self.groups, -1))
        if self.group_score == "max":
            best = grouped.amax(-1)
        else:
            first, second = grouped.topk(2, dim=-1).values.unbind(-1)
            best = first + second.masked_fill(second == -torch.inf, 0.0)  # -inf: of sets with one expert of a group
        index = best.topk(self.kept_groups, dim=-1, sorted=False).indices
        inside = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, index, True)
        if outside is None:
            outside = 0.0 if self.zero_outside else -torch.inf
        limited: Tensor = grouped.masked_fill(~inside[..., None], outside).flatten(-2)
        return limited

    def fewest(self, k: int) -> int:
        """How many experts must be kept at least for k of them to run."""
        if self.groups == 1:
            return k
        return max(-(-k // self.kept_groups), self._ranked_by) * self.groups

    @property
    def _ranked_by(self) -> int:
        """How many experts of a group its rank among the groups is made of."""
        return 2 if self.group_score == "top2" else 1

    def check(self, plan: LayerPlan, name: str) -> None:
        """Raise PlanError unless a layer's plan leaves the groups that tokens choose first what they need.

        Each has as many of the new experts, of rows of its own where rows are selected. `name` is the layer's.
        """
        if self.score == "sparsemixer" and plan.router == "prob":
            raise PlanError(
                f"{name} weighs its picks by the logits that are near the largest (sparsemixer), which mapped "
                'probabilities do not tell: search with router="logit" or "rows"'
            )
        if self.groups == 1 or plan.picks_among_all:
            return
        r, size, groups = plan.kept_experts, plan.experts // self.groups, self.groups
        to_run, to_rank, least = -(-plan.k // self.kept_groups), self._ranked_by, self.fewest(plan.k)
        where = f"{name} chooses {self.kept_groups} of {groups} groups of {size} experts first"
        if r % groups or r < least:
            near = sorted({max(least, r // groups * groups), max(least, -(-r // groups) * groups)})
            why = f"to run k={plan.k}" if to_run > to_rank else "to be ranked"
            raise PlanError(
                f"{where}, so that each must keep as many, and {least // groups} at least {why}: r must be a multiple "
                f"of {groups}, such as {' or '.join(map(str, near))}, the plan has r={r}"
            )
        rows = plan.router_rows
        if rows is not None and any(row // size != i // (r // self.groups) for i, row in enumerate(rows)):
            counts = [sum(row // size == g for row in rows) for g in range(self.groups)]
            order = ", in the groups' order" if len(set(counts)) == 1 else ""
            raise PlanError(
                f"{where}: a plan must keep {r // self.groups} of each{order}, this one keeps {list(rows)}, "
                f"{' + '.join(map(str, counts))} of them"
            )


def learn_rule(layer: MoELayer, likely: RoutingRule | None = None, model: nn.Module | None = None) -> RoutingRule:
    """The rule that reproduces the layer's router bit for bit on seeded random hidden states of several scales.

    Where none does, one whose logits are the router's within rounding, and whose weights follow from the router's own
    logits bit for bit; that is noted of the model (`rounding`).

    Args:
        layer: whose router is called once, on a few hundred tokens.
        likely: a rule to try first, such as that of the layer before.
        model: the layer's.

    Raises:
        ModelError: when no rule known to moeopt reproduces the router.
    """
    exact = _Probe.run(layer)
    for probe in (exact, replace(exact, near=True)):
        rule = likely if likely is not None and probe.reproduced_by(likely) else _learnt(layer, probe)
        if rule is not None:
            if probe.near:
                rounding.note(layer.router if model is None else model, "what a router gives")
            return rule
    raise ModelError(
        f"{layer.name}: moeopt does not know the routing rule of {type(layer.router).__name__}: softmax or sigmoid, "
        "renormalised or not, scaled or not, none reproduces the weights that it returns for random hidden states"
    )


def _learnt(layer: MoELayer, probe: _Probe) -> RoutingRule | None:
    # Which tensor is the bias, and in what dtype logits are, shows in the logits alone; what is made of them is tried
    # only for what reproduces these.
    both = (True, False)
    for wide, bias, returns_scores, multiplier in itertools.product(
        (False, True), probe.vectors("bias"), (False, True), probe.multipliers
    ):
        logits_only = RoutingRule(probe.weight, bias, wide, None, "softmax", True, False, 0.0, 1.0, True)
        seen: dict[str, Any] = {"prepared": probe.prepared, "returns_scores": returns_scores, "multiplier": multiplier}
        logits_only = replace(logits_only, **seen)
        if not probe.same_logits(logits_only):
            continue
        seen["jitter"] = getattr(layer.router, "router_jitter_noise", 0.0)
        scoring = [s for s in get_args(ScoringFunction) if s != "sparsemixer" or seen["jitter"]]
        nothing: list[str | None] = [None]
        corrections, factors = probe.vectors("correction"), nothing
        if returns_scores:  # of the routers that do, one has factors, and none corrections
            corrections, factors = factors, corrections
        for score, renormalise, float32, epsilon, ordered, correction, factor, limits in itertools.product(
            scoring, both, both, EPSILONS, both, corrections, factors, _limits(layer)
        ):
            made = score, float32, renormalise, epsilon, 1.0, ordered, *limits
            rule = RoutingRule(probe.weight, bias, wide, correction, *made)
            rule = replace(rule, factor=factor, **seen)
            rule = replace(rule, scale=probe.scale(rule))  # the one number that is no choice: read off the weights
            if probe.reproduced_by(rule):
                return rule
    return None


def _limits(layer: MoELayer) -> list[tuple[Any, ...]]:
    """What `RoutingRule` may say of groups."""
    if layer.groups == 1:
        return [()]
    numbers = layer.groups, layer.kept_groups
    return [(*numbers, "max", True), (*numbers, "top2", False), (*numbers, "top2", True), ()]


@dataclass(frozen=True)
class _Probe:
    """What a router returned for seeded random hidden states, and the tensors it may have used."""

    weight: str
    tensors: Mapping[str, Tensor]
    hidden: Tensor
    output: tuple[Tensor, Tensor, Tensor]
    prepared: bool
    multipliers: tuple[float, ...]
    near: bool = False

    @classmethod
    def run(cls, layer: MoELayer) -> _Probe:
        name = gate_weight(layer.router, layer.n)[0]
        candidates = [*layer.router.named_parameters(), *layer.router.named_buffers()]
        candidates += [(f"{OF_BLOCK}{n}", getattr(layer.block, n)) for n in given_tensors(layer.block, layer.router)]
        names = [name, *(other for other, t in candidates if t.numel() == layer.n and other != name)]
        hidden = probe_tokens(layer, PROBE_TOKENS)
        entered: list[Tensor] = []
        holder = layer.router.get_submodule(name.rpartition(".")[0])
        note = holder.register_forward_pre_hook(lambda _, args: entered.append(args[0].reshape(-1, layer.hidden)))
        try:
            with torch.no_grad():  # `forward`, so that no hook takes part; a copy, as a router may work in place
                output = call_router(layer.block, layer.router, hidden.clone())
        finally:
            note.remove()
        output = as_picks(output, layer.k) if layer.weighs_inputs else output
        device = output[0].device
        tensors = {other: routing_tensor(layer, other).to(device) for other in names}
        hidden = hidden.to(device)
        prepared = bool(entered) and not torch.equal(entered[0].to(device, hidden.dtype), hidden)
        constants = (value for value in vars(layer.router).values() if isinstance(value, float) and value > 0)
        multipliers = tuple(dict.fromkeys((1.0, *constants)))
        return cls(name, tensors, entered[0].to(device) if prepared else hidden, output, prepared, multipliers)

    def vectors(self, kind: Literal["bias", "correction"]) -> list[str | None]:
        nonzero = [name for name, t in self.tensors.items() if name != self.weight and bool(t.any())]
        return [*(name for name in nonzero if (name.rpartition(".")[2] == "bias") == (kind == "bias")), None]

    def logits(self, rule: RoutingRule) -> Tensor:
        bias = None if rule.bias is None else self.tensors[rule.bias]
        return rule.logits(self.hidden, self.tensors[rule.weight], bias)

    def select(self, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        correction = None if rule.correction is None else self.tensors[rule.correction].reshape(-1)
        logits = self.logits(rule) if rule.returns_scores else self.output[0]
        weights, index = rule.select(logits, self.output[1].shape[-1], correction)
        return weights if rule.factor is None else weights * self.tensors[rule.factor][index], index

    @torch.no_grad()
    def same_logits(self, rule: RoutingRule) -> bool:
        logits = self.logits(rule)
        returned = rule.scores(logits) if rule.returns_scores else logits
        logits = returned.to(self.output[0].dtype)
        if self.near:
            return rounding.near([self.output[0]], [logits], self.hidden.shape[-1], steps=1)
        return torch.equal(logits, self.output[0])

    @torch.no_grad()
    def scale(self, rule: RoutingRule) -> float:
        ratio = (self.output[1].double().sum() / self.select(rule)[0].double().sum()).item()
        return float(f"{ratio:.4g}") if abs(ratio - 1) > 0.01 else 1.0

    @torch.no_grad()
    def reproduced_by(self, rule: RoutingRule) -> bool:
        named = {rule.weight, rule.bias, rule.correction, rule.factor} - {None}
        if named - set(self.tensors) or rule.prepared != self.prepared or not self.same_logits(rule):
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

    What is counted stays on the device, where it is read at the end: see `read_at_once`.

    Attributes:
        calls: how often the hook ran.
        ran: experts run so far, summed over tokens, int64 (); None where every token runs k: no skipping, no novices.
        tokens: how many tokens these are of.
        zero: tokens so far whose k largest mapped probabilities were all 0, so that the layer added nothing, int64 ();
            None where that cannot be.
    """

    def __init__(self, layer: MoELayer, rule: RoutingRule, plan: LayerPlan, *, renumber: bool | None = None) -> None:
        self.rule, self.plan = rule, plan
        self.calls = 0
        self.zero: Tensor | None = None
        self.ran: Tensor | None = None
        self.tokens = 0
        self._entered: Tensor | None = None
        self._tensors: dict[str, Tensor] = {}
        rows, whole = plan.router_rows, plan.picks_among_all
        original = not plan.makes_experts if renumber is None else renumber
        self._tensors |= _numbers(plan, original)
        self._weighs_inputs, self._k = layer.weighs_inputs, layer.k
        self._width = layer.n if original else plan.kept_experts
        matrix, maps_scores = torch.from_numpy(plan.router_matrix.copy()), plan.router == "prob"
        if maps_scores:
            self._tensors["w_rm"] = matrix
        roles = {"weight": rule.weight, "bias": rule.bias, "correction": rule.correction, "factor": rule.factor}
        for role, name in roles.items():
            if name is None or (maps_scores and role in ("weight", "bias")):
                continue
            source = routing_tensor(layer, name)
            source = source.reshape(-1) if role != "weight" else source
            if maps_scores:
                self._tensors[role] = matrix.to(source.device) @ source.float()
            elif whole:
                self._tensors[role] = source
            elif rows is not None:
                self._tensors[role] = source[torch.tensor(rows).to(source.device)]
            else:
                self._tensors[role] = merge(matrix, source)

    def attach(self, router: nn.Module) -> list[RemovableHandle]:
        """Hang it on the router."""
        handles = [router.register_forward_hook(self, with_kwargs=True)]
        if self.rule.prepared:
            holder = router.get_submodule(self.rule.weight.rpartition(".")[0])
            handles.append(holder.register_forward_pre_hook(self._note))
        return handles

    def _note(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered = args[0]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        self.calls += 1
        logits, weights, _ = as_picks(output, self._k) if self._weighs_inputs else output
        if self.plan.router == "prob":
            top, index = self._by_probability(logits)
        else:
            hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
            if self._entered is not None:
                hidden, self._entered = self._entered, None
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
        numbers, factor = (self._on(logits.device, role) for role in ("numbers", "factor"))
        top = top if factor is None else top * factor[index]
        top, index = top.to(weights.dtype), index if numbers is None else numbers[index]
        if self._weighs_inputs:
            return top.new_zeros(len(top), self._width).scatter_add(1, index, top), logits
        return logits, top, index

    def _without_skipped(self, top: Tensor, index: Tensor) -> Tensor:
        """Scores or weights (tokens, k) of those picked, with those below beta times the largest made 0.

        Counts the experts that run, where these are not k for every token: neither skipped nor replaced by novices.
        """
        runs = self._on(index.device, "runs")
        if not self.plan.skip and runs is None:
            return top
        largest = top.amax(-1, keepdim=True)
        remaining = top.masked_fill((top < self.plan.skip * largest) & (top < largest), 0.0)
        ran = ((remaining != 0) if runs is None else (remaining != 0) & runs[index]).sum()
        self.ran = ran if self.ran is None else self.ran + ran
        self.tokens += len(top)
        return remaining

    def _by_probability(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w_rm = self._on(logits.device, "w_rm")
        assert w_rm is not None
        mapped = self.rule.scores_of(logits).float() @ w_rm.T
        clamp = self.plan.negative == "clamp"
        correction = self._on(logits.device, "correction")
        top, index = self.rule.choose(mapped.clamp(min=0) if clamp else mapped, self.plan.k, correction)
        top = self._without_skipped(top, index)
        total = top.sum(-1, keepdim=True)
        if clamp:
            # counted on the device: a Python number here would make a GPU wait in every layer
            empty = total == 0
            self.zero = empty.sum() if self.zero is None else self.zero + empty.sum()
            total = total.masked_fill(empty, 1.0)
        return (top / total if self.rule.normalised else top) * self.rule.scale, index

    def _on(self, device: torch.device, role: str) -> Tensor | None:
        tensor = self._tensors.get(role)
        if tensor is not None and tensor.device != device:
            tensor = self._tensors[role] = tensor.to(device)
        return tensor


def read_at_once(counters: Mapping[int, Tensor | None]) -> dict[int, int]:
    """The numbers of counters (), without those that are None: one copy a device, as each makes a GPU wait."""
    read: dict[int, int] = {}
    tensors = {i: counter for i, counter in counters.items() if counter is not None}
    for device in {t.device for t in tensors.values()}:
        there = {i: t for i, t in tensors.items() if t.device == device}
        read |= dict(zip(there, torch.stack(list(there.values())).tolist()))
    return read


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
