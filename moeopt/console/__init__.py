"""What moeopt shows on a terminal: the progress of a search, tables of plans and of studies."""

from moeopt.console.formatting import number, percent
from moeopt.console.plans import layer_rows, plan_table, short
from moeopt.console.progress import SearchProgress, Steps
from moeopt.console.studies import (
    json_text,
    studies_table,
    study_record,
    study_summary,
    study_view,
    trial_record,
)
from moeopt.console.terminal import Terminal, consoles

__all__ = [
    "SearchProgress",
    "Steps",
    "Terminal",
    "consoles",
    "json_text",
    "layer_rows",
    "number",
    "percent",
    "plan_table",
    "short",
    "studies_table",
    "study_record",
    "study_summary",
    "study_view",
    "trial_record",
]
