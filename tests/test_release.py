"""What a release promises beside the code: optional groups that say what is missing, deprecations, files about it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import moeopt
from moeopt.cli import main
from moeopt.cli.env import packages
from moeopt.deprecation import deprecated
from moeopt.errors import MoeoptError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = PROJECT["optional-dependencies"]


def figure(folder: Path) -> None:
    from moeopt.report.figures import ensemble_curve

    ensemble_curve({"a": [1.0]})


def png(folder: Path) -> None:
    from moeopt.report.figures import ensemble_curve, write_png

    write_png(ensemble_curve({"a": [1.0]}), folder / "figure.png")


def page_of_the_dashboard(folder: Path) -> None:
    import optuna

    from moeopt.report.dashboard.serving import server

    server(optuna.storages.InMemoryStorage())


def note_on_the_dashboard(folder: Path) -> None:
    import optuna

    from moeopt.report.dashboard.refreshing import attach

    attach(optuna.create_study(), None, "", {})  # type: ignore[arg-type]


def ray(folder: Path) -> None:
    from moeopt.study.workers.on_ray import run_on_ray

    run_on_ray("postgresql+psycopg://a@127.0.0.1/b", "s", workers=1)


def storage(url: str) -> Callable[[Path], None]:
    return lambda folder: void(moeopt.open_storage(url))


def void(value: Any) -> None:
    """For what is called to fail."""


FEATURES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "a figure": ("figures", "plotly", figure),
    "a PNG": ("figures", "matplotlib", png),
    "the dashboard": ("dashboard", "optuna_dashboard", page_of_the_dashboard),
    "notes of the dashboard": ("dashboard", "optuna_dashboard", note_on_the_dashboard),
    "PostgreSQL": ("postgres", "psycopg", storage("postgresql+psycopg://a@127.0.0.1:9/b")),
    "MySQL": ("mysql", "pymysql", storage("mysql+pymysql://a@127.0.0.1:9/b")),
    "Ray": ("ray", "ray", ray),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_without_its_group_says_what_to_install(
    feature: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group, package, use = FEATURES[feature]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MoeoptError, match=rf"pip install 'moeopt\[{group}\]'"):
        use(tmp_path)


def test_another_driver_that_is_missing_is_an_error_that_names_those_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(MoeoptError, match=r"postgresql\+psycopg.*moeopt\[postgres\].*moeopt\[mysql\]"):
        moeopt.open_storage("postgresql+psycopg2://a@127.0.0.1:9/b")


def test_every_group_that_a_message_or_page_names_is_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "moeopt").rglob("*.py")]
    named = {
        name
        for page in pages
        for name in re.findall(r"pip install ['\"]moeopt\[(\w+)\]", page.read_text(encoding="utf-8"))
    }
    assert named <= GROUPS.keys()
    assert named >= {group for group, _, _ in FEATURES.values()}


def test_developers_have_every_group() -> None:
    names = {group: {re.split(r"[^\w.-]", line)[0] for line in lines} for group, lines in GROUPS.items()}
    assert set().union(*names.values()) - names["dev"] == {"wandb"}, "what is optional would go without its tests"


def test_env_names_what_the_project_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {re.split(r"[^\w.-]", line)[0] for line in PROJECT["dependencies"]}
    assert asked <= set(packages())
    assert "pytest" not in packages()
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"moeopt {moeopt.__version__}\nPython 3." in shown
    assert re.search(r"^torch \d", shown, re.M)


def test_a_deprecated_call_says_since_when_until_when_and_what_to_use() -> None:
    def former() -> None:
        deprecated("former()", "latter()", since="0.1.0", until="0.3.0")

    with pytest.warns(
        FutureWarning, match=r"^former\(\) is deprecated since moeopt 0.1.0.*0.3.0: use latter\(\)$"
    ) as given:
        former()
    assert given[0].filename == __file__  # where it was called, not where it is


def test_what_was_promised_to_go_is_gone() -> None:
    for file in (ROOT / "moeopt").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "deprecated(" in text else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "deprecated":
                dates = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg != "stacklevel"}
                assert Version(dates["since"]) < Version(dates["until"])
                assert Version(moeopt.__version__) < Version(dates["until"]), f"{file}:{node.lineno}"


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["dynamic"] == ["version"]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert headings[1].split()[0] == moeopt.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == moeopt.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}


def test_hosted_ci_runs_targets_that_there_are_on_every_python_that_is_promised() -> None:
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M)) | {".venv/installed"}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    asked = {name for step in steps if step.startswith("make ") for name in step.split()[1:] if "{" not in name}
    asked |= {name for names in jobs["checks"]["strategy"]["matrix"]["target"] for name in names.split()}
    assert {name for name in asked if "=" not in name and name not in ("}}", "matrix.target")} <= targets
    promised = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == promised
    assert f">={min(promised, key=Version)}" == PROJECT["requires-python"]
