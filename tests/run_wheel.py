"""The built wheel and sdist, and the wheel alone in an environment of its own.

    python -m build && python tests/run_wheel.py dist [--install] [--tag v0.1.0]

What both hold is compared with what git tracks. Then the wheel is installed by pip in an empty environment, and `moeopt
demo` and a `moeopt search` of the shipped model run there, in a folder that is not the checkout.

Without `--install` that environment borrows the packages that the wheel's metadata asks for, and what those ask for, by
links into the environment this runs in; no other package is there, so that one that moeopt imports and does not ask for
is missed. What is not tested so is that pip finds a set of versions and installs it: that is `--install`, which hosted
CI uses, and `make lowest`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SEARCH = (
    "search", "tour/model", "--task", "multiple_choice", "--data", "tour/caesar.jsonl", "--keep", "2", "--limit", "16",
    "--trials", "4", "--warm-start", "none", "--sampler", "local", "--no-held", "--study", "wheel",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dist", type=Path, help="the folder that `python -m build` wrote")
    parser.add_argument("--install", action="store_true", help="have pip install what the wheel depends on")
    parser.add_argument("--tag", help="the tag of a release: it and CHANGELOG must say this version")
    options = parser.parse_args()
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "moeopt/__init__.py").read_text(), re.M)
    assert version is not None
    (wheel,) = options.dist.glob(f"moeopt-{version[1]}-py3-none-any.whl")
    (sdist,) = options.dist.glob(f"moeopt-{version[1]}.tar.gz")
    check_contents(wheel, sdist)
    if options.tag is not None:
        check_tag(options.tag, version[1])
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "env", wheel, options.install)
        use(python, Path(folder), version[1])
    print(f"{wheel.name} and {sdist.name} hold what they should, and the wheel works alone")


def check_contents(wheel: Path, sdist: Path) -> None:
    """The package is what git tracks of it, in both; its metadata is whole, and README is its description."""
    listing = subprocess.run(["git", "ls-files", "-z", "moeopt"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listing.stdout.split("\0") if name}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == tracked, f"only in the wheel or only in git: {sorted(names ^ tracked)}"
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = BytesParser().parsebytes(archive.read(record))
    with tarfile.open(sdist) as packed:
        files = {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in packed.getmembers() if m.isfile()}
    assert tracked <= files, f"not in the sdist: {sorted(tracked - files)}"
    assert not {name for name in files if name.startswith(("tests/", "build/", "studies/"))}
    assert files >= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert about["Requires-Python"] == project["requires-python"]
    assert about["License-Expression"] == project["license"]
    assert about.get_all("Classifier") == project["classifiers"]
    assert set(about.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert about["Description-Content-Type"].startswith("text/markdown")
    assert about.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()  # type: ignore[union-attr]


def check_tag(tag: str, version: str) -> None:
    assert tag == f"v{version}", f"the tag {tag} is not of version {version}"
    heading = re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None, f"CHANGELOG.md has no heading '## {version} - YYYY-MM-DD'"


def environment(folder: Path, wheel: Path, install: bool) -> Path:
    """The Python of a new environment with the wheel, and no more than it asks for."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, *([] if install else ["--no-deps"]), str(wheel)], check=True)
    if not install:
        place = "import sysconfig; print(sysconfig.get_path('purelib'))"
        run = subprocess.run([python, "-c", place], capture_output=True, text=True, check=True)
        borrow(Path(run.stdout.strip()))
    return python


def borrow(site: Path) -> None:
    """Link what moeopt asks for, without its groups, into an environment's folder of packages."""
    (about,) = site.glob("moeopt-*.dist-info/METADATA")
    stated = BytesParser().parsebytes(about.read_bytes()).get_all("Requires-Dist", [])
    wanted = [Requirement(line) for line in stated]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        distribution = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), str(requirement)
        for extra in {"", *requirement.extras}:
            if (key := (distribution.name.lower(), extra)) not in seen:
                seen.add(key)
                wanted += asked_for(distribution, extra)
                for name in top_level(distribution):
                    if not (site / name).exists():
                        (site / name).symlink_to(Path(str(distribution.locate_file(name))).resolve())
    print(f"borrowed: {len({name for name, _ in seen})} packages")


def asked_for(distribution: metadata.Distribution, extra: str) -> Iterator[Requirement]:
    """What a package asks for with one of its groups, "" for none; its marker is judged here."""
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            yield requirement


def top_level(distribution: metadata.Distribution) -> set[str]:
    """What lies in the folder of packages of one, its metadata included."""
    names = {file.parts[0] for file in distribution.files or ()}
    return names - {"..", "__pycache__"}


def use(python: Path, folder: Path, version: str) -> None:
    """What a user does first, with nothing but the wheel."""
    place = folder / "place"
    place.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOEOPT_"))}

    def run(*arguments: str, code: int = 0) -> str:
        print("$", *arguments, flush=True)
        done = subprocess.run(
            [python.parent / arguments[0], *arguments[1:]], cwd=place, env=variables, capture_output=True, text=True
        )
        assert done.returncode == code, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    where = run("python", "-c", "import moeopt; print(moeopt.__file__, moeopt.__version__)").split()
    assert Path(where[0]).is_relative_to(folder), where
    assert where[1] == version
    assert run("moeopt", "--version") == f"moeopt {version}\n"
    assert "plotly (not installed)" in run("moeopt", "env"), "the environment has more than was asked for"
    run("moeopt", "demo", "--copy", "tour")
    run(*("moeopt", *SEARCH))
    assert "'moeopt[dashboard]'" in run("moeopt", "dashboard", code=2)
    run("moeopt", "demo", "--trials", "3", "--out", "out")
    assert (place / "out").is_dir()
    assert run("moeopt", "tasks", "eep").strip()


if __name__ == "__main__":
    main()
