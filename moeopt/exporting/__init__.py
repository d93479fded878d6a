"""Export: a plan and the full checkpoint in, a smaller checkpoint out, that needs nothing of moeopt to load.

It imports `plan`, `models`, `evaluation` and `methods` (to measure what a projection costs), and `trials`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "SHARD_BYTES": "exporter",
    "ExportedBytes": "counting",
    "Form": "stock",
    "Projection": "projecting",
    "Verification": "verifying",
    "best_stock_trial": "trials",
    "check_folder": "folders",
    "check_push": "pushing",
    "chosen_form": "stock",
    "export": "exporter",
    "locate": "folders",
    "plan_of": "trials",
    "project": "projecting",
    "push": "pushing",
    "stock_form": "stock",
    "verify": "verifying",
    "why_not_stock": "stock",
}

__all__ = [
    "SHARD_BYTES",
    "ExportedBytes",
    "Form",
    "Projection",
    "Verification",
    "best_stock_trial",
    "check_folder",
    "check_push",
    "chosen_form",
    "export",
    "locate",
    "plan_of",
    "project",
    "push",
    "stock_form",
    "verify",
    "why_not_stock",
]

if TYPE_CHECKING:
    from moeopt.exporting.counting import ExportedBytes
    from moeopt.exporting.exporter import SHARD_BYTES, export
    from moeopt.exporting.folders import check_folder, locate
    from moeopt.exporting.projecting import Projection, project
    from moeopt.exporting.pushing import check_push, push
    from moeopt.exporting.stock import Form, chosen_form, stock_form, why_not_stock
    from moeopt.exporting.trials import best_stock_trial, plan_of
    from moeopt.exporting.verifying import Verification, verify

__getattr__ = lazily(__name__, _HOMES)
"""Folders and plans can be checked without torch."""
