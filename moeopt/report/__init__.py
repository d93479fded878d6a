"""What people look at: tables, files and figures of results, terminal tables, the dashboard.

`view` shows a result of `moeopt.results`, `save` writes it to files. This room may import all below the demo.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeopt.report import dashboard, figures, optimiser_comparison, terminal

__all__ = ["dashboard", "figures", "optimiser_comparison", "save", "terminal", "view"]


def view(result: Any) -> RenderableType:
    """A result of `moeopt.results` with all its tables and what they say, to print with rich."""
    return _page_of(result).view(result)  # type: ignore[no-any-return]


def save(result: Any, path: str | os.PathLike[str]) -> None:
    """Write a result of `moeopt.results`: a comparison into a folder, a selection or a profile to a JSON file.

    A front or similarity goes to a page, a table, JSON or a picture, as the path ends in .html, .csv, .json or .png.

    Raises:
        MoeoptError: of the result's kind, when it cannot be written.
    """
    _page_of(result).save(result, Path(path))


def _page_of(result: Any) -> Any:
    """The module here that is named as the room of results that made it."""
    package, _, module = type(result).__module__.partition(".results.")
    if package != "moeopt":
        raise TypeError(f"a result of moeopt.results is shown, got {type(result).__name__}")
    return import_module(f"moeopt.report.{module.partition('.')[0]}")


__getattr__ = lazily(__name__, {}, __all__)
