"""What a trial keeps of its evaluation, example by example, and what that says of its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeopt.evaluation import Evaluation
from moeopt.plan import Plan
from moeopt.samplers import racing
from moeopt.trials import genome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

ACTIVE = "active"
"""Key, in the head of a trial's scores, of the experts active per token and layer over the same examples."""


def packed(evaluation: Evaluation, of: str, active_weight: float) -> dict[str, Any]:
    """Attributes of a trial that hold an evaluation's scores, which are `of` what `scores_name` says."""
    attrs = genome.pack(genome.SCORES, evaluation.scores.reshape(-1))
    attrs[genome.SCORES] |= {"of": of, ACTIVE: evaluation.active}
    if active_weight:
        attrs[genome.SCORES][racing.PENALTY] = penalty(active_weight, evaluation)
    return attrs


def remembered(trial: FrozenTrial, plan: Plan, of: str) -> Evaluation | None:
    """What a trial's scores say of its plan; None where they are of something else than `scores_name` names."""
    scores = genome.read_scores(trial) if genome.scores_of(trial) == of else None
    if scores is None:
        return None
    active = trial.system_attrs[genome.SCORES].get(ACTIVE)
    if active is None:  # scores of an older version, which searched no skipping
        if any(layer.skip for layer in plan.layers):
            return None
        active = sum(layer.k for layer in plan.layers) / len(plan.layers)
    return Evaluation(scores[0], scores[1], scores[2], 0, 0, 0.0, float(active))


def active_experts(evaluation: Evaluation) -> float:
    """Experts that a token ran in an MoE layer, on average, as trials note it."""
    return round(evaluation.active, 4)


def penalty(active_weight: float, evaluation: Evaluation) -> float:
    """What the active experts of an evaluation add to its loss, at `active_weight` an expert."""
    return active_weight * active_experts(evaluation) if active_weight else 0.0
