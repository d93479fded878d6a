"""Which trials ended last: a database that is set back to an earlier state undoes what happened last."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

LAST = 2
"""Trials of those that ended last which are looked at again."""


class LastEnds:
    """The trials of each study that were seen to end last."""

    def __init__(self) -> None:
        self._last: dict[int, dict[int, tuple[int, TrialState, datetime | None]]] = {}

    def trial_ids(self, study_id: int) -> set[int]:
        """Keys of those of a study."""
        return {*self._last.get(study_id, {})}

    def agree(self, study_id: int, trials: Sequence[FrozenTrial], *, with_last: bool) -> bool:
        """Note what ended; whether trials that were read, among them `trial_ids`, are as they were seen."""
        last = self._last.get(study_id, {}) if with_last else {}
        ends = {t._trial_id: (t.number, t.state, t.datetime_complete) for t in trials if t.state.is_finished()}
        if last.items() - ends.items():
            return False
        if new := sorted(ends.keys() - last.keys(), key=lambda trial_id: (str(ends[trial_id][2]), trial_id)):
            self._last[study_id] = {trial_id: ends[trial_id] for trial_id in new[-LAST:]}
        return True
