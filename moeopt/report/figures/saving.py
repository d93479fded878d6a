"""Figures as files."""

from __future__ import annotations

import html
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from moeopt.errors import FigureError
from moeopt.files import write_atomically
from moeopt.report.figures import pages, style
from moeopt.report.figures.png import redrawn


def write_html(figure: style.Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as one HTML page that needs no network, light or dark; a file of that name is replaced whole.

    Raises:
        FigureError: when the folder does not exist, or `figure` is not a plotly figure.
    """
    target = _target(figure, path)
    title = html.unescape((figure.layout.title.text or "figure").replace("<br>", " "))
    write_atomically(target, pages.page(title, pages.place("figure", figure), {"figure": figure}).encode())


def write_png(
    figure: style.Figure,
    path: str | os.PathLike[str],
    *,
    width: int = style.WIDTH,
    height: int = style.HEIGHT,
    scale: float = 2,
) -> None:
    """Write a figure of `moeopt.report.figures` as a PNG of (width * scale, height * scale) pixels, without a browser.

    matplotlib draws it again. It knows heat maps, scatter traces of lines and markers with error bars, horizontal
    lines, panels in a row with titles, and one colour bar.

    Raises:
        FigureError: when the figure has anything else (the trace type is named), the size is out of range, or the
            folder does not exist.
    """
    target = _target(figure, path)
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 100 <= value <= 10_000:
            raise FigureError(f"{name} must be an integer between 100 and 10000 pixels, got {value!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0.25 <= scale <= 8:
        raise FigureError(f"scale must be a number between 0.25 and 8, got {scale!r}")
    buffer = io.BytesIO()
    redrawn(figure, int(width), int(height), float(scale)).print_png(buffer)
    write_atomically(target, buffer.getvalue())


def _target(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Where to write, if that and the figure will do."""
    if not isinstance(figure, style.plotly().Figure):
        raise FigureError(f"a plotly figure is needed, got {type(figure).__name__}")
    target = Path(path)
    if not target.parent.is_dir():
        raise FigureError(f"no folder {str(target.parent)!r} to write {target.name!r} into")
    if target.is_dir():
        raise FigureError(f"{str(target)!r} is a folder, not a file to write")
    return target
