"""The rooms and who may import whom: arrows point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moeopt

ROOT = Path(moeopt.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "showing": set(),
    "description": {"errors", "genome", "showing"},
    "plan": {"errors", "showing"},
    "genome": {"errors", "showing"},
    "transaction": set(),
    "worker": set(),
    "storage": {"errors", "genome", "showing", "transaction", "worker"},
    "spaces": {"errors", "plan", "genome", "showing"},
    "samplers": {"description", "errors", "plan", "genome", "spaces", "worker"},
    "models": {"errors", "plan"},
    "tasks": {"errors"},
    "evaluation": {"errors", "plan", "models", "tasks"},
    "methods": {"errors", "plan", "models", "tasks", "evaluation"},
    "racing": {"description", "errors", "genome"},
    "objective": {"errors", "plan", "genome", "spaces", "models", "tasks", "evaluation", "racing"},
    "recipe": {"errors", "genome"},
    "study": {
        "description",
        "errors",
        "plan",
        "genome",
        "spaces",
        "samplers",
        "objective",
        "racing",
        "recipe",
        "showing",
        "storage",
        "worker",
    },
    "working": {"description", "errors", "recipe", "study"},
    "fleet": set(),
    "on_ray": {"errors"},
    "exporting": {"errors", "plan", "models", "showing", "study"},
    "selection": {"console", "description", "errors", "plan", "genome", "models", "evaluation", "objective", "showing"},
    "benchmarking": {"errors", "plan", "genome", "selection", "study"},
    "comparing": {"errors", "plan", "models", "showing", "tasks", "evaluation", "methods"},
    "profiling": {"errors", "plan", "models"},
    "figures": {"errors", "plan"},
    "dashboard": {"errors", "plan", "genome", "spaces", "storage", "study", "figures"},
    "demo": {
        "console",
        "errors",
        "plan",
        "spaces",
        "samplers",
        "models",
        "tasks",
        "evaluation",
        "objective",
        "study",
        "exporting",
    },
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_rooms(path: Path) -> set[str]:
    """Rooms of moeopt that a file imports when it is imported itself; imports inside functions come later."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moeopt":
            names = [f"moeopt.{alias.name}" for alias in node.names] if node.module == "moeopt" else [node.module]
            found |= {room(name) for name in names if not name.endswith("__version__")}
        if isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.split(".")[0] == "moeopt"}
    return found - {""}


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_rooms_import_only_what_lies_below_them(name: str) -> None:
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else sorted((ROOT / name).rglob("*.py"))
    assert files
    for file in files:
        assert imported_rooms(file) <= MAY_IMPORT[name] | {name}, file


def test_import_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "optuna", "nevergrad", "datasets", "numpy")
    code = f"import sys, moeopt; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in moeopt.__all__:
        assert getattr(moeopt, name) is not None


def test_only_genome_and_storage_touch_private_optuna() -> None:
    private = ("_storage", "_trial_id", "_study_id", "_cached_frozen_trial", "_thread_local")
    for file in ROOT.rglob("*.py"):
        if file in (ROOT / "genome.py", ROOT / "storage" / "resilient.py", ROOT / "storage" / "rows.py"):
            continue
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & set(private), file
    assert len((ROOT / "genome.py").read_text().splitlines()) <= 240


def test_no_pickle_and_no_eval() -> None:
    for file in ROOT.rglob("*.py"):
        tree = ast.parse(file.read_text())
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec"}, file
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not modules & {"pickle", "dill", "cloudpickle", "joblib"}, file
