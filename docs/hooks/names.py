"""The page of the names that moeopt itself offers, and a look whether the reference has every public name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

import moeopt

PAGE = "reference/index.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown + table() if page.file.src_uri == PAGE else markdown


def table() -> str:
    """A row for each name of moeopt, with where it stands and the first sentence that is said of it."""
    rows = ["\n\n| name | |", "|---|---|"]
    for name in sorted(set(moeopt.__all__) - {"__version__"}, key=lambda name: (name[0].islower(), name)):
        value = getattr(moeopt, name)
        said = re.split(r"(?<=[.]) ", " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()))[0]
        place = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
        rows.append(f"| [`{name}`][{place}] | {said.replace('|', '&#124;')} |")
    return "\n".join(rows) + "\n"


def on_post_build(config: MkDocsConfig) -> None:
    pages = (Path(config.site_dir) / "reference").glob("*.html")
    there = {name for page in pages for name in re.findall(r'\bid="([^"]+)"', page.read_text("utf-8"))}
    missing = sorted(name for name, same in public_names() if not {name, same} & there)
    if missing:
        raise PluginError(f"the reference lacks {len(missing)} public names: {', '.join(missing)}")


def public_names() -> Iterator[tuple[str, str]]:
    """Each name in `__all__` of moeopt's packages, the command line's aside, and the name where it is defined."""
    for package in walk_packages(moeopt.__path__, "moeopt."):
        if package.ispkg and not package.name.startswith("moeopt.cli"):
            room = import_module(package.name)
            for name in getattr(room, "__all__", ()):
                value = getattr(room, name)
                place = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
                yield f"{package.name}.{name}", place
