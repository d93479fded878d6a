"""Projection: the nearest plan that a stock checkpoint expresses, and what it costs to go there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from moeopt.errors import PlanError
from moeopt.evaluation import Evaluator
from moeopt.methods import Calibration, LayerActivations
from moeopt.models import MergedCache, RoutingRule, patched
from moeopt.models.layerwise import input_device
from moeopt.plan import LayerPlan, Matrix, Plan, one_hot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.tasks import Task

TOKENS = 8192
"""Of each layer that a mapping is fitted to."""
FLOOR = 1e-4
"""Probabilities below it are taken for it where a logarithm is fitted."""
RIDGE = 1e-4
"""Weight of the squared distance from the starting point in the fit, so that separable tokens do not drive it off."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """What was projected, and at what cost on examples that the fit has not seen.

    Args:
        task, split, tokens: what the cost was measured on.
        r, k: of every layer now.
        how: what became of each layer.
        distance: for each layer, on the tokens fitted to, half the summed absolute difference of the weights that the
            experts of a token get, a mean between 0 and 1.
        loss_before, loss_after: the task's loss under the plan and its projection.
        kl: of next tokens, KL(plan ‖ projection) in nats, a mean over tokens.
        top_1: fraction of tokens behind which both find the same one likeliest.
        top_k: fraction of the experts that the plan runs that the projection runs too, for the same router logits.
    """

    task: str
    split: str
    tokens: int
    r: int
    k: int
    how: tuple[str, ...]
    distance: tuple[float, ...]
    loss_before: float
    loss_after: float
    kl: float
    top_1: float
    top_k: float

    def lines(self) -> list[str]:
        """The same for people."""
        kinds = {how: self.how.count(how) for how in dict.fromkeys(self.how)}
        return [
            f"projected to r = {self.r}, k = {self.k}: " + ", ".join(f"{n} layers {how}" for how, n in kinds.items()),
            f"on {self.task}, {self.split}, {self.tokens} tokens: loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
            f", KL {self.kl:.4f} nats, the same likeliest token {100 * self.top_1:.1f}%, the same experts "
            f"{100 * self.top_k:.1f}%",
        ]


def project(
    plan: Plan, model: PreTrainedModel, tokenizer: Any, task: Task, *, limit: int | None = None, batch_tokens: int = 512
) -> tuple[Plan, Projection]:
    """The nearest plan that a stock checkpoint expresses, for loaders that know no other, and what it costs.

    All layers get the largest k of the plan and its largest r; a layer of fewer experts gets back those of the full
    model's that its router scores highest, with router rows fitted to keep them from being picked. Dynamic skipping is
    left out, and so are novices, constants in place of experts. A W_RM on probabilities becomes one on logits, W':
    softmax(W' l) is fitted to the normalised mapped probabilities by least squares on their logarithms and from there
    by KL divergence (convex, L-BFGS), on router logits l collected under the plan on the search split, without
    gradients through the model. Aliased routing becomes the same fit to the summed probabilities of those that an
    expert answers for, or the router rows of one of them. Of these and plain row selection each layer gets the one
    whose expert weights are nearest. Experts are untouched.

    Args:
        plan: any plan for the model.
        model, tokenizer: the full model, as `moeopt.load` returns them.
        task: its search split is fitted to, the cost is measured on its dev split.
        limit: how many examples of each; None for all.
        batch_tokens: padded tokens a forward pass.

    Raises:
        PlanError: when the plan does not fit the model, or is refitted and of different r by layer.
        TaskError: when the task has no examples in one of the splits.
    """
    options: dict[str, Any] = {"limit": limit, "batch_tokens": batch_tokens}
    dev = Calibration(model, tokenizer, task, split="dev", **options)
    search = Calibration(model, tokenizer, task, **options)
    observed: list[list[LayerActivations]] = [[] for _ in plan.layers]
    share = max(1, -(-search.tokens // TOKENS))
    search.run(lambda acts: observed[acts.layer.index].append(_every(acts, share)), plan=plan)
    r = max(part.kept_experts for part in plan.layers)
    k = min(r, max(_without_novices(part).k for part in plan.layers))
    fitted = [_fit_layer(part, batches, r, k) for part, batches in zip(plan.layers, observed)]
    projected = Plan(tuple(part for part, _, _ in fitted))
    how, distance = (tuple(values) for values in list(zip(*fitted))[1:])
    measured = _measured(plan, projected, model, tokenizer, task, dev, options)
    name, measured_on = task.name, f"{dev.sequences} dev sequences"
    return projected, Projection(name, measured_on, dev.tokens, r, k, how, distance, *measured)


def expert_weights(part: LayerPlan, rule: RoutingRule, logits: Tensor, correction: Tensor | None = None) -> Tensor:
    """What each expert of a planned layer weighs for each token, float32 (tokens, r), 0 where it does not run.

    Args:
        part: the layer's plan.
        rule: how the family's router makes weights of logits.
        logits: of the full router, (tokens, n).
        correction: what it adds to its scores for the choice only, (n,).
    """
    w_rm = torch.from_numpy(part.router_matrix.copy()).to(logits.device)
    clamp = part.router == "prob" and part.negative == "clamp"
    moved = None if correction is None else w_rm @ correction.float()
    if part.router == "prob":
        mapped = rule.scores(logits).float() @ w_rm.T
        whole, index = rule.choose(mapped.clamp(min=0) if clamp else mapped, part.k, moved)
    elif part.picks_among_all:
        whole, index = rule.select(logits, part.k, correction)
        index = torch.tensor(part.aliases or part.places, device=logits.device)[index]
    else:
        whole, index = rule.select((logits.float() @ w_rm.T).to(logits.dtype), part.k, moved)
    whole = whole.float()
    largest = whole.amax(-1, keepdim=True)
    top = whole.masked_fill((whole < part.skip * largest) & (whole < largest), 0.0) if part.skip else whole
    total = top.sum(-1, keepdim=True)
    if clamp:
        total = total.masked_fill(total == 0, 1.0)
    if part.router == "prob":
        top = (top / total if rule.normalised else top) * rule.scale
    elif part.skip and rule.normalised:
        top = top * (whole.sum(-1, keepdim=True) / total)
    weights = torch.zeros(len(logits), part.experts, device=logits.device).scatter_add_(1, index, top)
    return weights[:, : part.kept_experts]  # but for those of novices


def _every(acts: LayerActivations, share: int) -> LayerActivations:
    """Each `share`-th token of a batch, its router logits only."""
    return replace(acts.without_states(), logits=acts.logits[::share].clone())


def _fit_layer(part: LayerPlan, batches: Sequence[LayerActivations], r: int, k: int) -> tuple[LayerPlan, str, float]:
    """The stock layer nearest to `part`, what was done, and how far it is."""
    rule, correction = batches[0].rule, batches[0].correction
    logits = torch.cat([acts.logits for acts in batches])
    pruned = _without_novices(part)
    plain = pruned.router in ("rows", "logit")
    if plain and part.kept_experts == r:
        same = pruned.k == k and not part.skip
        candidates = [("as it is" if same else "without skipping or with more active", pruned)]
        places = _places(pruned, [], rule.groups)
    else:
        padded = _padded(pruned, r, rule.scores(logits).float().mean(0).cpu().numpy(), rule.groups)
        candidates, places = _candidates(pruned, padded, rule, logits), _places(pruned, padded[2], rule.groups)
    before = torch.nn.functional.pad(expert_weights(part, rule, logits, correction), (0, r - part.kept_experts))
    fits = []
    for how, candidate in candidates:
        stock = replace(_ordered(candidate, places), k=k, skip=0.0)
        gap = (expert_weights(stock, rule, logits, correction) - before[:, places]).abs().sum(-1).mean().item() / 2
        fits.append((stock, how if part.novices is None else f"{how}, without novices", gap))
    return min(fits, key=lambda fit: fit[2])


def _without_novices(part: LayerPlan) -> LayerPlan:
    """The layer as a pruning, of at most as many active experts as it keeps."""
    if part.novices is None:
        return part
    return replace(part, k=min(part.k, part.kept_experts), router="rows", novices=None)


def _padded(
    part: LayerPlan, r: int, score: NDArray[np.float32], groups: int
) -> tuple[tuple[int, ...] | None, Matrix, list[int]]:
    """Experts kept (or None) and W_EM, (r, n), with those of the full model that come back, and which those are.

    Where routers choose among groups of experts first, each gets back what it lacks.
    """
    if part.down is not None and r > part.kept_experts:
        raise PlanError(
            f"a refitted layer of {part.kept_experts} experts cannot get back others to have {r}, as a stock "
            "checkpoint needs; project the plan first, then refit it"
        )
    used = set(part.kept or part.expert_matrix.argmax(1).tolist())
    order = [int(j) for j in np.argsort(-score) if j not in used]
    order += [j for j in range(part.experts) if j not in order]
    size, have = part.experts // groups, np.bincount(_groups_of(part, groups), minlength=groups)
    if r % groups or have.max() > r // groups:
        raise PlanError(
            f"tokens choose among {groups} groups of experts first, of which a stock checkpoint has as many each: "
            f"{' + '.join(map(str, have))} experts cannot become {r}"
        )
    back = [j for g in range(groups) for j in [j for j in order if j // size == g][: r // groups - have[g]]]
    kept = None if part.kept is None else (*part.kept, *back)
    return kept, np.concatenate([part.expert_matrix, one_hot(back, part.experts)]), back


def _groups_of(part: LayerPlan, groups: int) -> list[int]:
    """The group that each new expert is in: by its place, or, behind a router that stays whole, by what it is."""
    if not part.picks_among_all and (part.kept is None or part.router != "rows"):
        return [i * groups // part.kept_experts for i in range(part.kept_experts)]
    return [int(j) * groups // part.experts for j in part.kept or part.expert_matrix.argmax(1)]


def _places(part: LayerPlan, back: list[int], groups: int) -> list[int]:
    """The experts of a padded layer in the order of their groups."""
    of_each = [*_groups_of(part, groups), *(j * groups // part.experts for j in back)]
    return [int(i) for i in np.argsort(of_each, kind="stable")]


def _ordered(part: LayerPlan, places: list[int]) -> LayerPlan:
    if places == list(range(len(places))):
        return part
    if part.down is not None:
        raise PlanError(
            "a refitted layer whose experts are not in the order of their groups: project it, then refit it"
        )
    kept = None if part.kept is None else tuple(part.kept[i] for i in places)
    w_em = None if part.w_em is None else part.w_em[places]
    return replace(part, kept=kept, w_em=w_em, w_rm=part.router_matrix[places])


def _candidates(
    part: LayerPlan, padded: tuple[tuple[int, ...] | None, Matrix, list[int]], rule: RoutingRule, logits: Tensor
) -> list[tuple[str, LayerPlan]]:
    kept, w_em, back = padded
    experts: dict[str, Any] = {"kept": kept} if kept is not None else {"w_em": w_em}
    experts |= {"down": part.down, "neurons": part.neurons, "merge": part.merge}
    scores = rule.scores(logits).double().cpu().numpy()
    rows = [*(part.router_rows or _likeliest(part, scores, rule.groups)), *back]
    selected = LayerPlan(part.experts, 1, **experts, w_rm=one_hot(rows, part.experts), router="rows")
    candidates = [("by selected router rows", selected)]
    ell = logits.double().cpu().numpy()
    for how, w_rm in _fits(part, scores, ell, len(back), sigmoid=rule.score == "sigmoid").items():
        candidates.append((how, LayerPlan(part.experts, 1, **experts, w_rm=w_rm, router="logit")))
    return candidates


def _likeliest(part: LayerPlan, scores: Array, groups: int) -> list[int]:
    """For each new expert the full model's, of its group, whose scores make up the most of its own."""
    shares = np.abs(part.router_matrix) * scores.mean(0)
    inside = np.arange(part.experts) * groups // part.experts == np.array(_groups_of(part, groups))[:, None]
    return [int(j) for j in np.where(inside, shares, -1.0).argmax(1)]


def _fits(part: LayerPlan, scores: Array, logits: Array, back: int, *, sigmoid: bool) -> dict[str, Matrix]:
    """Mappings of logits, (r, n), near to what the layer makes of the scores; experts that came back get none."""
    matrix = part.router_matrix.astype(np.float64)
    if part.router in ("rows", "logit"):
        mapped = logits @ matrix.T
        mapped = 1 / (1 + np.exp(-mapped)) if sigmoid else _softmax(mapped)
    else:
        mapped = np.clip(scores @ matrix.T, 0, None)
    mapped = np.pad(mapped, ((0, 0), (0, back)))
    if sigmoid:
        wanted = np.clip(mapped, FLOOR, 1 - FLOOR)
        return {"by least squares on logits": _least_squares(logits, np.log(wanted / (1 - wanted)))}
    total = mapped.sum(1)
    mapped, logits = mapped[total > 0] / total[total > 0, None], logits[total > 0]
    if not len(mapped):
        return {}
    wanted = np.log(np.clip(mapped, FLOOR, None))
    start = _least_squares(logits, wanted - wanted.mean(1, keepdims=True))
    return {"by least squares on logits": start, "by a KL fit on logits": _kl_fit(logits, mapped, start)}


def _least_squares(logits: Array, wanted: Array) -> Matrix:
    return np.linalg.lstsq(logits, wanted, rcond=None)[0].T.astype(np.float32)


def _kl_fit(logits: Array, wanted: Array, start: Matrix) -> Matrix:
    """W, (r, n), that minimises the mean KL(wanted ‖ softmax(W l)) plus a small ridge around `start`."""
    origin = start.astype(np.float64)

    def loss(flat: Array) -> tuple[float, Array]:
        w = flat.reshape(origin.shape)
        mapped = logits @ w.T
        mapped -= mapped.max(1, keepdims=True)
        log_z = np.log(np.exp(mapped).sum(1, keepdims=True))
        moved = w - origin
        value = -(wanted * (mapped - log_z)).sum(1).mean() + RIDGE / 2 * (moved**2).sum()
        slope = (np.exp(mapped - log_z) - wanted).T @ logits / len(logits) + RIDGE * moved
        return float(value), slope.ravel()

    fit = minimize(loss, origin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return np.asarray(fit.x, dtype=np.float32).reshape(origin.shape)


def _softmax(mapped: Array) -> Array:
    e = np.exp(mapped - mapped.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _measured(
    plan: Plan, projected: Plan, model: PreTrainedModel, tokenizer: Any, task: Task, dev: Any, options: dict[str, Any]
) -> tuple[float, float, float, float, float]:
    """Losses before and after, KL, top-1 and top-k agreement, as `Projection` has them."""
    evaluator = Evaluator(model, tokenizer, task, split="dev", **options)
    losses = [evaluator.evaluate(p).loss for p in (plan, projected)]
    evaluator.clear()
    caches, sums = (MergedCache(), MergedCache()), np.zeros(2)
    with dev.ready():
        for batch in dev.batches:
            inputs, logits = batch.inputs(input_device(model)), []
            for p, cache in zip((plan, projected), caches):
                with patched(model, p, cache=cache):
                    logits.append(model(**inputs, use_cache=False).logits[batch.mask.bool()].float().log_softmax(-1))
            a, b = logits
            sums += [(a.exp() * (a - b)).sum().item(), (a.argmax(-1) == b.argmax(-1)).sum().item()]
    picks = torch.zeros(2, dtype=torch.int64)

    def observe(acts: LayerActivations) -> None:
        i = acts.layer.index
        run = [expert_weights(p.layers[i], acts.rule, acts.logits, acts.correction) != 0 for p in (plan, projected)]
        run[0] = torch.nn.functional.pad(run[0], (0, run[1].shape[1] - run[0].shape[1]))
        picks.add_(torch.stack([(run[0] & run[1]).sum(), run[0].sum()]).cpu())

    dev.run(observe, plan=plan)
    kl, top_1 = (float(value) / dev.tokens for value in sums)
    return losses[0], losses[1], kl, top_1, int(picks[0]) / max(1, int(picks[1]))
