"""What a comparison gives: one row a plan, with its scores on every split and its intervals on test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moeopt.defaults import Score
from moeopt.evaluation import Evaluation, Interval
from moeopt.plan import ModelShape, Plan
from moeopt.showing import Shown

Kind = Literal["full", "random", "best random", "method", "search"]
SKIPPING, REFIT = " + skipping", " + refit"
"""End the name of a row whose plan skips experts by thresholds that were calibrated here, or was refitted here."""


@dataclass(frozen=True)
class Size:
    """Examples of a split (windows, for text) and the tokens that one evaluation of them runs."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class Calibrated:
    """What the one-shot methods looked at: the search split of a task, and how many sequences and tokens of it.

    Task-specific, where that is the task that is compared on; else the methods are task-agnostic.
    """

    task: str
    task_specific: bool
    sequences: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table.

    Args:
        keep, k: experts kept per layer, and most that a token runs.
        name: what it is.
        kind: "random" is the mean over random prunings, "best random" the one of them with the least search loss.
        plan: None for the full model as it is, and for a mean.
        loss, accuracy: by split.
        loss_sd, accuracy_sd: by split, over the prunings of a mean (of a single one: 0); else empty.
        drawn: by split, how many prunings a mean is over; else empty.
        parameters: of the checkpoint that holds the plan.
        gib: what they take in the model's dtypes.
        active: experts that a token ran in an MoE layer, mean, on the last of the splits.
        layer_tokens: what finding it cost; of a search, all its trials.
        evaluations: by split; empty for a mean.
        against_full: test loss minus the full model's, 95% interval of a paired bootstrap over examples.
        against_best: the same against the best one-shot method of the same keep and k.
    """

    keep: int
    k: int
    name: str
    kind: Kind
    plan: Plan | None
    loss: Mapping[str, float]
    accuracy: Mapping[str, float]
    parameters: int
    gib: float
    active: float
    layer_tokens: int = 0
    loss_sd: Mapping[str, float] = field(default_factory=dict)
    accuracy_sd: Mapping[str, float] = field(default_factory=dict)
    drawn: Mapping[str, int] = field(default_factory=dict)
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict, repr=False)
    against_full: Interval | None = None
    against_best: Interval | None = None

    @property
    def skips(self) -> bool:
        """Whether its plan skips experts token by token."""
        return self.plan is not None and any(layer.skip for layer in self.plan.layers)

    @property
    def variant(self) -> str | None:
        """What ends its name, of a row that is the one above changed."""
        return next((ending for ending in (SKIPPING, REFIT) if self.name.endswith(ending)), None)

    @property
    def refitted(self) -> bool:
        """Whether its plan has down projections of its own."""
        return self.plan is not None and self.plan.is_refitted

    @property
    def file(self) -> str | None:
        """Name of its plan's file."""
        return None if self.plan is None else plan_file(self.name, self.keep, self.k)


@dataclass(frozen=True, eq=False)
class MethodComparison(Shown):
    """What `compare` returns.

    Args:
        model, task: their descriptions, JSON.
        shape: of the full model.
        splits: sizes of the splits that were scored.
        calibrated: None where no method needed to look at anything.
        rows: the full model first, then by keep and k in the order they were asked for.
        chosen_on: the split that says which one-shot method is best; never "test".
        draws, test_draws: random prunings scored on the search split, and on the others.
        seed: of the random prunings.
        left_out: methods that could not be compared, and why.
        score: what a loss is, as for `Evaluator`; of a label-free one, accuracies are agreement with the full model.
    """

    model: Mapping[str, Any]
    task: Mapping[str, Any]
    shape: ModelShape
    splits: Mapping[str, Size]
    calibrated: Calibrated | None
    rows: tuple[Row, ...]
    chosen_on: str
    draws: int
    test_draws: int
    seed: int
    left_out: tuple[str, ...] = ()
    score: Score = "likelihood"

    @property
    def full(self) -> Row:
        """The full model as it is."""
        return self.rows[0]

    @property
    def keeps(self) -> tuple[int, ...]:
        """The numbers of experts kept that were compared, in the order they were asked for."""
        return tuple(dict.fromkeys(row.keep for row in self.rows if row.kind != "full"))

    def best_one_shot(self, keep: int, k: int) -> Row | None:
        """The one-shot method, without skipping and refit, of least loss on `chosen_on`."""
        return best_one_shot(self.rows, keep, k, self.chosen_on)


def best_one_shot(rows: Iterable[Row], keep: int, k: int, split: str) -> Row | None:
    """The row of a one-shot method, without skipping and refit, of least loss on a split; the first of equals."""
    plain = (row for row in rows if not row.skips and not row.refitted)
    methods = [row for row in plain if row.kind == "method" and (row.keep, row.k) == (keep, k)]
    return min(methods, key=lambda row: row.loss[split], default=None)


def plan_file(name: str, keep: int, k: int) -> str:
    """
    >>> plan_file("naee + skipping", 4, 2)
    'naee-skipping-keep4-k2.safetensors'
    """
    words = "".join(c if c.isalnum() or c == "_" else " " for c in name).split()
    return f"{'-'.join(words)}-keep{keep}-k{k}.safetensors"
