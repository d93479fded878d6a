"""The guards of a study on examples that no trial saw: a plan held against the full model there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.evaluation.store import StoredEvaluators, StudyStore
from moeopt.showing import line, listed
from moeopt.statistics import Interval, paired_bootstrap
from moeopt.study import recipe
from moeopt.study.guards import Guard, Guarded, guards_of
from moeopt.study.objective import Objective
from moeopt.trials.description import described

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel

    from moeopt.plan import Plan

UNSEEN = ("dev", "test")


class GuardJudge:
    """`judge(plan, split) -> list[Guarded]`: every evaluation is made once, and kept in the study.

    Args:
        study: of moeopt; one without guards has nothing to judge.
        model: the study's objective; or the full model, then with `tokenizer`. Guards are the objective's, or those
            that the study's recipe holds.
        batch_tokens: as for `Evaluator`.

    Attributes:
        missing: what cannot be judged, and why, in sentences.
    """

    def __init__(
        self, study: optuna.Study, model: PreTrainedModel | Objective, tokenizer: Any = None, batch_tokens: int = 1024
    ) -> None:
        self.allowed, self.missing = guards_of(study), list[str]()
        guards = self._guards(study, model) if self.allowed else []
        if isinstance(model, Objective):
            model, tokenizer = model.model, model.tokenizer
        self._stored: dict[str, StoredEvaluators] = {}
        options: dict[str, Any] = {
            "batch_tokens": batch_tokens,
            "max_length": described(study)["task"].get("max_length"),
        }
        for guard in guards:
            splits = [split for split in UNSEEN if guard.on(split) is not None]
            lacking = [split for split in UNSEEN if split not in splits]
            if lacking:
                self.missing.append(f"guard {line(guard.name, 80)} has no {' and no '.join(lacking)} split")
            made = {split: guard.evaluator(split, model, tokenizer, **options) for split in splits}
            if made:
                self._stored[guard.name] = StoredEvaluators(made, StudyStore(study))

    def _guards(self, study: optuna.Study, model: PreTrainedModel | Objective) -> Iterable[Guard]:
        if isinstance(model, Objective):
            return model.guards.guards
        try:
            held = recipe.stored(study)
            if held is not None:
                return recipe.guards_of(held)
            why = "it has no recipe: give the objective"
        except StudyError as error:
            why = str(error)
        self.missing.append(f"guards {listed(line(name, 80) for name in self.allowed)} cannot be judged: {why}")
        return []

    @property
    def evaluated(self) -> int:
        """Evaluations that were made here."""
        return sum(stored.evaluated for stored in self._stored.values())

    @property
    def layer_tokens(self) -> int:
        """What they cost."""
        return sum(stored.layer_tokens for stored in self._stored.values())

    def __call__(self, plan: Plan, split: str) -> list[Guarded]:
        """The plan on the guards that have the split; an infinite change where its loss is not finite.

        Raises:
            NonFiniteLossError: when the full model's is not.
        """
        made = []
        for name, stored in self._stored.items():
            if split not in stored.evaluators:
                continue
            full = stored.evaluate(None, split)
            try:
                change = paired_bootstrap(stored.evaluate(plan, split), full)
            except NonFiniteLossError:
                change = Interval(*[float("inf")] * 3)
            made.append(Guarded(name, split, len(full.losses), change, self.allowed[name]))
        return made
