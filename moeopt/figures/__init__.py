"""Figures of the EEP and NAEE papers from plain arrays, drawn with plotly, written as HTML or, without a browser, PNG.

Nothing here knows a model or a study: arrays in, a `plotly.graph_objects.Figure` out.

    figure = activation_pattern(before, after)
    write_html(figure, "experts.html")
    write_png(figure, "experts.png")
"""

from moeopt.errors import FigureError
from moeopt.figures.activation import activation_pattern
from moeopt.figures.ensemble import ensemble_curve
from moeopt.figures.kept_sets import kept_set_errors
from moeopt.figures.methods import methods_bar
from moeopt.figures.saving import write_html, write_png

__all__ = [
    "FigureError",
    "activation_pattern",
    "ensemble_curve",
    "kept_set_errors",
    "methods_bar",
    "write_html",
    "write_png",
]
