"""What people look at: tables, files and figures of results, terminal tables, the dashboard.

`view` shows a plan, an evaluation or a result of `moeopt.results`, `html` draws that for notebooks, `save` writes a
result to files. This room may import all below the demo.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.lazily import lazily
from moeopt.showing import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeopt.report import dashboard, figures, optimiser_comparison, terminal

__all__ = ["dashboard", "figures", "html", "optimiser_comparison", "save", "terminal", "view"]


NARROWEST, WIDEST = 110, 180
"""Characters of a line in a notebook, which follow the widest table."""
PRE = (
    '<pre style="white-space: pre; overflow-x: auto; line-height: normal; '
    "font-family: Menlo, 'DejaVu Sans Mono', consolas, 'Courier New', monospace\">{code}</pre>"
)


def view(shown: Shown) -> RenderableType:
    """A plan, an evaluation, or a result of `moeopt.results` with all its tables and sentences, to print with rich."""
    return _page_of(shown).view(shown)  # type: ignore[no-any-return]


def html(shown: Shown) -> str:
    """What `view` gives as HTML that takes its colours from the page around it; all text is escaped.

    Notebooks show plans, evaluations and results so by themselves.
    """
    from io import StringIO

    from rich.console import Group
    from rich.table import Table

    from moeopt.report.terminal import Terminal

    drawn = view(shown)
    terminal = Terminal(file=StringIO(), record=True, width=WIDEST, color_system="truecolor", force_jupyter=False)
    tables = [part for part in (drawn.renderables if isinstance(drawn, Group) else [drawn]) if isinstance(part, Table)]
    terminal.width = max(NARROWEST, *(terminal.measure(part).maximum for part in tables))
    terminal.print(drawn)
    return terminal.export_html(inline_styles=True, code_format=PRE)


def save(result: Any, path: str | os.PathLike[str]) -> None:
    """Write a result of `moeopt.results`: a comparison into a folder, a selection or a profile to a JSON file.

    A front or similarity goes to a page, a table, JSON or a picture, as the path ends in .html, .csv, .json or .png.

    Raises:
        MoeoptError: of the result's kind, when it cannot be written.
    """
    page = _page_of(result)
    if not hasattr(page, "save"):
        raise TypeError(f"a result of moeopt.results is written, got {type(result).__name__}")
    page.save(result, Path(path))


def _page_of(shown: Any) -> Any:
    """The module here that is named as the room that made it."""
    if not isinstance(shown, Shown):
        raise TypeError(f"a plan, an evaluation or a result of moeopt.results is shown, got {type(shown).__name__}")
    home = next(each.__module__ for each in type(shown).__mro__ if each.__module__.startswith("moeopt."))
    _, room, *rest = home.split(".")
    return import_module(f"moeopt.report.{rest[0] if room == 'results' else room}")


__getattr__ = lazily(__name__, {}, __all__)
