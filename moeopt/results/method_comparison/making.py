"""The rows of a comparison: plans are made, or taken from a study, and scored; what is known is not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from moeopt.errors import MethodError, ModelError, NonFiniteLossError
from moeopt.evaluation import Evaluation
from moeopt.evaluation.store import StoredEvaluators, digest
from moeopt.methods import METHODS, Budget, Calibration, get, plans, refit, skipping
from moeopt.methods.refitting import RIDGES
from moeopt.models import Sizes
from moeopt.plan import ModelShape, Plan
from moeopt.results.method_comparison.comparison import REFIT, SKIPPING, Calibrated, Kind, Row, plan_file
from moeopt.results.method_comparison.folder import MadePlan, Workspace
from moeopt.results.method_comparison.searched import Searched
from moeopt.results.steps import Steps
from moeopt.tasks import Task

CANNOT = (MethodError, ModelError, NonFiniteLossError)
"""Why a plan is left out."""
Made = tuple[Plan, int, Mapping[str, Any] | None]
"""A plan, what it cost, and what its file says of it."""


@dataclass
class Maker:
    """Makes rows, in the order it is asked for them.

    Args:
        evaluators: score plans on each split.
        workspace: what is known already.
        source: task whose search split one-shot methods look at.
        limit: so many of its examples; None: all.
        model: description of the full model.
        shape, sizes: of it.
        seed: of the random prunings.
        skipping, refits: whether a row is followed by the same plan with calibrated skipping, and refitted.
        steps: told before every step.

    Attributes:
        rows: those made so far.
        left_out: methods that could not be, and why.
        calibrated: what methods looked at; None where none needed to.
    """

    evaluators: StoredEvaluators
    workspace: Workspace
    source: Task
    limit: int | None
    model: Mapping[str, Any]
    shape: ModelShape
    sizes: Sizes
    seed: int
    skipping: bool
    refits: bool
    steps: Steps
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    calibrated: Calibrated | None = None

    def jobs(
        self, keeps: Sequence[int], ks: Sequence[int], names: Sequence[str], draws: int, test_draws: int, strict: bool,
        trials: Sequence[Searched],
    ) -> Iterator[tuple[int, Callable[[], None]]]:  # fmt: skip
        """What there is to do, each with the steps that it takes if no method is left out.

        Args:
            keeps, ks: numbers of experts kept and active.
            names: one-shot methods.
            draws, test_draws: random prunings on search, and on the other splits.
            strict: raise what a method cannot, instead of leaving it out.
            trials: of a study.
        """
        splits = len(self.splits)

        def for_plan(k: int, *, skips: bool = False) -> int:
            return splits + (1 + splits) * (self.refits + (self.skipping and k > 1 and not skips))

        for k in dict.fromkeys((self.shape.k, *ks)):
            skips = self.skipping and k > 1 and k in ks
            yield splits + (1 + splits) * skips, partial(self._full, k, skips)
        for keep in dict.fromkeys(keeps):
            for k in ks:
                if draws:
                    steps = draws + test_draws * (splits - 1) + for_plan(k)
                    yield steps, partial(self._random, keep, k, draws, test_draws)
                steps = len(groups(names)) + len(names) * for_plan(k)
                yield steps, partial(self._methods, names, keep, k, strict)
            for trial in trials:
                layers, k = trial.plan.layers, max(layer.k for layer in trial.plan.layers)
                if kept_experts(trial.plan) == keep:
                    cost = trial.layer_tokens
                    job = partial(self._with_variants, "search", trial.name, trial.plan, keep, k, cost)
                    yield for_plan(k, skips=any(layer.skip for layer in layers)), job

    @property
    def splits(self) -> list[str]:
        return list(self.evaluators.evaluators)

    @cached_property
    def calibration(self) -> Calibration:
        """What methods look at, read when a plan is missing."""
        by = self.evaluators.evaluators["search"]
        score = by.score if self.source.chooses else "likelihood"
        options: dict[str, Any] = {"limit": self.limit, "batch_tokens": by.batch_tokens, "score": score}
        return Calibration(by.model, by.tokenizer, self.source, **options)

    @cached_property
    def _looked_at(self) -> str:
        """Names what methods look at, and with what tokens."""
        weights = digest(self.model["config_hash"], self.model["weights"])
        tokens = self.evaluators.evaluators["search"].fingerprint
        return digest(weights, tokens, self.source.fingerprint("search"), self.limit)

    def _full(self, k: int, skips: bool) -> None:
        """The full model as it is, with another k, and with skipping."""
        n = self.shape.experts
        plan = Plan.identity(self.shape.layers, n, k)
        self._row("full", "full model", None if k == self.shape.k else plan, n, k, 0)
        if skips:
            self._variant(SKIPPING, "full", "full model", plan, n, k, 0)

    def _random(self, keep: int, k: int, draws: int, test_draws: int) -> None:
        """The mean over random prunings, and the best of them."""
        label = f"random prunings, keep {keep}, k {k}"
        drawn = [_random(self.shape, keep, k, self.seed, draw) for draw in range(draws)]
        finite = self._finite(drawn, "search", label)
        if not finite:
            return
        prunings = [plan for plan, _ in finite]
        scores = {"search": [evaluation for _, evaluation in finite]}
        for split in self.splits:
            if split != "search":
                scores[split] = [evaluation for _, evaluation in self._finite(prunings[:test_draws], split, label)]
        losses = {split: np.array([e.loss for e in scored]) for split, scored in scores.items() if scored}
        accuracies = {split: np.array([e.accuracy for e in scored]) for split, scored in scores.items() if scored}
        size = self.sizes.under(prunings[0])
        mean = Row(
            keep, k, f"mean of {len(prunings)} random", "random", None,
            loss={split: float(x.mean()) for split, x in losses.items()},
            accuracy={split: float(x.mean()) for split, x in accuracies.items()},
            parameters=size.parameters,
            gib=size.bytes / 2**30,
            active=float(np.mean([e.active for e in scores["search"]])),
            loss_sd={split: float(x.std()) for split, x in losses.items()},
            accuracy_sd={split: float(x.std()) for split, x in accuracies.items()},
            drawn={split: len(x) for split, x in losses.items()},
        )  # fmt: skip
        self.rows.append(mean)
        best = prunings[int(losses["search"].argmin())]
        self._with_variants("best random", f"best of {len(prunings)} random", best, keep, k, 0)

    def _finite(self, prunings: Sequence[Plan], split: str, label: str) -> list[tuple[Plan, Evaluation]]:
        """Plans whose loss is finite, and what they give; the others are noted as left out."""
        finite = []
        for plan in prunings:
            try:
                finite.append((plan, self._evaluate(plan, split, label)))
            except NonFiniteLossError as error:
                self.left_out.append(f"one of the {label}, {split}: {error}")
        return finite

    def _methods(self, names: Sequence[str], keep: int, k: int, strict: bool) -> None:
        """One-shot methods; of these, those that cannot are left out, unless `strict`."""
        made: dict[str, MadePlan | MethodError] = {}
        for together in groups(names):
            try:
                made |= self._passes(together, keep, k)
            except MethodError:  # which of them cannot?
                for name in together:
                    try:
                        made |= self._passes([name], keep, k)
                    except MethodError as error:
                        made[name] = error
        for name in names:
            result, before = made[name], len(self.rows)
            try:
                if isinstance(result, MethodError):
                    raise result
                self._with_variants("method", name, result.plan, keep, k, result.layer_tokens)
            except CANNOT as error:
                if strict:
                    raise
                del self.rows[before:]
                self.left_out.append(f"{name}, keep {keep}, k {k}: {error}")

    def _passes(self, names: Sequence[str], keep: int, k: int) -> dict[str, MadePlan]:
        """The plans of several methods; those that take the same pass share it."""
        self.steps(f"calibrating {', '.join(names)}, keep {keep}, k {k}")
        questions = {name: (name, keep, k, self.seed) for name in names}
        missing = [name for name in names if self.workspace.plan(digest(self._looked_at, *questions[name])) is None]
        fresh = plans(missing, self.calibration, keep=keep, k=k, seed=self.seed) if missing else {}

        def make(name: str) -> Made:
            return fresh[name].plan, fresh[name].layer_tokens, None

        return {name: self._made(questions[name], plan_file(name, keep, k), partial(make, name)) for name in names}

    def _with_variants(self, kind: Kind, name: str, plan: Plan, keep: int, k: int, cost: int) -> None:
        """A plan, the same refitted, and with skipping."""
        self._row(kind, name, plan, keep, k, cost)
        if self.refits:
            self._variant(REFIT, kind, name, plan, keep, k, cost)
        if self.skipping and k > 1 and not any(layer.skip for layer in plan.layers):
            self._variant(SKIPPING, kind, name, plan, keep, k, cost)

    def _variant(self, ending: str, kind: Kind, name: str, plan: Plan, keep: int, k: int, cost: int) -> None:
        """A plan refitted, or with skipping calibrated, to what methods look at; what cannot be is left out."""
        label = f"{name}{ending}"
        self.steps(f"calibrating {label}, keep {keep}, k {k}")

        def refitted() -> Made:
            result = refit(plan, self.calibration)
            return result.plan, cost + result.layer_tokens, result.about

        def with_skipping() -> Made:
            passes = self.calibration.tokens * self.calibration.decoder_layers
            return skipping(plan, self.calibration), cost + passes, None

        question, make = {
            REFIT: (("refit", plan.fingerprint, cost, RIDGES), refitted),
            SKIPPING: (("skipping", plan.fingerprint, cost), with_skipping),
        }[ending]
        try:
            made = self._made(question, plan_file(label, keep, k), make)
            self._row(kind, label, made.plan, keep, k, made.layer_tokens)
        except CANNOT as error:
            self.left_out.append(f"{label}, keep {keep}, k {k}: {error}")

    def _made(self, question: tuple[object, ...], file: str, make: Callable[[], Made]) -> MadePlan:
        """What was made in answer to a question about what methods look at, or is made now."""
        name = digest(self._looked_at, *question)
        made = self.workspace.plan(name)
        if made is None:
            plan, cost, about = make()
            made = MadePlan(plan, cost, self.calibration.sequences, self.calibration.tokens)
            self.workspace.keep_plan(made, name, file, about)
        searched = self.evaluators.evaluators["search"].task
        same = self.source.fingerprint("search") == searched.fingerprint("search")
        self.calibrated = Calibrated(self.source.name, same, made.sequences, made.tokens)
        return made

    def _evaluate(self, plan: Plan | None, split: str, label: str) -> Evaluation:
        self.steps(f"{label}: {split}")
        return self.evaluators.evaluate(plan, split)

    def _row(self, kind: Kind, name: str, plan: Plan | None, keep: int, k: int, cost: int) -> None:
        scores = {split: self._evaluate(plan, split, f"{name}, keep {keep}, k {k}") for split in self.splits}
        size = self.sizes.under(plan)
        row = Row(
            keep, k, name, kind, plan,
            loss={split: e.loss for split, e in scores.items()},
            accuracy={split: e.accuracy for split, e in scores.items()},
            parameters=size.parameters,
            gib=size.bytes / 2**30,
            active=scores[self.splits[-1]].active,
            layer_tokens=cost,
            evaluations=scores,
        )  # fmt: skip
        self.rows.append(row)


def groups(names: Sequence[str]) -> list[list[str]]:
    """Methods that share passes, and each that needs passes of its own: what is lost when a run is cut off."""
    shared = [name for name in names if not get(name).alone]
    alone = [[name] for name in names if get(name).alone]
    return [shared, *alone] if shared else alone


def kept_experts(plan: Plan) -> int:
    """Experts that a plan keeps in each layer; the most of them where layers differ."""
    return max(layer.kept_experts for layer in plan.layers)


def _random(shape: ModelShape, keep: int, k: int, seed: int, draw: int) -> Plan:
    """A random pruning: the same experts whatever k is."""
    method, budget = METHODS["random"], Budget(shape.experts, shape.k, keep, k, router_groups=shape.router_groups)
    rngs = (np.random.default_rng([seed, draw, layer]) for layer in range(shape.layers))
    return Plan(tuple(method.layer({}, budget, rng) for rng in rngs))
