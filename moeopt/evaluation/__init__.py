"""Evaluation: run a plan over a task, compare plans."""

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
