"""What is written of a trial or a study in one transaction, and on what condition."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Attrs = Mapping[str, Any]
Params = Mapping[str, tuple[Any, "BaseDistribution"]]


@dataclass(frozen=True)
class Taken:
    """Nothing is written where another trial has this plan that was not known when the plan was made.

    Args:
        study_id: Optuna's key of the study.
        plan: its fingerprint.
        newest: the largest key of the trials that were known.
        open: keys of those of them whose plan was not.
    """

    study_id: int
    plan: str
    newest: int
    open: Collection[int]
