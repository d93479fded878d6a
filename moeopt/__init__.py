"""moeopt: make Mixture-of-Experts language models smaller and faster for a task, without gradients."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ActiveSpace": "moeopt.spaces",
    "EEPSpace": "moeopt.spaces",
    "LayerPlan": "moeopt.plan",
    "MergeSpace": "moeopt.spaces",
    "ModelShape": "moeopt.plan",
    "MoeoptError": "moeopt.errors",
    "Objective": "moeopt.objective",
    "Plan": "moeopt.plan",
    "PruneSpace": "moeopt.spaces",
    "RacingPruner": "moeopt.racing",
    "create_study": "moeopt.study",
    "enqueue": "moeopt.study",
    "export": "moeopt.exporting",
    "load": "moeopt.models",
    "load_study": "moeopt.study",
    "moe_layers": "moeopt.models",
    "open_storage": "moeopt.storage",
    "optimize": "moeopt.study",
    "paired_bootstrap": "moeopt.evaluation",
    "patched": "moeopt.models",
    "select": "moeopt.selection",
    "profile": "moeopt.profiling",
    "refit": "moeopt.methods",
    "run_worker": "moeopt.worker",
    "shape_of": "moeopt.models",
    "Evaluator": "moeopt.evaluation",
}
_ROOMS = {
    "analysis",
    "benchmarking",
    "comparing",
    "dashboard",
    "demo",
    "errors",
    "evaluation",
    "figures",
    "methods",
    "models",
    "profiling",
    "reference",
    "samplers",
    "selection",
    "spaces",
    "storage",
    "study",
    "tasks",
}

__all__ = [
    "ActiveSpace",
    "EEPSpace",
    "Evaluator",
    "LayerPlan",
    "MergeSpace",
    "ModelShape",
    "MoeoptError",
    "Objective",
    "Plan",
    "PruneSpace",
    "RacingPruner",
    "__version__",
    "analysis",
    "benchmarking",
    "comparing",
    "create_study",
    "dashboard",
    "demo",
    "enqueue",
    "errors",
    "evaluation",
    "export",
    "figures",
    "load",
    "load_study",
    "methods",
    "models",
    "moe_layers",
    "open_storage",
    "optimize",
    "paired_bootstrap",
    "patched",
    "profile",
    "profiling",
    "reference",
    "refit",
    "run_worker",
    "samplers",
    "select",
    "selection",
    "shape_of",
    "spaces",
    "storage",
    "study",
    "tasks",
]

if TYPE_CHECKING:
    from moeopt import (
        analysis,
        benchmarking,
        comparing,
        dashboard,
        demo,
        errors,
        evaluation,
        figures,
        methods,
        models,
        profiling,
        reference,
        samplers,
        selection,
        spaces,
        storage,
        study,
        tasks,
    )
    from moeopt.errors import MoeoptError
    from moeopt.evaluation import Evaluator, paired_bootstrap
    from moeopt.exporting import export
    from moeopt.models import load, moe_layers, patched, shape_of
    from moeopt.objective import Objective
    from moeopt.plan import LayerPlan, ModelShape, Plan
    from moeopt.profiling import profile
    from moeopt.racing import RacingPruner
    from moeopt.selection import select
    from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace
    from moeopt.storage import open_storage
    from moeopt.study import create_study, enqueue, load_study, optimize
    from moeopt.worker import run_worker


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import moeopt` stays fast."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return import_module(f"moeopt.{name}")
    raise AttributeError(f"module 'moeopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
