"""What moeopt shows on a terminal: the progress of a search, tables of plans and of studies.

It may import all below `moeopt.report`, and its tables and formatting.
"""

from moeopt.report.terminal.needs import needs_table
from moeopt.report.terminal.plans import layer_rows, plan_table, short
from moeopt.report.terminal.progress import SearchProgress, Steps
from moeopt.report.terminal.studies import studies_table, study_record, study_summary, study_view, trial_record
from moeopt.report.terminal.terminal import Terminal, consoles

__all__ = [
    "SearchProgress",
    "Steps",
    "Terminal",
    "consoles",
    "layer_rows",
    "needs_table",
    "plan_table",
    "short",
    "studies_table",
    "study_record",
    "study_summary",
    "study_view",
    "trial_record",
]
