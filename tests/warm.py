"""Programs in processes that have the heavy imports done: forks of one without threads, which each would take seconds
to do. What `python` and `moeopt` do besides, from their own first line on, the tests of the wheel and of workers see.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

HEAVY = [
    "torch", "transformers", "transformers.models.mixtral.modeling_mixtral", "tokenizers", "safetensors.torch",
    "optuna", "sqlalchemy.dialects.sqlite", "scipy.stats", "rich.progress", "moeopt.cli", "moeopt.study",
    "moeopt.samplers",
]  # fmt: skip
"""None of these starts a thread of Python."""


def warm(
    arguments: list[str], folder: str, environment: dict[str, str], timeout: float | None = None
) -> tuple[str, str]:
    """Run ``python``, with the arguments that it would be given, or ``moeopt``.

    Args:
        arguments: ``["python", "-c", code]``, ``["python", script, ...]`` or ``["moeopt", ...]``.
        folder: where it runs.
        environment: its variables. Those that imports read (`HF_HUB_OFFLINE`, ...) must be in this process's, too.
        timeout: seconds after which it is killed.

    Returns:
        Its exit code as text, or why there is none, and what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    printed = Path(folder, ".printed")
    process = context.Process(target=_run, args=(arguments, folder, environment, str(printed)))
    process.start()
    process.join(timeout)
    ended = str(process.exitcode)
    if process.exitcode is None:
        process.kill()
        process.join()
        ended = f"none after {timeout:.0f} s"
    return ended, printed.read_text(encoding="utf-8", errors="replace")


def _run(arguments: list[str], folder: str, environment: dict[str, str], printed: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    program, *rest = arguments
    if program == "moeopt":
        from moeopt.cli import main

        sys.argv = arguments
        sys.exit(main(rest))
    if rest[0] == "-c":
        sys.argv = ["-c", *rest[2:]]
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = rest
        sys.path.insert(0, str(Path(rest[0]).parent))
        runpy.run_path(rest[0], run_name="__main__")
