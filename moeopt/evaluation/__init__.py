"""A plan in, losses of a task's examples out, for as few passes as that takes. May import plan/, models/ and tasks/."""

from moeopt.evaluation.evaluation import Evaluation
from moeopt.evaluation.evaluator import Evaluator
from moeopt.evaluation.generating import Generation
from moeopt.evaluation.lm_eval_report import HarnessReport, HarnessResult, lm_eval_report
from moeopt.evaluation.noise import NoiseFloor, noise_floor
from moeopt.evaluation.teacher import Compression, Teacher
from moeopt.statistics import Interval, paired_bootstrap

__all__ = [
    "Compression",
    "Evaluation",
    "Evaluator",
    "Generation",
    "HarnessReport",
    "HarnessResult",
    "Interval",
    "NoiseFloor",
    "Teacher",
    "lm_eval_report",
    "noise_floor",
    "paired_bootstrap",
]
