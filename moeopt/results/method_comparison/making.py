"""The rows of a comparison: plans are made, or taken from a study, and scored; what is known is not done again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moeopt.errors import MethodError, ModelError, NonFiniteLossError
from moeopt.evaluation import Evaluation
from moeopt.evaluation.store import StoredEvaluators, digest
from moeopt.methods import METHODS, Calibration, Wanted, get, plans, refit, skipping
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


@dataclass(frozen=True)
class Source:
    """What one-shot methods look at.

    Args:
        task: its search split.
        limit: so many of its examples; None: all.
        task_specific: whether it is the task that is compared on.
        calibration: reads it.
    """

    task: Task
    limit: int | None
    task_specific: bool
    calibration: Callable[[], Calibration]


class Maker:
    """Makes rows, in the order it is asked for them.

    Args:
        evaluators: score plans on each split.
        workspace: what is known already.
        source: what one-shot methods look at.
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

    def __init__(
        self,
        evaluators: StoredEvaluators,
        workspace: Workspace,
        source: Source,
        model: Mapping[str, Any],
        shape: ModelShape,
        sizes: Sizes,
        seed: int,
        skipping: bool,
        refits: bool,
        steps: Steps,
    ) -> None:
        self.evaluators, self.splits = evaluators, list(evaluators.evaluators)
        self.workspace, self.source, self.shape, self.sizes, self.seed = workspace, source, shape, sizes, seed
        self.skips, self.refits, self.steps = skipping, refits, steps
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.calibrated: Calibrated | None = None
        self._weights = digest(model["config_hash"], model["weights"])

    def count_steps(
        self, keeps: Sequence[int], ks: Sequence[int], names: Sequence[str], draws: int, test_draws: int,
        searched: Sequence[Searched],
    ) -> int:  # fmt: skip
        """How many steps there will be, if no method is left out."""
        splits = len(self.splits)

        def for_plan(k: int, *, skips: bool = False) -> int:
            return splits + (1 + splits) * (self.refits + (self.skips and k > 1 and not skips))

        steps = splits * len({self.shape.k, *ks}) + (1 + splits) * self.skips * sum(k > 1 for k in ks)
        for k in ks:
            random = draws + test_draws * (splits - 1) + for_plan(k) if draws else 0
            steps += len(set(keeps)) * (len(groups(names)) + len(names) * for_plan(k) + random)
        for trial in searched:
            layers = trial.plan.layers
            steps += for_plan(max(layer.k for layer in layers), skips=any(layer.skip for layer in layers))
        return steps

    def full(self, ks: Sequence[int]) -> None:
        """The full model as it is, with other k, and with skipping."""
        n = self.shape.experts
        for k in dict.fromkeys((self.shape.k, *ks)):
            plan = Plan.identity(self.shape.layers, n, k)
            self._row("full", "full model", None if k == self.shape.k else plan, n, k, 0)
            if k in ks:
                self._skipping("full", "full model", plan, n, k, 0)

    def random(self, keep: int, k: int, draws: int, test_draws: int) -> None:
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
        size = self.sizes.of(prunings[0])
        self.rows.append(
            Row(
                keep, k, f"mean of {len(prunings)} random", "random", None,
                loss={split: float(x.mean()) for split, x in losses.items()},
                accuracy={split: float(x.mean()) for split, x in accuracies.items()},
                parameters=size.parameters,
                gib=size.bytes / 2**30,
                active=float(np.mean([e.active for e in scores["search"]])),
                loss_sd={split: float(x.std()) for split, x in losses.items()},
                accuracy_sd={split: float(x.std()) for split, x in accuracies.items()},
                drawn={split: len(x) for split, x in losses.items()},
            )
        )  # fmt: skip
        best = prunings[int(losses["search"].argmin())]
        self._rows("best random", f"best of {len(prunings)} random", best, keep, k, 0)

    def methods(self, names: Sequence[str], keep: int, k: int, *, strict: bool) -> None:
        """One-shot methods; of these, those that cannot are left out, unless `strict`."""
        for name, made in self._by_method(names, keep, k).items():
            before = len(self.rows)
            try:
                if isinstance(made, MethodError):
                    raise made
                self._rows("method", name, made.plan, keep, k, made.layer_tokens)
            except CANNOT as error:
                if strict:
                    raise
                del self.rows[before:]
                self.left_out.append(f"{name}, keep {keep}, k {k}: {error}")

    def search(self, trial: Searched) -> None:
        """A trial of a study."""
        k = max(layer.k for layer in trial.plan.layers)
        self._rows("search", trial.name, trial.plan, kept_experts(trial.plan), k, trial.layer_tokens)

    def _finite(self, prunings: Sequence[Plan], split: str, label: str) -> list[tuple[Plan, Evaluation]]:
        """Plans whose loss is finite, and what they give; the others are noted as left out."""
        finite = []
        for plan in prunings:
            try:
                finite.append((plan, self._evaluate(plan, split, label)))
            except NonFiniteLossError as error:
                self.left_out.append(f"one of the {label}, {split}: {error}")
        return finite

    def _evaluate(self, plan: Plan | None, split: str, label: str) -> Evaluation:
        self.steps(f"{label}: {split}")
        return self.evaluators.evaluate(plan, split)

    def _row(self, kind: Kind, name: str, plan: Plan | None, keep: int, k: int, cost: int) -> None:
        scores = {split: self._evaluate(plan, split, f"{name}, keep {keep}, k {k}") for split in self.splits}
        size = self.sizes.of(plan)
        self.rows.append(
            Row(
                keep, k, name, kind, plan,
                loss={split: e.loss for split, e in scores.items()},
                accuracy={split: e.accuracy for split, e in scores.items()},
                parameters=size.parameters,
                gib=size.bytes / 2**30,
                active=scores[self.splits[-1]].active,
                layer_tokens=cost,
                evaluations=scores,
            )
        )  # fmt: skip

    def _rows(self, kind: Kind, name: str, plan: Plan, keep: int, k: int, cost: int) -> None:
        """A plan, the same refitted, and with skipping."""
        self._row(kind, name, plan, keep, k, cost)
        if self.refits:
            try:
                made = self._refitted(plan, cost, name, keep, k)
                self._row(kind, f"{name}{REFIT}", made.plan, keep, k, made.layer_tokens)
            except CANNOT as error:
                self.left_out.append(f"{name}{REFIT}, keep {keep}, k {k}: {error}")
        self._skipping(kind, name, plan, keep, k, cost)

    def _skipping(self, kind: Kind, name: str, plan: Plan, keep: int, k: int, cost: int) -> None:
        if not self.skips or k < 2 or any(layer.skip for layer in plan.layers):
            return
        self.steps(f"calibrating {name}, keep {keep}, k {k}")

        def make() -> tuple[Plan, int, None]:
            passes = self.calibration.tokens * self.calibration.decoder_layers
            return skipping(plan, self.calibration), cost + passes, None

        made = self._made(("skipping", plan.fingerprint, cost), plan_file(f"{name}{SKIPPING}", keep, k), make)
        self._row(kind, f"{name}{SKIPPING}", made.plan, keep, k, made.layer_tokens)

    def _refitted(self, plan: Plan, cost: int, name: str, keep: int, k: int) -> MadePlan:
        self.steps(f"refitting {name}, keep {keep}, k {k}")

        def make() -> tuple[Plan, int, Mapping[str, Any]]:
            refitted = refit(plan, self.calibration)
            return refitted.plan, cost + refitted.layer_tokens, refitted.about

        return self._made(("refit", plan.fingerprint, cost, RIDGES), plan_file(f"{name}{REFIT}", keep, k), make)

    def _made(
        self, question: tuple[object, ...], file: str, make: Callable[[], tuple[Plan, int, Mapping[str, Any] | None]]
    ) -> MadePlan:
        """What was made in answer to a question about what methods look at, or is made now."""
        name = digest(self._looked_at, *question)
        made = self.workspace.plan(name)
        if made is None:
            plan, cost, about = make()
            made = MadePlan(plan, cost, self.calibration.sequences, self.calibration.tokens)
            self.workspace.keep_plan(made, name, file, about)
        source = self.source
        self.calibrated = Calibrated(source.task.name, source.task_specific, made.sequences, made.tokens)
        return made

    @cached_property
    def calibration(self) -> Calibration:
        return self.source.calibration()

    @cached_property
    def _looked_at(self) -> str:
        """Names what methods look at, and with what tokens."""
        tokens, source = self.evaluators.evaluators["search"].fingerprint, self.source
        return digest(self._weights, tokens, source.task.fingerprint("search"), source.limit)

    def _by_method(self, names: Sequence[str], keep: int, k: int) -> dict[str, MadePlan | MethodError]:
        """The plan of every method, or why there is none."""
        made: dict[str, MadePlan | MethodError] = {}
        for together in groups(names):
            try:
                made |= self._passes(together, keep, k)
            except MethodError as error:
                if len(together) == 1:
                    made[together[0]] = error
                    continue
                for name in together:
                    try:
                        made |= self._passes([name], keep, k)
                    except MethodError as reason:
                        made[name] = reason
        return {name: made[name] for name in names}

    def _passes(self, names: Sequence[str], keep: int, k: int) -> dict[str, MadePlan]:
        """The plans of several methods; those that take the same pass share it."""
        self.steps(f"calibrating {', '.join(names)}, keep {keep}, k {k}")
        questions = {name: (name, keep, k, self.seed) for name in names}

        def fresh_plan(name: str) -> Callable[[], tuple[Plan, int, None]]:
            return lambda: (fresh[name].plan, fresh[name].layer_tokens, None)

        missing = [name for name in names if self.workspace.plan(digest(self._looked_at, *questions[name])) is None]
        fresh = plans(missing, self.calibration, keep=keep, k=k, seed=self.seed) if missing else {}
        return {name: self._made(questions[name], plan_file(name, keep, k), fresh_plan(name)) for name in names}


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
    method, wanted = METHODS["random"], Wanted(shape.experts, shape.k, keep, k)
    rngs = (np.random.default_rng([seed, draw, layer]) for layer in range(shape.layers))
    return Plan(tuple(method.layer({}, wanted, rng) for rng in rngs))
