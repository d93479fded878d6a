"""What a trial keeps of its evaluation, example by example, and what that says of its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from moeopt.errors import NonFiniteLossError
from moeopt.evaluation import Evaluation
from moeopt.plan import Plan
from moeopt.samplers import racing
from moeopt.study.storage import attributes
from moeopt.trials import genome

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

COPIED_FROM = "copied_from"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
ACTIVE = "active"
"""Key, in the head of a trial's scores, of the experts active per token and layer over the same examples."""


def packed(evaluation: Evaluation, scores_name: str, active_weight: float) -> dict[str, Any]:
    """Attributes of a trial that hold an evaluation's scores, of what `scores_name` names."""
    attrs = genome.pack(genome.SCORES, evaluation.scores.reshape(-1))
    attrs[genome.SCORES] |= {"of": scores_name, ACTIVE: evaluation.active}
    if active_weight:
        attrs[genome.SCORES][racing.PENALTY] = penalty(active_weight, evaluation)
    return attrs


def remembered(trial: FrozenTrial, plan: Plan, scores_name: str) -> Evaluation | None:
    """What a trial's scores say of its plan; None where they are of something else than `scores_name` names."""
    scores = genome.read_scores(trial) if genome.scores_of(trial) == scores_name else None
    if scores is None:
        return None
    active = trial.system_attrs[genome.SCORES].get(ACTIVE)
    if active is None:  # scores of an older version, which searched no skipping
        if any(layer.skip for layer in plan.layers):
            return None
        active = sum(layer.k for layer in plan.layers) / len(plan.layers)
    return Evaluation(scores[0], scores[1], scores[2], 0, 0, 0.0, float(active))


def evaluated_before(
    study: optuna.Study, trial: optuna.trial.BaseTrial, plan: Plan, scores_name: str, facts: dict[str, Any]
) -> Evaluation | None:
    """What the trial that knows most knows of a trial's plan on the first examples; `facts` come to say which it is.

    Raises:
        NonFiniteLossError: when the plan's loss is known not to be finite.
    """
    frozen, name = attributes.frozen_trial(trial), plan.fingerprint
    most, origin = remembered(frozen, plan, scores_name), genome.origin(frozen)
    if "plan" not in origin:
        attributes.write(study, trial, {genome.ORIGIN: {**origin, "plan": name}})
    for other in study.get_trials(deepcopy=False, states=FINISHED):
        if genome.origin(other).get("plan") != name:
            continue
        if other.system_attrs.get(genome.NOT_FINITE) == scores_name:
            facts[COPIED_FROM] = other.number
            raise NonFiniteLossError(str(other.user_attrs.get(genome.FAILURE)), layer=None)
        evaluation = remembered(other, plan, scores_name)
        if evaluation is not None and (most is None or len(evaluation.losses) > len(most.losses)):
            most = evaluation
            facts[COPIED_FROM] = other.number
    return most


def active_experts(evaluation: Evaluation) -> float:
    """Experts that a token ran in an MoE layer, on average, as trials note it."""
    return round(evaluation.active, 4)


def penalty(active_weight: float, evaluation: Evaluation) -> float:
    """What the active experts of an evaluation add to its loss, at `active_weight` an expert."""
    return active_weight * active_experts(evaluation) if active_weight else 0.0
