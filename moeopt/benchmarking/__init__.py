"""Optimisers compared over repeated seeds: what studies found for what they spent, and what may be concluded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from moeopt.benchmarking.comparison import Comparison, Optimiser, Pair, compare
    from moeopt.benchmarking.runs import HeldOut, Run, read
    from moeopt.benchmarking.summary import view


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: arguments can be checked without numpy and Optuna."""
    if name in _HOMES:
        return getattr(import_module(f"moeopt.benchmarking.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moeopt.benchmarking' has no attribute {name!r}")
