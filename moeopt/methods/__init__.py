"""One-shot methods of the literature, and refits: calibration data in, one `Plan` out.

It imports `plan`, `models`, `tasks`, `evaluation` and `trials` (for guides).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

_HOMES = {
    "METHODS": "registry",
    "ROUTERS": "names",
    "Budget": "base",
    "Calibration": "calibration",
    "LayerActivations": "layer_activations",
    "Method": "base",
    "MethodPlan": "base",
    "Refit": "refitting",
    "allocate": "budgets",
    "check": "names",
    "check_ranks": "names",
    "get": "registry",
    "parsed": "names",
    "plan": "registry",
    "plans": "registry",
    "ranking": "ordering",
    "refit": "refitting",
    "skipping": "thresholds",
}

__all__ = [
    "METHODS",
    "ROUTERS",
    "Budget",
    "Calibration",
    "LayerActivations",
    "Method",
    "MethodPlan",
    "Refit",
    "allocate",
    "check",
    "check_ranks",
    "get",
    "parsed",
    "plan",
    "plans",
    "ranking",
    "refit",
    "skipping",
]

if TYPE_CHECKING:
    from moeopt.methods.base import Budget, Method, MethodPlan
    from moeopt.methods.budgets import allocate
    from moeopt.methods.calibration import Calibration
    from moeopt.methods.layer_activations import LayerActivations
    from moeopt.methods.names import ROUTERS, check, check_ranks, parsed
    from moeopt.methods.ordering import ranking
    from moeopt.methods.refitting import Refit, refit
    from moeopt.methods.registry import METHODS, get, plan, plans
    from moeopt.methods.thresholds import skipping

__getattr__ = lazily(__name__, _HOMES)
"""Names can be checked without torch."""
