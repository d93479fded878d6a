"""What the full model gives on a study's examples: the reference that what the study finds is held against.

Its numbers are the study's user attribute `full_model`, which dashboards show; the scores of the examples are packed in
a system attribute, written before it, so that who finds the one finds the other. A study has it once, however many
workers and resumptions there are, and its layer-tokens count once in the `spent` of trials.

A model that guesses tells no plan from another: of n examples on which a blind pick is right with probabilities p_i, it
is taken to guess unless it has significantly more than sum p_i right, one-sided at 5%, by the normal approximation with
continuity correction: right - 1/2 - sum p_i > z sqrt(sum p_i (1 - p_i)). Where nothing is picked, it is enough to have
anything right. In a mixture every task is judged alone.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import NonFiniteLossError, OutOfMemoryError, StorageError
from moeopt.showing import line, shown
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.description import FULL_MODEL, full_model, reading

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from moeopt.evaluation import Evaluation, Evaluator, Interval

SCORES = "moeopt:full_model"
"""System attribute of a study: losses, weights and correctness of the examples, packed."""
Z = 1.6449
ADVICE = (
    "look at the first prompt: is anything missing or double before the answer (delimiter), is it the template that "
    "the model knows, does it want a chat template (chat=true)?"
)
MOST_SHOWN = 8
"""Metrics in a line, and warnings."""


@dataclass(frozen=True, eq=False)
class Reference:
    """The full model on the examples that a study searches.

    Args:
        of: names model, task, examples and score (`moeopt.evaluation.store.scores_name`).
        score: as of `Evaluator`; where it is a distance from the full model, the loss is 0 by definition.
        loss: mean loss, as trials' without what active experts add.
        penalty: what the objective adds to it for the active experts.
        accuracy: 0 to 1, as trials note it.
        metrics: the task's published numbers by name.
        active: experts that a token runs in an MoE layer, on average.
        examples: how many there are.
        chance: the accuracy of blind picks; None where the model does not choose among options.
        tokens, layer_tokens, seconds: what it cost.
        warnings: why not to trust a search on these examples; empty when nothing speaks against it.
        scores: losses, weights and correctness of the examples, float32 (3, examples).
    """

    of: str
    score: str
    loss: float
    penalty: float
    accuracy: float
    metrics: Mapping[str, float]
    active: float
    examples: int
    chance: float | None
    tokens: int
    layer_tokens: int
    seconds: float
    warnings: tuple[str, ...]
    scores: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """All but the scores, as JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "scores"}
        return {**values, "metrics": dict(self.metrics), "warnings": list(self.warnings)}

    @property
    def label_free(self) -> bool:
        """Whether losses are distances from the full model."""
        return self.score in ("kl", "acceptance")

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, {'agreement' if self.label_free else 'accuracy'} {100 * self.accuracy:.1f}%"
        if self.label_free:
            return f"{text}, by definition"
        text += f" of {self.examples:,} examples"
        if self.chance is not None:
            text += f" (chance {100 * self.chance:.1f}%)"
        others = list(self.metrics.items())[1 : 1 + MOST_SHOWN]
        return text + "".join(f", {line(name, 40)} {value:.4f}" for name, value in others)

    def difference(self, trial: FrozenTrial) -> Interval | None:
        """A trial's mean loss minus this one, active experts not weighed in, with its 95% interval over the examples.

        None where the trial's scores are of other examples, or it has none.

        Raises:
            StorageError: when they are damaged.
        """
        from moeopt.statistics import bootstrap

        theirs = genome.read_scores(trial)
        if self.scores is None or theirs is None or genome.scores_of(trial) != self.of:
            return None
        if not np.array_equal(theirs[1], self.scores[1]):
            return None
        return bootstrap(theirs[0].astype(np.float64) - self.scores[0], self.scores[1].astype(np.float64))

    def keep(self, study: optuna.Study) -> None:
        """Keep it in a study."""
        if self.scores is not None:
            attrs = genome.pack(SCORES, self.scores.reshape(-1))
            attrs[SCORES]["of"] = self.of
            attributes.write_study(study, attrs)
        study.set_user_attr(FULL_MODEL, self.facts)


def measure(evaluator: Evaluator, scores_name: str, active_weight: float = 0.0) -> Reference:
    """Evaluate the full model.

    Args:
        evaluator: of the study's examples.
        scores_name: its `moeopt.evaluation.store.scores_name`.
        active_weight: what the objective adds to a loss for an active expert.

    Raises:
        NonFiniteLossError: when its loss is not finite.
        OutOfMemoryError: when a single sequence does not fit.
    """
    try:
        evaluation = evaluator.full_model()
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"nothing can be held against the full model: {error}", layer=error.layer) from None
    chances = evaluator.task.chance(evaluator.split, evaluator.requests)
    chance = float(np.average(chances, weights=evaluation.weights))
    active = round(evaluation.active, 4)
    return Reference(
        of=scores_name,
        score=evaluator.score,
        loss=evaluation.loss,
        penalty=active_weight * active,
        accuracy=evaluation.accuracy,
        metrics={name: float(value) for name, value in evaluation.metrics.items()},
        active=active,
        examples=len(evaluation.losses),
        chance=None if evaluator.teacher is not None or np.isnan(chance) else chance,
        tokens=evaluation.tokens,
        layer_tokens=evaluation.layer_tokens,
        seconds=round(evaluation.seconds, 4),
        warnings=() if evaluator.teacher is not None else tuple(doubts(evaluator, evaluation, chances)),
        scores=evaluation.scores,
    )


