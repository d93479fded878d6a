"""Comparing on one task: the full model, random prunings, one-shot methods and what a search found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "Calibrated": "comparison",
    "ComparisonError": "checks",
    "MethodComparison": "comparison",
    "Row": "comparison",
    "Size": "comparison",
    "check": "checks",
    "check_folder": "checks",
    "check_methods": "checks",
    "compare": "run",
}

__all__ = [
    "Calibrated",
    "ComparisonError",
    "MethodComparison",
    "Row",
    "Size",
    "check",
    "check_folder",
    "check_methods",
    "compare",
]

if TYPE_CHECKING:
    from moeopt.results.method_comparison.checks import ComparisonError, check, check_folder, check_methods
    from moeopt.results.method_comparison.comparison import Calibrated, MethodComparison, Row, Size
    from moeopt.results.method_comparison.run import compare


__getattr__ = lazily(__name__, _HOMES)
"""Arguments can be checked without torch."""
