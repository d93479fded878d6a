"""The rooms and who may import whom: arrows point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import moeopt

ROOT = Path(moeopt.__file__).parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "defaults", "deprecation", "files", "lazily", "showing", "statistics"),
    ("plan", "trials"),
    ("models", "tasks", "study.storage"),
    ("evaluation", "spaces"),
    ("methods", "samplers"),
    ("exporting",),
    ("study",),
    ("study.workers", "results"),
    ("report",),
    ("demo",),
    ("cli",),
)
"""Each room may import those on floors below it, and `study` what it holds; the package's own file is the attic."""
NESTED = ("study.storage", "study.workers")

NOT_YET: set[tuple[str, str]] = set()
"""Arrows that point up."""


def room(module: str) -> str:
    parts = module.split(".")[1:]
    return next((name for name in NESTED if ".".join(parts[:2]) == name), parts[0] if parts else "")


def imported_modules(path: Path) -> set[str]:
    """What of moeopt a file imports anywhere, in functions too; what only types need does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    modules = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moeopt":
            modules |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "moeopt"}
    return modules


def imported_rooms(path: Path) -> set[str]:
    return {room(module) for module in imported_modules(path)} - {""}


def test_no_circle_of_files() -> None:
    files = {}
    for file in ROOT.rglob("*.py"):
        module = ".".join(("moeopt", *file.relative_to(ROOT).with_suffix("").parts))
        files[module.removesuffix(".__init__")] = file
    below = {  # the file of a name is the module itself, or the one that the name is taken from
        module: {name if name in files else name.rpartition(".")[0] for name in imported_modules(file)} - {module}
        for module, file in files.items()
        if module != "moeopt"
    }
    below = {module: names & below.keys() for module, names in below.items()}
    TopologicalSorter(below).prepare()  # raises CycleError, with the files


def test_arrows_point_down() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = set()
    for file in sorted(ROOT.rglob("*.py")):
        here = room("moeopt." + ".".join(file.relative_to(ROOT).with_suffix("").parts))
        if here in ("__init__", "__main__", "py"):
            continue
        upward |= {(here, there) for there in imported_rooms(file) - {here} if floor[there] >= floor[here]}
    assert upward == NOT_YET


def test_every_name_that_is_imported_is_there() -> None:
    """Packages that import at first use give mypy anything for any name."""
    for file in sorted(ROOT.rglob("*.py")):
        if file.name == "modeling_moeopt.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moeopt":
                home = import_module(node.module)
                for alias in node.names:
                    if not hasattr(home, alias.name):
                        import_module(f"{node.module}.{alias.name}")


def test_every_file_that_the_documents_name_is_there() -> None:
    documents = [ROOT.parent / "README.md", ROOT.parent / "CONTRIBUTING.md", *(ROOT.parent / "docs").rglob("*.md")]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for name in set(re.findall(r"`((?:moeopt|tests|studies|benchmarks)/[\w/.]*)`", text)):
            assert (ROOT.parent / name).exists(), f"{document}: {name}"


def test_the_architecture_names_every_room() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    for number, names in enumerate(FLOORS, start=1):
        for name in names:
            place = f"{name}.py" if (ROOT / f"{name}.py").is_file() else f"{name.replace('.', '/')}/"
            assert any(row.startswith(f"| {number} |") and f"`{place}`" in row for row in text.splitlines()), name


def test_import_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "optuna", "nevergrad", "datasets", "numpy")
    code = f"import sys, moeopt; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in moeopt.__all__:
        assert getattr(moeopt, name) is not None


def test_only_storage_touches_private_optuna() -> None:
    private = ("_storage", "_trial_id", "_study_id", "_cached_frozen_trial", "_thread_local", "_backend", "_owned")
    for file in ROOT.rglob("*.py"):
        if file.parent == ROOT / "study" / "storage":
            continue
        nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
        assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & set(private), file
        imports = [f"{n.module}.{name.name}" for n in nodes if isinstance(n, ast.ImportFrom) for name in n.names]
        assert not [name for name in imports if name.startswith("optuna.") and "._" in name], file


UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "_pickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load", "full_load", "read_pickle"}


def unsafe(tree: ast.AST) -> list[str]:
    """What a file does that may run code that others wrote: how, and in which line."""
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            uses += [f"{node.lineno}: {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = [*node.args.posonlyargs, *node.args.args]
            defaults = [*zip(every[len(every) - len(node.args.defaults) :], node.args.defaults)]
            defaults += [*zip(node.args.kwonlyargs, node.args.kw_defaults)]
            uses += [
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
            uses.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return uses


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
