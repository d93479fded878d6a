"""Evaluations and calibrations of one comparison, each done once: what the ledger knows is not done again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moeopt.errors import MethodError
from moeopt.evaluation import Evaluation, Evaluator
from moeopt.evaluation.evaluator import Score
from moeopt.methods import Calibration, get, plans, refit, skipping
from moeopt.methods.refitting import RIDGES
from moeopt.models import describe
from moeopt.plan import Plan
from moeopt.results.method_comparison.comparison import REFIT, SKIPPING, Calibrated, Size, plan_file
from moeopt.results.method_comparison.ledger import Known, Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.tasks import Task

Progress = Callable[[int, int, str], None]
"""Called before every step with the steps done, all of them, and what comes."""


class Bench:
    """A model with a task's splits to evaluate plans on, and a calibration that is read when a plan is missing.

    Args:
        model, tokenizer, task: as for `Evaluator`.
        splits: those to score.
        limits: examples of each; None for all.
        calibration: the task whose search split one-shot methods look at.
        calibration_limit: examples of it.
        score: what a loss is, as for `Evaluator`.
        batch_tokens: padded tokens a forward pass.
        ledger: what is known.
        steps: how many calls there will be, for `progress`.
        progress: see `Progress`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        *,
        splits: Sequence[str],
        limits: dict[str, int | None],
        calibration: Task,
        calibration_limit: int | None,
        score: Score,
        batch_tokens: int,
        ledger: Ledger,
        steps: int,
        progress: Progress,
    ) -> None:
        self._model, self._tokenizer, self._task, self._batch_tokens = model, tokenizer, task, batch_tokens
        self._calibration_task, self._calibration_limit, self._score = calibration, calibration_limit, score
        self._ledger, self._steps, self._progress, self._done = ledger, steps, progress, 0
        self.calibrated: Calibrated | None = None
        self.evaluators = {
            split: Evaluator(
                model,
                tokenizer,
                task,
                split=split,
                limit=limits[split],
                batch_tokens=batch_tokens,
                prefix_memory=0,
                score=score,
            )
            for split in splits
        }
        self.sizes = {split: Size(found.examples, found.tokens) for split, found in self.evaluators.items()}
        described = describe(model)
        self._weights = _digest(described["config_hash"], described["weights"])
        self._examples = {
            split: _digest(found.fingerprint, task.fingerprint(split)) for split, found in self.evaluators.items()
        }

    @cached_property
    def calibration(self) -> Calibration:
        return Calibration(
            self._model,
            self._tokenizer,
            self._calibration_task,
            limit=self._calibration_limit,
            batch_tokens=self._batch_tokens,
            score=self._score if self._calibration_task.chooses else "likelihood",
        )

    @cached_property
    def _looked_at(self) -> str:
        """Names what methods look at, and with what tokens."""
        search = self.evaluators["search"].fingerprint
        return _digest(self._weights, search, self._calibration_task.fingerprint("search"), self._calibration_limit)

    def evaluate(self, plan: Plan | None, split: str, name: str) -> Evaluation:
        """What the model gives under a plan, None for the model as it is, on a split."""
        self.step(f"{name}: {split}")
        of = ("full" if plan is None else plan.fingerprint, split, self._examples[split], self._weights)
        found = self._ledger.evaluation(*of)
        if found is None:
            found = self.evaluators[split].evaluate(plan)
            self.evaluators[split].clear(keep_teacher=True)
            self._ledger.keep_evaluation(found, *of)
        return found

    def methods(self, names: Sequence[str], keep: int, k: int, seed: int) -> dict[str, Known]:
        """The plans of several methods; those that take the same pass share it.

        Raises:
            MethodError: when one of them cannot do it on this model.
        """
        self.step(f"calibrating {', '.join(names)}, keep {keep}, k {k}")
        of = {name: _digest(self._looked_at, name, keep, k, seed) for name in names}
        missing = [name for name in names if self._ledger.plan(of[name]) is None]
        if missing:
            for name, found in plans(missing, self.calibration, keep=keep, k=k, seed=seed).items():
                known = Known(found.plan, found.layer_tokens, self.calibration.sequences, self.calibration.tokens)
                self._ledger.keep_plan(known, of[name], plan_file(name, keep, k))
        return {name: self._noted(of[name]) for name in names}

    def skipping(self, plan: Plan, cost: int, name: str, keep: int, k: int) -> Known:
        """A plan with calibrated dynamic skipping, `cost` being what the plan itself cost."""
        self.step(f"calibrating {name}, keep {keep}, k {k}")
        of = _digest(self._looked_at, "skipping", plan.fingerprint, cost)
        if self._ledger.plan(of) is None:
            calibration = self.calibration
            cost += calibration.tokens * calibration.decoder_layers
            found = Known(skipping(plan, calibration), cost, calibration.sequences, calibration.tokens)
            self._ledger.keep_plan(found, of, plan_file(f"{name}{SKIPPING}", keep, k))
        return self._noted(of)

    def refitted(self, plan: Plan, cost: int, name: str, keep: int, k: int) -> Known:
        """A plan refitted to what methods look at, `cost` being what the plan itself cost."""
        self.step(f"refitting {name}, keep {keep}, k {k}")
        of = _digest(self._looked_at, "refit", plan.fingerprint, cost, RIDGES)
        if self._ledger.plan(of) is None:
            calibration = self.calibration
            made = refit(plan, calibration)
            known = Known(made.plan, cost + made.layer_tokens, calibration.sequences, calibration.tokens)
            self._ledger.keep_plan(known, of, plan_file(f"{name}{REFIT}", keep, k), made.about)
        return self._noted(of)

    def step(self, what: str) -> None:
        self._progress(min(self._done, self._steps), self._steps, what)
        self._done += 1

    def finish(self) -> None:
        """Say that every step is done."""
        self._progress(self._steps, self._steps, "done")

    def _noted(self, of: str) -> Known:
        found = self._ledger.plan(of)
        assert found is not None
        source = self._calibration_task
        own = source.fingerprint("search") == self._task.fingerprint("search")
        self.calibrated = Calibrated(source.name, own, found.sequences, found.tokens)
        return found


def groups(names: Sequence[str]) -> list[list[str]]:
    """Methods that share passes, and each that needs passes of its own: what is lost when a run is cut off."""
    shared = [name for name in names if not get(name).alone]
    alone = [[name] for name in names if get(name).alone]
    return [shared, *alone] if shared else alone


def found_by_each(bench: Bench, names: Sequence[str], keep: int, k: int, seed: int) -> dict[str, Known | MethodError]:
    """The plan of every method, or why there is none."""
    found: dict[str, Known | MethodError] = {}
    for together in groups(names):
        try:
            found |= bench.methods(together, keep, k, seed)
        except MethodError as error:
            if len(together) == 1:
                found[together[0]] = error
                continue
            for name in together:
                try:
                    found |= bench.methods([name], keep, k, seed)
                except MethodError as reason:
                    found[name] = reason
    return {name: found[name] for name in names}


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
