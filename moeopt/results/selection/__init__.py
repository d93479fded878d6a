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
    "judged_refit": "refits",
    "select": "run",
    "selected_trial": "record",
    "on_test": "kept",
    "verdict": "record",
    "view": "table",
}

__all__ = [
    "SELECTION",
    "Candidate",
    "Held",
    "Selection",
    "check",
    "held",
    "judged_refit",
    "on_test",
    "recorded",
    "select",
    "selected_trial",
    "verdict",
    "view",
]

if TYPE_CHECKING:
    from moeopt.results.selection.checks import check
    from moeopt.results.selection.gains import Held, held
    from moeopt.results.selection.kept import on_test
    from moeopt.results.selection.record import SELECTION, Candidate, Selection, recorded, selected_trial, verdict
    from moeopt.results.selection.refits import judged_refit
    from moeopt.results.selection.run import select
    from moeopt.results.selection.table import view


__getattr__ = lazily(__name__, _HOMES)
"""A record can be read without torch."""
