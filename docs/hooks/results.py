"""What studies and benchmarks found, on the page of results: a link to one in a line of its own gets its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGE = "results.md"
LINK = re.compile(r"^\[((?:studies|benchmarks)/[\w/]+\.py)\]\(\.\./\1\)$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri != PAGE:
        return markdown
    return LINK.sub(lambda link: f"{link[0]}\n\n{text(link[1])}", markdown)


def text(path: str) -> str:
    """The docstring of a file, as Markdown; what looks like HTML is shown as it is."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return "\n".join(line if line.startswith("    ") else line.replace("<", "&lt;") for line in docstring.splitlines())
