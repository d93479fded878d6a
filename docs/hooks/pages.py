"""What the site makes of pages that are written to be read on GitHub, too.

- CHANGELOG.md and CONTRIBUTING.md are pages; a link to another file outside of docs/ leads to a copy of it.
- Formulas between dollars become MathML.
- A flowchart of mermaid becomes a picture.
- Blocks that are marked as not run (`tests/run_blocks.py`) look as all others.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import latex2mathml.converter
from flowchart import picture
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
BESIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
"""Files beside docs/ that are pages, or stand for one."""
COPIES = "files/"
CODE = re.compile(r"(^ *(?P<fence>```+).*?^ *(?P=fence) *$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<before>\]\(|(?:src|href)=\")(?P<target>[^)\s\"#:]+)(?=[)#\s\"])")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, page in BESIDE.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    todo = list(files.documentation_pages())
    while todo:
        page = todo.pop()
        for target in links(page.content_string):
            path = at(page.src_uri, target)
            place = in_site(path)
            if not place.startswith(COPIES) or files.get_file_from_path(place) is not None:
                continue
            if not (ROOT / path).is_file():
                raise PluginError(f"{origin(page.src_uri)} links to {target}, which is no file")
            copy = File.generated(config, place, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(copy)
            todo += [copy] * copy.is_documentation_page()


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        to = posixpath.relpath(in_site(at(here, link["target"])), posixpath.dirname(here) or ".")
        return link["before"] + to

    markdown = re.sub(
        r"^```mermaid\n(.*?)^```$", lambda chart: picture(chart[1]), markdown, flags=re.MULTILINE | re.DOTALL
    )
    markdown = re.sub(r"^( *```+(?:console|python)) unrun$", r"\1", markdown, flags=re.MULTILINE)
    return outside_of_code(markdown, lambda text: LINK.sub(moved, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def written(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        return str(latex2mathml.converter.convert(html.unescape(formula[2]).strip(), display=display))

    return FORMULA.sub(written, content)


def links(markdown: str) -> list[str]:
    """Relative links of a page, without anchors."""
    return [link["target"] for text in CODE.sub("", markdown).splitlines() for link in LINK.finditer(text)]


def outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    def pieces() -> Iterator[str]:
        end = 0
        for code in CODE.finditer(markdown):
            yield from (change(markdown[end : code.start()]), code[0])
            end = code.end()
        yield change(markdown[end:])

    return "".join(pieces())


def origin(place: str) -> str:
    """The file of the repository that is at a place of the site."""
    beside = {page: source for source, page in BESIDE.items() if not (ROOT / "docs" / page).exists()}
    return place.removeprefix(COPIES) if place.startswith(COPIES) else beside.get(place, f"docs/{place}")


def at(place: str, link: str) -> str:
    """The file of the repository to which a link on the page at a place of the site leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin(place)), link))


def in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else BESIDE.get(path, COPIES + path)
