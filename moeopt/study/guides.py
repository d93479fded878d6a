"""When a study gets a guide, and of which of its prunings."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import ModelError, StudyError
from moeopt.evaluation import Evaluator
from moeopt.evaluation.memory import ran_out
from moeopt.methods.guiding import Guiding
from moeopt.plan import Plan
from moeopt.spaces import Space
from moeopt.trials import genome, guide
from moeopt.trials.front import front

if TYPE_CHECKING:
    import optuna


class Guides:
    """Makes the guides of a study, within their share of its layer-tokens.

    Args:
        evaluator, space: of the objective.
        scores_name: `moeopt.evaluation.store.scores_name` of the evaluator.
        share: the largest share of the layer-tokens that guides may take, the first one aside.

    Raises:
        StudyError: when the evaluator's losses have no derivatives.
    """

    def __init__(self, evaluator: Evaluator, space: Space, scores_name: str, share: float) -> None:
        if evaluator.score == "metric":
            raise StudyError("guides are derivatives of the loss, and score='metric' has none: search score='choice'")
        try:
            self._guiding = Guiding(evaluator, scores_name)
        except ModelError as error:
            raise StudyError(f"no guide: its derivatives need a model that runs layer by layer: {error}") from error
        self._space, self._scores_name, self._share, self._layers = space, scores_name, share, evaluator.layers

    def next(self, study: optuna.Study, plan: Plan, loss: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Attributes for a trial that hold a guide of the study's best pruning so far, which may be the trial's `plan`.

        Of several objectives: of the pruning of the front that differs most from all that have one.

        There is none where that has a guide, where warm starts wait to be tried, and where guides would take more than
        their share of the layer-tokens. The trial's `layer_tokens`, in `facts`, come to count it.
        """
        trials = study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return {}
        trials = [trial for trial in trials if trial.state.is_finished()]
        best = front(study)
        if len(study.directions) > 1:
            plan = self._farthest(best, trials, plan)
        elif best and best[0].values[0] <= loss:
            plan = self._plan(best[0])
        cost, guides = self._guiding.layer_tokens, guide.cost(trials)
        guided = (plan.fingerprint, self._scores_name) in {guide.plan_of(trial) for trial in trials}
        if guided or not all(layer.kept is not None for layer in plan.layers):
            return {}
        # As if nothing were reused: whether there is a guide must not depend on the process that a trial ran in.
        tokens = facts["tokens"] + sum(int(trial.user_attrs.get("tokens", 0)) for trial in trials)
        if guides and guides + cost > self._share * (tokens * self._layers + guides + cost):
            return {}
        try:
            attrs = self._guiding.guide(plan).packed()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            warnings.warn(f"there is no guide, as memory ran out: {str(error).partition(chr(10))[0]}", stacklevel=3)
            return {}
        facts["layer_tokens"] += cost
        facts[guide.COST] = cost
        return attrs

    def _plan(self, trial: FrozenTrial) -> Plan:
        return self._space.decode(self._space.vector(trial))

    def _farthest(self, best: list[FrozenTrial], trials: list[FrozenTrial], plan: Plan) -> Plan:
        """The pruning of these trials, none of which has a guide, that differs most from all that have one.

        `plan` where there is none.
        """
        names = {named[0] for trial in trials if (named := guide.plan_of(trial)) and named[1] == self._scores_name}
        guided = {fingerprint: trial for trial in trials if (fingerprint := genome.origin(trial).get("plan")) in names}
        others = [_kept(self._plan(trial)) for trial in guided.values()]
        left = [each for each in map(self._plan, best) if each.fingerprint not in names and _kept(each) is not None]
        if not left or not others:
            return left[0] if left else plan

        def distance(each: Plan) -> int:
            kept = _kept(each)
            return min(int((kept != other).sum()) for other in others if kept is not None and other is not None)

        return max(left, key=distance)


def _kept(plan: Plan) -> NDArray[np.bool_] | None:
    """Experts that each layer keeps, (layers, n); None of a plan that is no pruning."""
    if any(layer.kept is None for layer in plan.layers):
        return None
    return np.stack([np.isin(np.arange(layer.experts), layer.kept or ()) for layer in plan.layers])
