"""Selecting one plan of a study: searched on one split, chosen on a second, reported on a third, once.

It holds the selection, its record, and what is left on dev of a search's gain and of a refit's. It may import rooms up
to `study` and `exporting`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import homes, lazily

__all__ = [
    "SELECTION", "Candidate", "Held", "JudgedRefit", "Selection", "check", "check_goal", "fitting_trial",
    "held", "judged_refit", "on_test", "recorded", "select", "selected_trial", "verdict",
]  # fmt: skip

if TYPE_CHECKING:
    from moeopt.results.selection.candidates import fitting_trial
    from moeopt.results.selection.checks import check, check_goal
    from moeopt.results.selection.evaluating import on_test
    from moeopt.results.selection.gains import Held, JudgedRefit, held, judged_refit
    from moeopt.results.selection.record import Candidate, Selection, selected_trial, verdict
    from moeopt.results.selection.run import select
    from moeopt.trials.selected import SELECTION, recorded

__getattr__ = lazily(
    __name__,
    homes(
        candidates="fitting_trial", checks="check check_goal", evaluating="on_test", run="select",
        gains="Held JudgedRefit held judged_refit", record="Candidate Selection selected_trial verdict",
    ) | dict.fromkeys(("SELECTION", "recorded"), "moeopt.trials.selected"),
)  # fmt: skip
"""A record can be read without torch."""
