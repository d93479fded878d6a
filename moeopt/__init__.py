"""moeopt: make Mixture-of-Experts language models smaller and faster for a task, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import lazily
from moeopt.showing import Shown

__version__ = "0.1.0"

__all__ = [
    "ActiveSpace",
    "EEPSpace",
    "Evaluator",
    "Guard",
    "LayerPlan",
    "MergeSpace",
    "ModelShape",
    "MoeoptError",
    "Objective",
    "Plan",
    "PruneSpace",
    "RacingPruner",
    "__version__",
    "create_study",
    "demo",
    "enqueue",
    "errors",
    "evaluation",
    "export",
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
    "refit",
    "report",
    "results",
    "run_worker",
    "samplers",
    "select",
    "shape_of",
    "spaces",
    "study",
    "tasks",
]

if TYPE_CHECKING:
    from moeopt import (
        demo,
        errors,
        evaluation,
        methods,
        models,
        report,
        results,
        samplers,
        spaces,
        study,
        tasks,
    )
    from moeopt.errors import MoeoptError
    from moeopt.evaluation import Evaluator, paired_bootstrap
    from moeopt.exporting import export
    from moeopt.models import load, moe_layers, patched, shape_of
    from moeopt.plan import LayerPlan, ModelShape, Plan
    from moeopt.results.profiling import profile
    from moeopt.results.selection import select
    from moeopt.samplers.racing import RacingPruner
    from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace
    from moeopt.study import create_study, enqueue, load_study, optimize
    from moeopt.study.guards import Guard
    from moeopt.study.objective import Objective
    from moeopt.study.storage import open_storage
    from moeopt.study.workers.worker import run_worker

__getattr__ = lazily(
    __name__,
    {
        "ActiveSpace": "moeopt.spaces",
        "EEPSpace": "moeopt.spaces",
        "Guard": "moeopt.study.guards",
        "LayerPlan": "moeopt.plan",
        "MergeSpace": "moeopt.spaces",
        "ModelShape": "moeopt.plan",
        "MoeoptError": "moeopt.errors",
        "Objective": "moeopt.study.objective",
        "Plan": "moeopt.plan",
        "PruneSpace": "moeopt.spaces",
        "RacingPruner": "moeopt.samplers.racing",
        "create_study": "moeopt.study",
        "enqueue": "moeopt.study",
        "export": "moeopt.exporting",
        "load": "moeopt.models",
        "load_study": "moeopt.study",
        "moe_layers": "moeopt.models",
        "open_storage": "moeopt.study.storage",
        "optimize": "moeopt.study",
        "paired_bootstrap": "moeopt.evaluation",
        "patched": "moeopt.models",
        "select": "moeopt.results.selection",
        "profile": "moeopt.results.profiling",
        "refit": "moeopt.methods",
        "run_worker": "moeopt.study.workers.worker",
        "shape_of": "moeopt.models",
        "Evaluator": "moeopt.evaluation",
    },
    rooms=(
        "demo",
        "errors",
        "evaluation",
        "methods",
        "models",
        "report",
        "results",
        "samplers",
        "spaces",
        "study",
        "tasks",
    ),
)


def __dir__() -> list[str]:
    return __all__


def _drawn(shown: Shown) -> str:
    from moeopt.report import html

    return html(shown)


Shown.drawn = staticmethod(_drawn)
