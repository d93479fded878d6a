"""Evaluations that a study keeps beside its trials, which are closed once they have ended; each is made once.

A system attribute of the study holds each, packed as a trial's scores are and written as soon as it is there:
`moeopt:dev:<model and examples>:<plan>`. Another, `moeopt:look:...`, is left whenever something is run on test.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import NonFiniteLossError, StorageError, StudyError
from moeopt.evaluation import Evaluation
from moeopt.results.selection.record import FULL, SELECTION, check_record, recorded
from moeopt.showing import line
from moeopt.study.storage import attributes
from moeopt.trials import genome

if TYPE_CHECKING:
    import optuna

    from moeopt.plan import Plan

LOOK = "moeopt:look:"
NOT_FINITE = "not_finite"
COSTS = ("tokens", "layer_tokens", "seconds", "active")


class Kept:
    """The evaluations of plans that a study holds, as it was opened, and those added here.

    Args:
        study: where they are.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._attrs = dict(attributes.study_attributes(study))

    def get(self, split: str, of: str, plan: str) -> Evaluation | None:
        """What a plan gave, None where that is not known.

        Args:
            split: what it was evaluated on.
            of: `moeopt.study.scores.scores_name` of the evaluator.
            plan: its fingerprint, or ``"full"``.

        Raises:
            NonFiniteLossError: when it gave no finite loss.
            StorageError: when the attribute is damaged.
        """
        key = _key(split, of, plan)
        head = self._attrs.get(key)
        if isinstance(head, dict) and NOT_FINITE in head:
            raise NonFiniteLossError(line(head[NOT_FINITE], 1000), layer=None)
        scores = genome.unpack(key, self._attrs)
        if scores is None or head is None:
            return None
        try:
            losses, weights, correct = scores.reshape(3, -1)
            tokens, layer_tokens, seconds, active = (float(head[cost]) for cost in COSTS)
            if not (np.isfinite([tokens, layer_tokens]).all() and np.isfinite(weights).all() and (weights > 0).all()):
                raise ValueError("costs or weights are not finite and positive")
            metrics = {str(name): float(value) for name, value in head["metrics"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StorageError(f"attribute {key!r} is damaged: {error}") from None
        return Evaluation(losses, weights, correct, int(tokens), int(layer_tokens), seconds, active, metrics)

    def put(self, evaluation: Evaluation, split: str, of: str, plan: str) -> None:
        """Keep what a plan gave; whole or not at all."""
        key = _key(split, of, plan)
        attrs = genome.pack(key, evaluation.scores.reshape(-1))
        attrs[key] |= {cost: getattr(evaluation, cost) for cost in COSTS}
        attrs[key]["metrics"] = {name: float(value) for name, value in evaluation.metrics.items()}
        self._write(attrs)

    def put_not_finite(self, reason: str, split: str, of: str, plan: str) -> None:
        """Keep that a plan gave no finite loss."""
        self._write({_key(split, of, plan): {NOT_FINITE: reason}})

    def has(self, split: str, of: str, plan: str) -> bool:
        """Whether a plan was evaluated."""
        return _key(split, of, plan) in self._attrs

    def look(self, of: str, *plans: str) -> None:
        """Note, before it is done, that test is looked at for the sake of these plans, named as for `get`."""
        key = f"{LOOK}{':'.join((of, *plans))}"
        if key not in self._attrs:
            self._write({key: datetime.now(UTC).isoformat(timespec="seconds")})

    @property
    def looks(self) -> int:
        """How often test was looked at."""
        return sum(key.startswith(LOOK) for key in self._attrs)

    def _write(self, attrs: dict[str, Any]) -> None:
        attributes.write_study(self._study, attrs)
        self._attrs |= attrs


def name_of(plan: Plan | None) -> str:
    """A plan's fingerprint; ``"full"`` for the model as it is."""
    return FULL if plan is None else plan.fingerprint


def on_test(study: optuna.Study) -> dict[str, Evaluation]:
    """What the latest selection got on test, example by example, to pair it with something else; needs no model.

    Returns:
        Evaluations of ``"full"``, ``"winner"`` and, as in `Selection.evaluations`, ``"search_best"``. Losses are the
        task's own, active experts not weighed in.

    Raises:
        StudyError: when nothing was selected yet.
    """
    found = recorded(study)
    if found is None:
        raise StudyError(f"nothing was selected from study {study.study_name!r} yet")
    check_record(found, f"study {study.study_name!r}: {SELECTION}")
    kept, of = Kept(study), found["examples"]["test"]["of"]
    known = {name: kept.get("test", of, plan) for name, plan in {FULL: FULL, **found["plans"]}.items()}
    if None in known.values():
        raise StorageError(f"study {study.study_name!r} has lost scores of its selection; select again")
    return {name: evaluation for name, evaluation in known.items() if evaluation is not None}


def _key(split: str, of: str, plan: str) -> str:
    return f"moeopt:{split}:{of}:{plan}"
