"""The rows of a comparison: plans are made, or taken from a study, and scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeopt.errors import MethodError, ModelError, NonFiniteLossError
from moeopt.evaluation import Evaluation
from moeopt.methods import METHODS, Budget
from moeopt.models import Sizes
from moeopt.plan import ModelShape, Plan
from moeopt.results.method_comparison.bench import Bench, found_by_each
from moeopt.results.method_comparison.comparison import REFIT, SKIPPING, Kind, Row
from moeopt.results.method_comparison.searched import Searched


class Maker:
    """Makes rows, in the order it is asked for them.

    Args:
        bench: scores plans.
        shape, sizes: of the full model.
        seed: of the random prunings.
        skipping, refits: whether a row is followed by the same plan with calibrated skipping, and refitted.

    Attributes:
        rows: those made so far.
        left_out: methods that could not be, and why.
    """

    def __init__(self, bench: Bench, shape: ModelShape, sizes: Sizes, seed: int, skipping: bool, refits: bool) -> None:
        self.bench, self.shape, self.sizes, self.seed = bench, shape, sizes, seed
        self.skips, self.refits = skipping, refits
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def full(self, ks: Sequence[int]) -> None:
        """The full model as it is, with other k, and with skipping."""
        n, own = self.shape.experts, self.shape.k
        for k in dict.fromkeys((own, *ks)):
            plan = Plan.identity(self.shape.layers, n, k)
            self._row("full", "full model", None if k == own else plan, n, k, 0)
            if k in ks:
                self._skipping("full", "full model", plan, n, k, 0)

    def random(self, keep: int, k: int, draws: int, test_draws: int) -> None:
        """The mean over random prunings, and the best of them."""
        if not draws:
            return
        plans = [_random(self.shape, keep, k, self.seed, draw) for draw in range(draws)]
        label = f"random prunings, keep {keep}, k {k}"
        finite = self._finite(plans, "search", label)
        if not finite:
            return
        plans = [plan for plan, _ in finite]
        found = {"search": [evaluation for _, evaluation in finite]}
        for split in self.bench.sizes:
            if split != "search":
                found[split] = [evaluation for _, evaluation in self._finite(plans[:test_draws], split, label)]
        losses = {split: np.array([e.loss for e in of]) for split, of in found.items() if of}
        accuracies = {split: np.array([e.accuracy for e in of]) for split, of in found.items() if of}
        size = self.sizes.under(plans[0])
        self.rows.append(
            Row(
                keep=keep,
                k=k,
                name=f"mean of {len(plans)} random",
                kind="random",
                plan=None,
                loss={split: float(x.mean()) for split, x in losses.items()},
                accuracy={split: float(x.mean()) for split, x in accuracies.items()},
                parameters=size.parameters,
                gib=size.bytes / 2**30,
                active=float(np.mean([e.active for e in found["search"]])),
                loss_sd={split: float(x.std()) for split, x in losses.items()},
                accuracy_sd={split: float(x.std()) for split, x in accuracies.items()},
                drawn={split: len(x) for split, x in losses.items()},
            )
        )
        best = plans[int(losses["search"].argmin())]
        name = f"best of {len(plans)} random"
        self._row("best random", name, best, keep, k, 0)
        self._variants("best random", name, best, keep, k, 0)

    def methods(self, names: Sequence[str], keep: int, k: int, *, strict: bool) -> None:
        """One-shot methods; of these, those that cannot are left out, unless `strict`."""
        for name, known in found_by_each(self.bench, names, keep, k, self.seed).items():
            before = len(self.rows)
            try:
                if isinstance(known, MethodError):
                    raise known
                self._row("method", name, known.plan, keep, k, known.layer_tokens)
                self._variants("method", name, known.plan, keep, k, known.layer_tokens)
            except (MethodError, ModelError, NonFiniteLossError) as error:
                if strict:
                    raise
                del self.rows[before:]
                self.left_out.append(f"{name}, keep {keep}, k {k}: {error}")

    def _finite(self, plans: Sequence[Plan], split: str, label: str) -> list[tuple[Plan, Evaluation]]:
        """Plans whose loss is finite, and what they give; the others are noted as left out."""
        found = []
        for plan in plans:
            try:
                found.append((plan, self.bench.evaluate(plan, split, label)))
            except NonFiniteLossError as error:
                self.left_out.append(f"one of the {label}, {split}: {error}")
        return found

    def search(self, one: Searched) -> None:
        """A trial of a study."""
        keep, k = kept(one.plan), max(layer.k for layer in one.plan.layers)
        self._row("search", one.name, one.plan, keep, k, one.layer_tokens)
        self._variants("search", one.name, one.plan, keep, k, one.layer_tokens)

    def _row(self, kind: Kind, name: str, plan: Plan | None, keep: int, k: int, cost: int) -> None:
        label = f"{name}, keep {keep}, k {k}"
        found = {split: self.bench.evaluate(plan, split, label) for split in self.bench.sizes}
        size = self.sizes.under(plan)
        self.rows.append(
            Row(
                keep=keep,
                k=k,
                name=name,
                kind=kind,
                plan=plan,
                loss={split: e.loss for split, e in found.items()},
                accuracy={split: e.accuracy for split, e in found.items()},
                parameters=size.parameters,
                gib=size.bytes / 2**30,
                active=next(reversed(found.values())).active,
                layer_tokens=cost,
                evaluations=found,
            )
        )

    def _variants(self, kind: Kind, name: str, plan: Plan, keep: int, k: int, cost: int) -> None:
        if self.refits:
            try:
                known = self.bench.refitted(plan, cost, name, keep, k)
                self._row(kind, f"{name}{REFIT}", known.plan, keep, k, known.layer_tokens)
            except (MethodError, ModelError, NonFiniteLossError) as error:
                self.left_out.append(f"{name}{REFIT}, keep {keep}, k {k}: {error}")
        self._skipping(kind, name, plan, keep, k, cost)

    def _skipping(self, kind: Kind, name: str, plan: Plan, keep: int, k: int, cost: int) -> None:
        if self.skips and k > 1 and not any(layer.skip for layer in plan.layers):
            known = self.bench.skipping(plan, cost, name, keep, k)
            self._row(kind, f"{name}{SKIPPING}", known.plan, keep, k, known.layer_tokens)


def kept(plan: Plan) -> int:
    """Experts that a plan keeps in each layer; the most of them where layers differ."""
    return max(layer.kept_experts for layer in plan.layers)


def _random(shape: ModelShape, keep: int, k: int, seed: int, draw: int) -> Plan:
    """A random pruning: the same experts whatever k is."""
    method, budget = METHODS["random"], Budget(shape.experts, shape.k, keep, k)
    rngs = (np.random.default_rng([seed, draw, layer]) for layer in range(shape.layers))
    return Plan(tuple(method.layer({}, budget, rng) for rng in rngs))
