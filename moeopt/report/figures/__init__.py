"""Figures of the EEP and NAEE papers and of searches, from plain arrays, drawn with plotly.

They are written as HTML pages (`pages`), or as PNG without a browser. Arrays in, a `plotly.graph_objects.Figure` out:
nothing here knows a model or a study, and of moeopt only `plan` and the lowest floor are imported.

    figure = activation_pattern(before, after)
    write_html(figure, "experts.html")
    write_png(figure, "experts.png")
"""

from moeopt.errors import FigureError
from moeopt.report.figures.activation import activation_pattern
from moeopt.report.figures.ensemble import ensemble_curve
from moeopt.report.figures.front import front
from moeopt.report.figures.importance import layer_importance
from moeopt.report.figures.kept_experts import kept_experts
from moeopt.report.figures.kept_sets import kept_set_errors
from moeopt.report.figures.lineage import lineage
from moeopt.report.figures.matrices import plan_matrices
from moeopt.report.figures.methods import methods_bar
from moeopt.report.figures.saving import write_html, write_png
from moeopt.report.figures.search import search_progress
from moeopt.report.figures.task_similarity import task_similarity

__all__ = [
    "FigureError",
    "activation_pattern",
    "ensemble_curve",
    "front",
    "kept_experts",
    "kept_set_errors",
    "layer_importance",
    "lineage",
    "methods_bar",
    "plan_matrices",
    "search_progress",
    "task_similarity",
    "write_html",
    "write_png",
]