class FullModel:
    """Gives the studies of an objective their references, each before its first trial here.

    Args:
        evaluator: of the objective.
        active_weight: what the objective adds to a loss for an active expert.
        wanted: whether a study that has no reference gets one.

    Attributes:
        layer_tokens: what the reference of the study that is searched cost; 0 where it has none.
    """

    def __init__(self, evaluator: Evaluator, active_weight: float, *, wanted: bool) -> None:
        self.evaluator, self.active_weight, self.wanted = evaluator, active_weight, wanted
        self.layer_tokens = 0
        self._searched: Callable[[], optuna.Study | None] = lambda: None

    @property
    def _lock(self) -> AbstractContextManager[Any]:
        from moeopt.models import lock_of

        return lock_of(self.evaluator.model)

    @cached_property
    def scores_name(self) -> str:
        """`moeopt.evaluation.store.scores_name` of the evaluator."""
        from moeopt.evaluation.store import scores_name  # not above: who shows studies does without torch

        return scores_name(self.evaluator)

    def begin(self, study: optuna.Study) -> None:
        """Once a study: it gets its reference, and the evaluator forgets what was run for it or others.

        So no study saves layer-tokens by what another one ran, and a resumed one costs what one that went on does.
        """
        if self._searched() is study:
            return
        with self._lock:
            if self._searched() is study:  # another thread did it meanwhile
                return
            held = self._stored(study) if self.wanted else read(study)
            if self.wanted and held is None:
                try:
                    held = self.reference(study)
                    for warning in held.warnings:
                        warnings.warn(f"{warning} It is {first_prompt(self.evaluator)}", stacklevel=4)
                except (NonFiniteLossError, OutOfMemoryError) as error:
                    warnings.warn(f"the full model gives no reference: {error}", stacklevel=4)
            self.layer_tokens = 0 if held is None else held.layer_tokens
            self.evaluator.clear(keep_teacher=True)
            self._searched = weakref.ref(study)

    def reference(self, study: optuna.Study) -> Reference:
        """As `Objective.reference`."""
        with self._lock:
            held = self._stored(study)
            if held is not None:
                return held
            self.evaluator.clear(keep_teacher=True)
            measured = measure(self.evaluator, self.scores_name, self.active_weight)
            self.evaluator.clear(keep_teacher=True)  # what trials cost does not depend on where this was run
            held = self._stored(study)  # another process may have made it meanwhile
            if held is None:
                measured.keep(study)
            return held or measured

    def _stored(self, study: optuna.Study) -> Reference | None:
        """The reference that a study holds, where it is of what the objective scores."""
        held = read(study)
        if held is None or held.of != self.scores_name:
            return None
        return held if held.penalty == self.active_weight * held.active else None


def read(study: optuna.Study) -> Reference | None:
    """The reference that a study holds, without its scores where they are missing; None where it has none.

    Raises:
        StudyError: when the attribute is not of the form that moeopt writes.
        StorageError: when the scores are damaged.
    """
    with reading(study.study_name):
        facts = full_model(study.user_attrs, study.study_name)
        if facts is None:
            return None
        attrs = attributes.study_attributes(study)
    packed = genome.unpack(SCORES, attrs)
    scores = None
    if packed is not None and attrs[SCORES].get("of") == facts["of"]:
        if packed.size != 3 * facts["examples"]:
            raise StorageError(
                f"study {shown(study.study_name)}: its attribute {SCORES!r} is damaged: {packed.size} numbers for "
                f"{facts['examples']} examples"
            )
        scores = packed.reshape(3, -1)
    return of_facts(facts, scores)


def of_facts(facts: Mapping[str, Any], scores: NDArray[np.float32] | None = None) -> Reference:
    """A reference from facts that were checked."""
    return Reference(**{**facts, "warnings": tuple(facts["warnings"])}, scores=scores)


def first_prompt(evaluator: Evaluator) -> str:
    """The first prompt as the model reads it, and behind a plus what is scored, on one visible line."""
    prompt, scored = evaluator.first_prompt
    return f'"{line(prompt, 400)}" + "{line(scored, 200)}"'


def doubts(evaluator: Evaluator, evaluation: Evaluation, chances: NDArray[np.float64]) -> list[str]:
    """What says that the full model guesses, a line for every task that is scored.

    Args:
        evaluator: what the full model was evaluated by.
        evaluation: what it gave.
        chances: how likely a blind pick is right on each example, NaN where none is made, float64 (examples,).
    """
    task, lines = evaluator.task, []
    parts = {f" of {name}": at for name, (at, _) in task.places(evaluator.requests).items()}
    parts = parts or {"": np.arange(len(chances))}
    for name, at in parts.items():
        right, chance = float(evaluation.correct[at].sum(dtype=np.float64)), np.nan_to_num(chances[at])
        by_guessing = chance.sum() + 0.5 + Z * np.sqrt((chance * (1 - chance)).sum()) if chance.any() else 0.0
        if right > by_guessing:
            continue
        if chance.any():
            above = right > chance.sum()
            lines.append(
                f"the full model's accuracy{name}, {100 * right / len(at):.1f}% of {len(at)} examples, is "
                f"{'not surely' if above else 'no'} better than guessing, {100 * chance.mean():.1f}%: "
                f"{'take more examples, or ' if above else ''}{ADVICE}"
            )
        else:
            lines.append(
                f"the full model gets none of {len(at)} examples{name} right: where answers are short, {ADVICE}"
            )
    return lines
