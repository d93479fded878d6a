"""Optimisers compared over repeated seeds: what studies found for what they spent, and what may be concluded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "Comparison": "comparison",
    "HeldOut": "runs",
    "Optimiser": "comparison",
    "Pair": "comparison",
    "Run": "runs",
    "compare": "comparison",
    "read": "runs",
    "view": "summary",
}

__all__ = ["Comparison", "HeldOut", "Optimiser", "Pair", "Run", "compare", "read", "view"]

if TYPE_CHECKING:
    from moeopt.results.optimiser_comparison.comparison import Comparison, Optimiser, Pair, compare
    from moeopt.results.optimiser_comparison.runs import HeldOut, Run, read
    from moeopt.results.optimiser_comparison.summary import view


__getattr__ = lazily(__name__, _HOMES)
"""Arguments can be checked without numpy and Optuna."""
