"""What a refit changes on dev."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeopt.evaluation import Evaluator, paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.evaluation.evaluator import Score
    from moeopt.plan import Plan
    from moeopt.tasks import Task


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
) -> list[str]:
    """Loss and metric of the full model, a plan and the refitted plan on dev, and the paired difference, in words.

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
        return ["the task has no dev split to judge it on"]
    evaluator = Evaluator(model, tokenizer, task, split="dev", limit=dev_limit, batch_tokens=batch_tokens, score=score)
    full, without, fitted = (evaluator.evaluate(each) for each in (None, plan, refitted))
    metric = "agreement" if evaluator.teacher is not None else task.metric
    names = {"full model": full, "plan": without, "refitted plan": fitted}
    scores = [f"{name} {e.loss:.4f}, {metric} {100 * e.accuracy:.1f}%" for name, e in names.items()]
    change = paired_bootstrap(fitted, without)
    verdict = "better" if change.high < 0 else "worse: keep the plan as it was" if change.low > 0 else "no difference"
    return [
        f"loss on {len(full.losses):,} dev examples: {'; '.join(scores)}",
        f"refitted - plan: {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}], {verdict}",
    ]
