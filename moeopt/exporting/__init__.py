"""Export: a plan and the full checkpoint in, a smaller checkpoint out, that needs nothing of moeopt to load."""

from moeopt.exporting.exporter import SHARD_BYTES, Form, chosen_form, export
from moeopt.exporting.stock import stock_form, why_not_stock
from moeopt.exporting.trials import best_stock_trial, plan_of
from moeopt.exporting.writing import check_folder

__all__ = [
    "SHARD_BYTES",
    "Form",
    "best_stock_trial",
    "check_folder",
    "chosen_form",
    "export",
    "plan_of",
    "stock_form",
    "why_not_stock",
]
