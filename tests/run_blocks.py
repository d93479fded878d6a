"""Run the code blocks of the Markdown pages, and check those that cannot run here.

python tests/run_blocks.py [-j JOBS] [--check] [PAGE...]

Pages are those beside docs/ (README.md, ...) and all in it unless some are named. All blocks of a page run in order,
each in a process of its own, all in one temporary folder, without a network and with the `moeopt` of this environment
(`warm.py`: with its imports done, unless a script holds more than plain commands of moeopt).
So a block may use the files, but not the variables, of those before it. These are the marks, which do not show:

- ```` ```python ```` runs.
- ```` ```console ```` runs, too, as a script of bash that stops at the first command that fails. Commands stand
  without a prompt, and long ones go on after a backslash. They are written for the shipped model as they would be for
  any other: ``moeopt demo --copy tour`` once on the page, then ``tour/model``, ``tour/caesar.jsonl``, ``tour/text/``.
  Python blocks may use ``moeopt.demo.MODEL`` and ``moeopt.demo.skill_task("caesar")`` as well.
- ```` ```console unrun ```` and ```` ```python unrun ```` do not run: they need a large model, a cluster, a server, an
  installation. But every `moeopt` command in them (also after `srun ...`, `python -m`, `NAME=value`, in pipes) goes
  through the command line's own parser, so its options are there and their values are of the right kind. Python is
  compiled, and what it takes from moeopt must be there and take the arguments that it is given.
- ```` ```text ```` is what something printed; ```` ```yaml ````, ```` ```json ```` and so on are files. Shell and
  Python under any other name (`bash`, `sh`, `pycon`, ...) are refused.

`--check` only checks: it runs no block, but treats all as if they were marked `unrun`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from warm import warm

from moeopt.cli import app

ROOT = Path(__file__).parents[1]
TIMEOUT = 600
"""Seconds after which a block has failed."""
REFUSED = ("bash", "sh", "shell", "zsh", "shell-session", "py", "python3", "pycon", "ipython", "unrun")
FENCE = re.compile(r"^( *)(```+)([^`\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, whether it is run, and its text."""

    page: Path
    line: int
    language: str
    runs: bool
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}, {self.language}"


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The page's Python and shell blocks.

    Raises:
        ValueError: on one with a mark or language that is none.
    """
    source = page.read_text(encoding="utf-8")
    made = []
    for match in FENCE.finditer(source):
        language, *marks = match[3].split() or ["text"]
        block = Block(page, source.count("\n", 0, match.start()) + 1, language, not marks, textwrap.dedent(match[4]))
        if language in REFUSED:
            raise ValueError(f"{block}: write python or console, or console unrun for what cannot run here")
        if language in ("python", "console"):
            if marks not in ([], ["unrun"]):
                raise ValueError(f"{block}: the only mark is unrun, got {' '.join(marks)!r}")
            made.append(block)
        elif re.search(r"^(\$ )?moeopt [a-z-]+ ", block.text, re.MULTILINE):
            raise ValueError(f"{block}: commands of moeopt stand in blocks of console")
    return made


def check(block: Block) -> None:
    """What can be said without running a block.

    Raises:
        ValueError: naming the block, what is wrong, and where.
    """
    try:
        if block.language == "python":
            check_python(block.text)
        else:
            for arguments in commands(block.text):
                check_command(arguments)
    except (typer.TyperException, ValueError, SyntaxError, AttributeError, ImportError, TypeError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        raise ValueError(f"{block}: {message}\n{block.text}") from None


def commands(script: str) -> Iterator[list[str]]:
    """The arguments of each moeopt command of a shell script."""
    script = re.sub(
        r"<<-? *(['\"]?)(\w+)\1(.*?\n).*?^\2$", r"\3", script, flags=re.MULTILINE | re.DOTALL
    )  # here-documents
    script = re.sub(r"(?:^|(?<=\s))(?:#.*|\d(?=>))", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    words = shlex.shlex(script + "\n", posix=True, punctuation_chars="();<>|&\n")
    words.whitespace, words.whitespace_split, words.commenters = " \t", True, ""
    command: list[str] = []
    for word in words:
        if not set(word) <= set("();<>|&\n"):
            command.append(word)
            continue
        if "moeopt" in command:
            yield command[moeopt_at(command) + 1 :]
        command = [">"] if set(word) <= set("<>") else []  # what follows is a file


def moeopt_at(command: list[str]) -> int:
    """Where a command names moeopt: at its beginning, or after what launches it."""
    start = next((i for i, word in enumerate(command) if not re.match(r"[A-Z_]+=", word)), 0)
    if command[start] == "moeopt":
        return start
    return len(command) - 1 - command[::-1].index("moeopt")


@cache
def parser() -> Any:
    """moeopt's own, whose commands are read once."""
    return typer.main.get_command(app)


