"""One-shot methods of the literature: calibration data in, one `Plan` out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "METHODS": "registry",
    "ROUTERS": "names",
    "Calibration": "calibration",
    "Found": "registry",
    "Method": "base",
    "Refit": "refitting",
    "Seen": "seen",
    "Wanted": "base",
    "check": "names",
    "get": "registry",
    "parsed": "names",
    "plan": "registry",
    "plans": "registry",
    "refit": "refitting",
    "skipping": "thresholds",
}

__all__ = [
    "METHODS",
    "ROUTERS",
    "Calibration",
    "Found",
    "Method",
    "Refit",
    "Seen",
    "Wanted",
    "check",
    "get",
    "parsed",
    "plan",
    "plans",
    "refit",
    "skipping",
]

if TYPE_CHECKING:
    from moeopt.methods.base import Method, Wanted
    from moeopt.methods.calibration import Calibration
    from moeopt.methods.names import ROUTERS, check, parsed
    from moeopt.methods.refitting import Refit, refit
    from moeopt.methods.registry import METHODS, Found, get, plan, plans
    from moeopt.methods.seen import Seen
    from moeopt.methods.thresholds import skipping


__getattr__ = lazily(__name__, _HOMES)
"""Names can be checked without torch."""
