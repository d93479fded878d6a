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
    "defaults": set(),
    "files": set(),
    "lazily": set(),
    "showing": set(),
    "description": {"errors", "genome", "showing"},
    "plan": {"errors", "files", "showing"},
    "genome": {"errors", "showing"},
    "transaction": set(),
    "process": set(),
    "storage": {"errors", "genome", "showing", "process", "transaction"},
    "spaces": {"errors", "plan", "genome", "showing"},
    "guide": {"errors", "genome"},
    "samplers": {"description", "errors", "plan", "genome", "guide", "process", "spaces"},
    "models": {"errors", "plan"},
    "tasks": {"errors", "showing"},
    "evaluation": {"errors", "plan", "models", "tasks"},
    "methods": {"errors", "guide", "lazily", "plan", "models", "tasks", "evaluation"},
    "racing": {"description", "errors", "genome"},
    "reference": {"description", "errors", "genome", "showing"},
    "objective": {
        "errors",
        "plan",
        "genome",
        "guide",
        "spaces",
        "models",
        "tasks",
        "evaluation",
        "racing",
        "reference",
    },
    "recipe": {"errors", "genome"},
    "study": {
        "defaults",
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
        "process",
        "storage",
    },
    "worker": {"description", "errors", "recipe", "study"},
    "fleet": {"defaults"},
    "on_ray": {"errors"},
    "exporting": {"errors", "files", "plan", "models", "showing", "study"},
    "selection": {
        "console",
        "description",
        "errors",
        "lazily",
        "methods",
        "plan",
        "genome",
        "models",
        "evaluation",
        "objective",
        "showing",
    },
    "benchmarking": {"description", "errors", "lazily", "files", "plan", "genome", "selection", "showing", "study"},
    "comparing": {
        "console",
        "errors",
        "lazily",
        "files",
        "genome",
        "plan",
        "models",
        "showing",
        "tasks",
        "evaluation",
        "methods",
    },
    "profiling": {"errors", "lazily", "files", "plan", "models"},
    "figures": {"errors", "files", "plan"},
    "dashboard": {"description", "errors", "plan", "genome", "spaces", "storage", "study", "figures", "reference"},
    "demo": {
        "console",
        "errors",
        "genome",
        "methods",
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
        if file == ROOT / "genome.py" or file.parent == ROOT / "storage":
            continue
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & set(private), file
    assert len((ROOT / "genome.py").read_text().splitlines()) <= 240


UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "_pickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load", "full_load", "read_pickle"}


def unsafe(tree: ast.AST) -> list[str]:
    """What a file does that may run code that others wrote: how, and in which line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = [*node.args.posonlyargs, *node.args.args]
            defaults = [*zip(every[len(every) - len(node.args.defaults) :], node.args.defaults)]
            defaults += [*zip(node.args.kwonlyargs, node.args.kw_defaults)]
            found += [
                f"{node.lineno}: {argument.arg} by default"
                for argument, default in defaults
                if argument.arg in ("trust_remote_code", "unsafe_code") and ast.unparse(default or node) == "True"
            ]
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (name in UNSAFE_CALLS and owner in ("", "os", "yaml", "builtins", "pd", "pandas")) or (
            (name == "load" and owner == "torch" and given.get("weights_only") != "True")
            or (name in ("load", "load_all") and owner == "yaml")
            or (name == "load" and owner in ("np", "numpy") and given.get("allow_pickle", "False") != "False")
            or given.get("shell", "False") != "False"
            or given.get("trust_remote_code") == "True"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_nothing_runs_what_others_wrote() -> None:
    for file in ROOT.rglob("*.py"):
        assert not unsafe(ast.parse(file.read_text(encoding="utf-8"))), file


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "eval(x)", "exec(x)", "torch.load(x)", "yaml.load(x)",
        "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)",
        "load(x, trust_remote_code=True)", "os.system(x)", "def f(*, trust_remote_code=True): pass",
        "def f(a, trust_remote_code: bool = True, b=1): pass",
    ],
)  # fmt: skip
def test_the_guard_sees(line: str) -> None:
    assert unsafe(ast.parse(line))
