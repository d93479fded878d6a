"""What became, on examples that a search never saw, of what it, or a refit, gained.

A search's best trial is the best of many on the examples that it searched: partly by luck. Two evaluations on dev, of
it and of the plan that the search began with, tell how much of the gain is left there. `moeopt.select` chooses among
the best trials on dev and reports on test; this only says what the search's own choice is worth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeopt.errors import StudyError
from moeopt.statistics import paired_bootstrap
from moeopt.trials.description import HELD, held_facts
from moeopt.trials.genome import WARM_START
from moeopt.trials.objectives import LOSS

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.defaults import Score
    from moeopt.evaluation import Evaluation, Interval
    from moeopt.plan import Plan
    from moeopt.study.objective import Objective
    from moeopt.tasks import Task


@dataclass(frozen=True)
class Held:
    """A gain on search, and what is left of it on dev.

    Args:
        trial: number of the study's best trial.
        start: that of what the search began with: the best of its warm starts, or else its first trial.
        search: loss of `start` less that of `trial`, on search.
        dev, low, high: the same on dev, with its 95% interval over the examples, paired.
        examples: of dev (text: windows).
    """

    trial: int
    start: int
    search: float
    dev: float
    low: float
    high: float
    examples: int

    @property
    def share(self) -> float:
        """Gain on dev over gain on search."""
        return self.dev / self.search

    def __str__(self) -> str:
        interval = f"[{self.low:.4f}, {self.high:.4f}]"
        share = "All and more" if self.share > 1 else f"{100 * self.share:.0f}%" if self.share > 0 else "Nothing"
        return (
            f"{share} of the gain held: {self.search:.4f} on search, {self.dev:.4f} {interval} on"
            f" {self.examples:,} dev examples (trial {self.trial} against {self.start}, with which the search began)"
        )


def held(study: optuna.Study, objective: Objective) -> Held | None:
    """Scores the best trial, and what the search began with, on dev, unless the study holds that.

    None for no gain, and for studies of anything but the loss alone.

    As many dev examples as the objective's `limit` are used, the search's k, skipping and active weight counting. What
    it finds is the study's user attribute ``held``, and selections take the evaluations from it.

    Raises:
        StudyError: when the task has no dev split.
        NonFiniteLossError: when a loss on dev is not finite.
    """
    from moeopt.results.selection.evaluating import StudyEvaluators

    if objective.goals.objectives != (LOSS,):
        return None
    if "dev" not in objective.task.splits:
        raise StudyError(f"task {objective.task.name!r} has no dev split to hold a gain against")
    start, best = _ends(study)
    if start is None or best is None or not (start.value or 0.0) > (best.value or 0.0):
        return None
    facts = held_facts(study.user_attrs, study.study_name)
    if facts is not None and (facts["trial"], facts["start"]) == (best.number, start.number):
        return Held(**facts)
    evaluators = StudyEvaluators(study, objective, limits={"dev": objective.settings["limit"]})
    before, after = (evaluators.evaluate(objective.space.plan(trial), "dev") for trial in (start, best))
    gained = -paired_bootstrap(after, before)
    searched = (start.value or 0.0) - (best.value or 0.0)
    made = Held(best.number, start.number, searched, gained.mean, gained.low, gained.high, len(before.losses))
    study.set_user_attr(HELD, asdict(made))
    return made


def _ends(study: optuna.Study) -> tuple[FrozenTrial | None, FrozenTrial | None]:
    """What a search began with, and its best trial."""
    from moeopt.study import best_trial

    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.value is not None]
    starts = [trial for trial in done if WARM_START in trial.user_attrs]
    first = min(starts, key=lambda t: (t.value, t.number)) if starts else next(iter(done), None)
    return first, best_trial(study)


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
    from moeopt.evaluation import Evaluator

    evaluator = Evaluator(model, tokenizer, task, split="dev", limit=dev_limit, batch_tokens=batch_tokens, score=score)
    plans = {"full model": None, "plan": plan, "refitted plan": refitted}
    evaluations = {name: evaluator.evaluate(each) for name, each in plans.items()}
    metric = "agreement" if evaluator.teacher is not None else task.metric
    return JudgedRefit(metric, evaluations, paired_bootstrap(evaluations["refitted plan"], evaluations["plan"]))
