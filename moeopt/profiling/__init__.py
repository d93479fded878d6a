"""Profiling: size, memory, speed and load balance of models side by side, as in the EEP paper's profile of pruning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "LayerLoad": "result",
    "Profile": "result",
    "ProfileError": "checks",
    "Ratio": "result",
    "Row": "result",
    "Setting": "checks",
    "Speed": "result",
    "check": "checks",
    "check_out": "checks",
    "profile": "run",
    "unique": "run",
    "view": "table",
}

__all__ = [
    "LayerLoad",
    "Profile",
    "ProfileError",
    "Ratio",
    "Row",
    "Setting",
    "Speed",
    "check",
    "check_out",
    "profile",
    "unique",
    "view",
]

if TYPE_CHECKING:
    from moeopt.profiling.checks import ProfileError, Setting, check, check_out
    from moeopt.profiling.result import LayerLoad, Profile, Ratio, Row, Speed
    from moeopt.profiling.run import profile, unique
    from moeopt.profiling.table import view


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: only the workers need torch."""
    if name in _HOMES:
        return getattr(import_module(f"moeopt.profiling.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moeopt.profiling' has no attribute {name!r}")
