"""Profiling: size, memory, speed and load balance of models side by side, as in the EEP paper's profile of pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

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
]

if TYPE_CHECKING:
    from moeopt.results.profiling.checks import ProfileError, Setting, check, check_out
    from moeopt.results.profiling.result import LayerLoad, Profile, Ratio, Row, Speed
    from moeopt.results.profiling.run import profile, unique


__getattr__ = lazily(__name__, _HOMES)
"""Only the workers need torch."""
