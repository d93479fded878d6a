"""Comparing on one task: the full model, random prunings, one-shot methods and what a search found.

It may import rooms up to `study`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import homes, lazily

__all__ = [
    "Calibrated", "ComparisonError", "MethodComparison", "Row", "Size", "check", "check_folder", "check_methods",
    "compare",
]  # fmt: skip

if TYPE_CHECKING:
    from moeopt.results.method_comparison.checks import ComparisonError, check, check_folder, check_methods
    from moeopt.results.method_comparison.comparison import Calibrated, MethodComparison, Row, Size
    from moeopt.results.method_comparison.run import compare

__getattr__ = lazily(
    __name__,
    homes(
        checks="ComparisonError check check_folder check_methods", comparison="Calibrated MethodComparison Row Size",
        run="compare",
    ),
)  # fmt: skip
"""Arguments can be checked without torch."""
