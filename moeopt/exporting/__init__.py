"""Export: a plan and the full checkpoint in, a smaller checkpoint out, that needs nothing of moeopt to load.

It imports `plan`, `models`, `evaluation` and `methods` (to measure what a projection costs), and `trials`.
"""

from moeopt.exporting.exporter import SHARD_BYTES, Form, chosen_form, export
from moeopt.exporting.projecting import Projection, project
from moeopt.exporting.source import locate
from moeopt.exporting.stock import stock_form, why_not_stock
from moeopt.exporting.trials import best_stock_trial, plan_of
from moeopt.exporting.verifying import Verification, verify
from moeopt.exporting.writing import check_folder

__all__ = [
    "SHARD_BYTES",
    "Form",
    "Projection",
    "Verification",
    "best_stock_trial",
    "check_folder",
    "chosen_form",
    "export",
    "locate",
    "plan_of",
    "project",
    "stock_form",
    "verify",
    "why_not_stock",
]
