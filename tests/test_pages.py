"""Pages that are written by hand say what the package and the studies say: messages, and results."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUOTED = re.findall(r"^- `([^`]+)`", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
MEASURED = [path for room in ("studies", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]


def messages() -> tuple[str, ...]:
    """Every text in the package's source, … standing for what is put in when it runs."""
    made = []
    for path in sorted((ROOT / "moeopt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                made.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                made.append(node.value)
    return tuple(made)


def holds(text: str, quoted: str) -> bool:
    """Whether a text has the fixed parts of what is quoted, in their order."""
    at = 0
    for part in quoted.split("…"):
        place = text.find(part, at)
        if place < 0:
            return False
        at = place + len(part)
    return True


def test_every_message_of_troubleshooting_is_in_the_source() -> None:
    assert len(QUOTED) == len(set(QUOTED)) > 40
    source = messages()
    assert [quoted for quoted in QUOTED if not any(holds(text, quoted) for text in source)] == []


def test_every_table_of_studies_and_benchmarks_is_on_the_page_of_results() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    for path in MEASURED:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.relative_to(ROOT).as_posix()
        if "|---|" in text:
            assert re.search(rf"^\[{name}\]\(\.\./{name}\)$", page, re.MULTILINE), name
