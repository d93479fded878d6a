"""A plan refitted, and judged on dev with and without the refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeopt.evaluation import Evaluation, Evaluator, Interval, paired_bootstrap
from moeopt.methods import Calibration, Refit, refit

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluator import Score
    from moeopt.methods.refitting import Progress
    from moeopt.plan import Plan
    from moeopt.tasks import Task


@dataclass(frozen=True)
class JudgedRefit:
    """What `refit_judged` gives.

    Args:
        refit: the refitted plan, and what became of each layer.
        full, without, fitted: what the full model, the plan, and the refitted plan give on dev; None where the task has
            no dev split.
        metric: the task's name for `Evaluation.accuracy`.
    """

    refit: Refit
    full: Evaluation | None = None
    without: Evaluation | None = None
    fitted: Evaluation | None = None
    metric: str = "accuracy"

    @property
    def change(self) -> Interval | None:
        """Loss on dev with the refit minus without, with its paired 95% interval; below 0, the refit is better."""
        if self.without is None or self.fitted is None:
            return None
        return paired_bootstrap(self.fitted, self.without)

    def lines(self) -> list[str]:
        """The same for people."""
        change = self.change
        if self.full is None or self.without is None or self.fitted is None or change is None:
            return [*self.refit.lines(), "the task has no dev split to judge it on"]
        names = {"full model": self.full, "plan": self.without, "refitted plan": self.fitted}
        scores = [f"{name} {e.loss:.4f}, {self.metric} {100 * e.accuracy:.1f}%" for name, e in names.items()]
        verdict = (
            "better" if change.high < 0 else "worse: keep the plan as it was" if change.low > 0 else "no difference"
        )
        return [
            *self.refit.lines(),
            f"loss on {len(self.full.losses):,} dev examples: {'; '.join(scores)}",
            f"refitted - plan: {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}], {verdict}",
        ]


def refit_judged(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    *,
    calibration: Task | None = None,
    limit: int | None = None,
    dev_limit: int | None = None,
    score: Score = "likelihood",
    rank: int | None = None,
    batch_tokens: int = 1024,
    parts: str | Path | None = None,
    progress: Progress | None = None,
) -> JudgedRefit:
    """`moeopt.refit` on the search split of a task, and what it changes on the task's dev split.

    Args:
        plan: any plan of the model.
        model, tokenizer: the full model, as `moeopt.load` returns them.
        task: what to be good at.
        calibration: whose search split is fitted to; None: the task's own. Any other makes the refit task-agnostic.
        limit: examples (text: windows) fitted to; None: all.
        dev_limit: of those judged on; None: all.
        score: what a loss is, as for `Evaluator`.
        rank, parts, progress: as for `moeopt.refit`.
        batch_tokens: padded tokens a forward pass.

    Raises:
        MethodError, PlanError, ModelError: as `moeopt.refit`.
        TaskError: as for `Evaluator`.
    """
    source = calibration or task
    evaluator = None
    if "dev" in task.splits:
        evaluator = Evaluator(
            model, tokenizer, task, split="dev", limit=dev_limit, batch_tokens=batch_tokens, score=score
        )
    sequences = Calibration(model, tokenizer, source, limit=limit, batch_tokens=batch_tokens)
    made = refit(plan, sequences, rank=rank, parts=parts, progress=progress)
    if evaluator is None:
        return JudgedRefit(made)
    full, without, fitted = (evaluator.evaluate(one) for one in (None, plan, made.plan))
    return JudgedRefit(made, full, without, fitted, "agreement" if evaluator.teacher is not None else task.metric)
