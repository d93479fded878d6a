"""Tasks: examples with scores, in splits that never overlap; the kinds here, the published ones in `lm_eval/`.

It imports errors and texts only; torch, datasets and lm-evaluation-harness never before a task needs them.
"""

from moeopt.tasks.base import SPLITS, Example, Request, Scores, Task
from moeopt.tasks.generation import GenerationTask
from moeopt.tasks.mixture import MixtureTask
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.registry import REGISTRY, get
from moeopt.tasks.text import TextTask

__all__ = [
    "REGISTRY",
    "SPLITS",
    "Example",
    "GenerationTask",
    "MixtureTask",
    "MultipleChoiceTask",
    "Request",
    "Scores",
    "Task",
    "TextTask",
    "get",
]
