"""Selecting one plan of a study: searched on one split, chosen on a second, reported on a third, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "Candidate": "record",
    "Held": "gains",
    "SELECTION": "record",
    "Selection": "record",
    "check": "checks",
    "held": "gains",
    "recorded": "record",
    "JudgedRefit": "refits",
    "judged_refit": "refits",
    "select": "run",
    "selected_trial": "record",
    "on_test": "evaluating",
    "verdict": "record",
}

__all__ = [
    "SELECTION",
    "Candidate",
    "Held",
    "JudgedRefit",
    "Selection",
    "check",
    "held",
    "judged_refit",
    "on_test",
    "recorded",
    "select",
    "selected_trial",
    "verdict",
]

if TYPE_CHECKING:
    from moeopt.results.selection.checks import check
    from moeopt.results.selection.evaluating import on_test
    from moeopt.results.selection.gains import Held, held
    from moeopt.results.selection.record import SELECTION, Candidate, Selection, recorded, selected_trial, verdict
    from moeopt.results.selection.refits import JudgedRefit, judged_refit
    from moeopt.results.selection.run import select


__getattr__ = lazily(__name__, _HOMES)
"""A record can be read without torch."""
