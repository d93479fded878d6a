"""Comparing on one task: the full model, random prunings, one-shot methods and what a search found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "Calibrated": "comparison",
    "Comparison": "comparison",
    "ComparisonError": "checks",
    "Row": "comparison",
    "Size": "comparison",
    "check": "checks",
    "check_folder": "checks",
    "check_methods": "checks",
    "compare": "run",
    "view": "table",
}

__all__ = [
    "Calibrated",
    "Comparison",
    "ComparisonError",
    "Row",
    "Size",
    "check",
    "check_folder",
    "check_methods",
    "compare",
    "view",
]

if TYPE_CHECKING:
    from moeopt.results.method_comparison.checks import ComparisonError, check, check_folder, check_methods
    from moeopt.results.method_comparison.comparison import Calibrated, Comparison, Row, Size
    from moeopt.results.method_comparison.run import compare
    from moeopt.results.method_comparison.table import view


__getattr__ = lazily(__name__, _HOMES)
"""Arguments can be checked without torch."""
