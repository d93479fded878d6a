"""Names of published tasks, told by the text of their YAML: without parsing it, and without importing the harness.

Ours come first: EEP's prompts (`eep/`), and tasks that the harness has not, or not rightly (`ours/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moeopt.errors import TaskError, nearest

OURS = Path(__file__).parent
FOLDERS = (OURS / "eep", OURS / "ours")
"""Folders with tasks of our own, in the harness's YAML."""
EEP = "eep_"
"""What the names of EEP's prompts begin with."""
_KEY = r"^[\"']?(?:%s)[\"']?:[ \t]*"
_NAME = re.compile((_KEY % "task|group" + r"[\"']?([^\s\"'#\[\],]+)").encode(), re.MULTILINE)
_TAGS = re.compile(
    (_KEY % "tag" + r"(?:\[([^\]]*)\]|([^\s\[].*)|\r?\n((?:[ \t]*-[^\n]*(?:\n|\Z))+))").encode(), re.MULTILINE
)
_TAG = re.compile(rb"[^\s\"'#,-][^\s\"'#,]*")
_IGNORED = ("__pycache__", ".ipynb_checkpoints")
RENAMED = {"math": "hendrycks_math (or minerva_math, with examples)"}
"""What tasks of ours are called in the harness."""


def names_in(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder, subfolders included, by each name of a task, group or tag that they give."""
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        template = path.suffix == "" or "yaml" in path.name.lower()  # which a task may include, such as `_default_yaml`
        if not template or any(part in _IGNORED for part in path.parts) or not path.is_file():
            continue
        text = path.read_bytes()
        tags = (tag for block in _TAGS.findall(text) for line in block for tag in _TAG.findall(line))
        named = tags if path.suffix != ".yaml" else {*_NAME.findall(text), *tags}
        for name in named:
            names.setdefault(name.decode(), []).append(path)
    return names


@cache
def ours() -> Mapping[str, Path]:
    """The file of each task of our own."""
    return {name: files[0] for folder in FOLDERS for name, files in names_in(folder).items()}


@cache
def harness_folder() -> Path:
    """Where the harness keeps its tasks."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None  # noqa: PT018
    return Path(spec.origin).parent / "tasks"


@cache
def theirs() -> Mapping[str, list[Path]]:
    """The files of each task, group and tag that the harness ships."""
    return names_in(harness_folder())


def check_name(name: str, others: Iterable[str] = ()) -> None:
    """Refuse what is neither a task of ours nor of the harness; `others` are names that would do as well.

    Raises:
        TaskError: with the nearest name that there is.
    """
    if name not in ours() and name not in theirs():
        hint = f"; it is {RENAMED[name]}" if name in RENAMED else nearest(name, [*others, *ours(), *theirs()])
        raise TaskError(f"unknown task {name!r}{hint} (`moeopt tasks` lists them)")
