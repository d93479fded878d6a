"""What a refit changes on dev."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeopt.evaluation import Evaluation, Evaluator, Interval
from moeopt.results.differences import difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluator import Score
    from moeopt.plan import Plan
    from moeopt.tasks import Task


@dataclass(frozen=True, eq=False)
class JudgedRefit:
    """A refit on dev.

    Args:
        metric: what `Evaluation.accuracy` is called.
        evaluations: of ``"full model"``, ``"plan"`` and ``"refitted plan"``.
        change: loss of the refitted plan minus the plan's; below 0 is better.
    """

    metric: str
    evaluations: dict[str, Evaluation]
    change: Interval


def judged_refit(
    plan: Plan,
    refitted: Plan,
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    *,
    dev_limit: int | None = None,
    score: Score = "likelihood",
    batch_tokens: int = 1024,
) -> JudgedRefit | None:
    """What the full model, a plan and the refitted plan give on dev; None where the task has no dev split.

    Args:
        plan, refitted: what `moeopt.refit` took and gave.
        model, tokenizer: the full model, as `moeopt.load` returns them.
        task: what to be good at.
        dev_limit: of its dev examples; None: all.
        score: what a loss is, as for `Evaluator`.
        batch_tokens: padded tokens a forward pass.

    Raises:
        TaskError: as for `Evaluator`.
        NonFiniteLossError: when a loss is not finite.
    """
    if "dev" not in task.splits:
        return None
    evaluator = Evaluator(model, tokenizer, task, split="dev", limit=dev_limit, batch_tokens=batch_tokens, score=score)
    plans = {"full model": None, "plan": plan, "refitted plan": refitted}
    evaluations = {name: evaluator.evaluate(each) for name, each in plans.items()}
    metric = "agreement" if evaluator.teacher is not None else task.metric
    return JudgedRefit(metric, evaluations, difference(evaluations["refitted plan"], evaluations["plan"]))
