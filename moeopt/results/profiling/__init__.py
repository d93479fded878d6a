"""Profiling: size, memory, speed and load balance of models side by side, as in the EEP paper's profile of pruning.

It may import rooms up to `models` and `tasks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import homes, lazily

__all__ = [
    "LayerLoad", "Profile", "ProfileError", "Ratio", "Row", "Setting", "Speed", "check", "check_out", "profile",
    "unique",
]  # fmt: skip

if TYPE_CHECKING:
    from moeopt.results.profiling.checks import ProfileError, Setting, check, check_out
    from moeopt.results.profiling.result import LayerLoad, Profile, Ratio, Row, Speed
    from moeopt.results.profiling.run import profile, unique

__getattr__ = lazily(
    __name__,
    homes(
        checks="ProfileError Setting check check_out", result="LayerLoad Profile Ratio Row Speed", run="profile unique"
    ),
)
"""Only the workers need torch."""
