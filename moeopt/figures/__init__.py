"""Figures of the EEP and NAEE papers and of searches, from plain arrays, drawn with plotly.

They are written as HTML, or as PNG without a browser.

Nothing here knows a model or a study: arrays in, a `plotly.graph_objects.Figure` out.

    figure = activation_pattern(before, after)
    write_html(figure, "experts.html")
    write_png(figure, "experts.png")
"""

from moeopt.errors import FigureError
from moeopt.figures.activation import activation_pattern
from moeopt.figures.ensemble import ensemble_curve
from moeopt.figures.importance import layer_importance
from moeopt.figures.kept_experts import kept_experts
from moeopt.figures.kept_sets import kept_set_errors
from moeopt.figures.lineage import lineage
from moeopt.figures.matrices import plan_matrices
from moeopt.figures.methods import methods_bar
from moeopt.figures.saving import write_html, write_png
from moeopt.figures.search import search_progress

__all__ = [
    "FigureError",
    "activation_pattern",
    "ensemble_curve",
    "kept_experts",
    "kept_set_errors",
    "layer_importance",
    "lineage",
    "methods_bar",
    "plan_matrices",
    "search_progress",
    "write_html",
    "write_png",
]