def plain(script: str) -> list[list[str]] | None:
    """The commands of a script that holds nothing but plain commands of moeopt, else None."""
    lines = [re.sub(r"\s#.*", "", line).strip() for line in script.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if all(re.fullmatch(r"moeopt [^|;&<>$`*]*", line) for line in lines):
        return [shlex.split(line) for line in lines]
    return None


def check_command(arguments: list[str]) -> None:
    """Read the arguments as the command line would, but run nothing."""
    group = parser()
    if arguments[-1:] in (["-h"], ["--help"]):
        arguments = arguments[:-1]
        if arguments and group.get_command(None, arguments[0]) is None:
            raise ValueError(f"there is no command {arguments[0]!r}")
        return
    if not arguments or arguments in (["--version"], ["--install-completion"]):
        return
    context = group.make_context("moeopt", list(arguments), obj=list(arguments))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest, parent=context)


def check_python(code: str) -> None:
    """Compile the code, and look up what it takes from moeopt, and whether that takes the arguments it is given."""
    places: dict[str, Any] = {}

    def value(node: ast.expr) -> Any:
        """What an expression stands for, as far as names of moeopt's modules and classes tell; None beyond."""
        if isinstance(node, ast.Name):
            return places.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = value(node.value)
            return getattr(owner, node.attr) if inspect.ismodule(owner) or inspect.isclass(owner) else None
        return None

    for node in ast.walk(tree := ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "moeopt":
                    module = import_module(alias.name)
                    places[alias.asname or "moeopt"] = module if alias.asname else import_module("moeopt")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moeopt":
            home = import_module(str(node.module))
            places |= {alias.asname or alias.name: getattr(home, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value(node)
        called = value(node.func) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and callable(called) and not is_error(called):
            named = {word.arg: None for word in node.keywords if word.arg}
            starred = len(named) < len(node.keywords) or any(isinstance(word, ast.Starred) for word in node.args)
            signature = inspect.signature(called)
            plain = [word for word in node.args if not isinstance(word, ast.Starred)]
            (signature.bind_partial if starred else signature.bind)(*plain, **named)


def is_error(called: object) -> bool:
    return inspect.isclass(called) and issubclass(called, Exception)


def started_cold(program: list[str], folder: str, environment: dict[str, str], timeout: float) -> tuple[str, str]:
    """As `warm`, any program."""
    try:
        done = subprocess.run(
            program, cwd=folder, env=environment, stdin=subprocess.DEVNULL, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return f"none after {timeout} s", str(error.stdout)
    return str(done.returncode), done.stdout


def run(page: Path) -> tuple[bool, str]:
    """Run a page's blocks until one fails; whether none did, and what to print."""
    report, spent = [], 0.0
    try:
        todo = blocks(page)
        for block in todo:
            if not block.runs:
                check(block)
    except ValueError as error:
        return False, str(error)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "MOEOPT_SPOOL": f"{folder}/.spool",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("MOEOPT_STORAGE", None)
        for block in (block for block in todo if block.runs):
            if block.language == "python":
                programs = [["python", "-c", block.text]]
            else:
                programs = plain(block.text) or [["bash", "-euo", "pipefail", "-c", block.text]]
            started = time.perf_counter()
            for program in programs:
                code, printed = (started_cold if program[0] == "bash" else warm)(program, folder, environment, TIMEOUT)
                if code != "0":
                    break
            spent += time.perf_counter() - started
            report.append(f"{block}: exit {code}, {time.perf_counter() - started:.0f} s")
            if code != "0":
                return False, "\n".join([*report, block.text, printed])
    count = sum(block.runs for block in todo)
    report.append(f"{page.relative_to(ROOT)}: {count} ran in {spent:.0f} s, {len(todo) - count} were checked")
    return True, "\n".join(report)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="pages that run at once")
    parser.add_argument("--check", action="store_true", help="run nothing")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # which is read when the warm process imports
    todo = [page.resolve() for page in given.pages] or pages()
    if given.check:
        for page in todo:
            for block in blocks(page):
                check(block)
        return 0
    with ThreadPoolExecutor(given.jobs) as pool:
        passed = True
        for fine, report in pool.map(run, todo):
            print(report, flush=True)
            passed &= fine
    print("all passed" if passed else "some failed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
