"""The documentation holds: commands and names in it are there, links lead somewhere, nothing public is left out."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import yaml
from run_blocks import REFUSED, Block, blocks, check, pages

import moeopt
from moeopt.cli.commands import COMMANDS

ROOT = Path(moeopt.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = pages()
REFERENCE = re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in DOCS.glob("reference/*.md")), re.M)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_ask_for_what_there_is(page: Path) -> None:
    for block in blocks(page):
        check(block)


def test_examples_of_the_help_are_commands() -> None:
    for command, (_, epilog) in COMMANDS.items():
        lines = [line for line in (epilog or "").splitlines() if line.startswith("moeopt ")]
        assert lines or command == "demo"
        check(Block(ROOT / "README.md", 1, "console", False, "\n".join(lines)))


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("console", "moeopt search m --task boolq --study s --kep 4", "--kep"),
        ("console", "moeopt serch m", "serch"),
        ("console", "moeopt search m --task boolq --study s \\\n    --score likelyhood", "likelyhood"),
        ("console", "moeopt tasks && srun -n 2 moeopt worker --study s --model m --nope", "--nope"),
        ("console", "A=1 python -m moeopt worker --model m | tee log  # why", "--study"),
        ("python", "import moeopt\nmoeopt.loaded('m')", "loaded"),
        ("python", "from moeopt.tasks import Cloze", "Cloze"),
        ("python", "import moeopt\nmoeopt.Evaluator(model, tokenizer, task, spilt='dev')", "spilt"),
        ("python", "import moeopt\nmoeopt.load(", "never closed"),
    ],
)
def test_the_check_sees(language: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Block(ROOT / "README.md", 1, language, False, text))


@pytest.mark.parametrize("opening", [*REFUSED, "console unrunn", "python run"])
def test_a_block_is_run_or_marked(tmp_path: Path, opening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("run_blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```{opening}\nmoeopt tasks\n```\n")
    with pytest.raises(ValueError, match=r"page.md:3"):
        blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """As GitHub follows them; building the site follows them, too."""
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"", text)
    for target in filter(None, (first or second for first, second in targets)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), f"{target} is not in the repository"
        if anchor and file.parent != DOCS / "reference":  # whose headings are made when the site is built
            assert anchor in anchors(file), f"{target}: no such heading in {name(file)}, which has {anchors(file)}"


def prose(page: Path) -> str:
    return re.sub(r"^( *)(```+).*?^\1\2 *$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ +(.*?) *$", text, re.M)]
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {*slugs, *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)}


def test_every_page_is_in_the_navigation_once() -> None:
    def listed(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in listed(inner)]

    entries = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(entries) == len(set(entries))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} == set(entries) - {
        "changelog.md",
        "contributing.md",
    }


def packages() -> list[str]:
    found = [module.name for module in walk_packages(moeopt.__path__, "moeopt.") if module.ispkg]
    return [name for name in found if name != "moeopt.cli" and hasattr(import_module(name), "__all__")]


def test_the_reference_has_every_public_package() -> None:
    """That each of their names has its entry is looked at when the site is built."""
    assert set(packages()) <= set(REFERENCE)
    for module in REFERENCE:
        import_module(module)
    homes = {getattr(moeopt, name).__module__ for name in moeopt.__all__ if inspect.isclass(getattr(moeopt, name))}
    assert all(any(home.startswith(module) for module in REFERENCE) for home in homes)


@pytest.mark.parametrize("package", packages())
def test_docstrings_explain_parameters_that_there_are(package: str) -> None:
    module = import_module(package)
    for public in module.__all__:
        value = getattr(module, public)
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue
        members = [value, *(vars(value).values() if inspect.isclass(value) else ())]
        for member in members:
            called = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            section = re.search(r"^Args:\n((?: .*\n?|\n)*)", inspect.getdoc(called) or "", re.M)
            if not section or not callable(called) or not called.__module__.startswith("moeopt."):
                continue
            parameters = set(inspect.signature(called).parameters)
            explained = re.findall(r"^    ([\w*][\w*, ]*):", section[1], re.M)
            names = {name.strip("* ") for line in explained for name in line.split(",")}
            assert names <= parameters, f"{package}.{public}: {getattr(called, '__qualname__', '')}"
