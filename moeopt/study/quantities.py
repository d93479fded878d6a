"""What a plan's objectives beside its scores are: how large, and how much of the model a token runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from moeopt.errors import ExportError, ModelError
from moeopt.study.scores import active_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.evaluation import Evaluation
    from moeopt.plan import Plan


class Quantity(Protocol):
    """A number of a plan, less being better."""

    def __call__(self, plan: Plan, evaluation: Evaluation | None) -> float:
        """The number; of a plan that is not evaluated yet where `needs_evaluation` is not set."""

    needs_evaluation: bool

    def describe(self) -> Any:
        """What a study must agree on to be resumed, JSON; None where that follows from model and space."""


class Bytes:
    """Bytes of the tensors of the checkpoint that `moeopt.export` writes for a plan, quantised as it is there.

    Of a model that was not loaded from a checkpoint which export reads: of its weights, in their dtypes in memory.

    Raises:
        ExportError: when called with a plan that cannot be exported from the checkpoint.
    """

    needs_evaluation = False

    def __init__(self, model: PreTrainedModel) -> None:
        from moeopt.exporting import ExportedBytes
        from moeopt.models.sizes import Sizes

        self._count: Callable[[Plan], int]
        try:
            self._count = checkpoint = ExportedBytes(model)
            self._about = {"of": "checkpoint", "full": checkpoint.full}
        except (ExportError, ModelError):
            sizes = Sizes(model)
            self._count = lambda plan: sizes.under(plan).bytes
            self._about = {"of": "memory", "full": sizes.under().bytes}

    def __call__(self, plan: Plan, evaluation: Evaluation | None) -> float:
        return float(self._count(plan))

    def describe(self) -> Any:
        return self._about


class Active:
    """Experts that a token runs in an MoE layer, on average."""

    needs_evaluation = True

    def __init__(self, model: PreTrainedModel) -> None:
        pass

    def __call__(self, plan: Plan, evaluation: Evaluation | None) -> float:
        assert evaluation is not None
        return active_experts(evaluation)

    def describe(self) -> Any:
        return None


QUANTITIES: dict[str, Callable[[PreTrainedModel], Quantity]] = {"bytes": Bytes, "active": Active}
"""By the name of the objective."""
