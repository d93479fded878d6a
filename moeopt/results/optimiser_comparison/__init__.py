"""Optimisers compared over repeated seeds, as arrays: what studies reached for what they spent, and paired tests.

It reads studies (`moeopt.study`, `results.selection`) and imports nothing that shows them: tables, sentences, files and
the page are in `moeopt.report.optimiser_comparison`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import homes, lazily

__all__ = ["HeldOut", "Optimiser", "OptimiserComparison", "Pair", "Run", "compare", "read"]

if TYPE_CHECKING:
    from moeopt.results.optimiser_comparison.comparison import Optimiser, OptimiserComparison, Pair, compare
    from moeopt.results.optimiser_comparison.runs import HeldOut, Run, read

__getattr__ = lazily(
    __name__, homes(comparison="Optimiser OptimiserComparison Pair compare", runs="HeldOut Run read")
)  # fmt: skip
"""Arguments can be checked without numpy and Optuna."""
