"""The other end of `moeopt.results.profiling.worker`: a process that holds one checkpoint, asked over a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import moeopt
from moeopt.errors import ModelError, PlanError
from moeopt.results.profiling.checks import ProfileError


class Checkpoint:
    """A checkpoint and, while it is open, a process of its own, so that one model's memory does not count for another.

    The process is out of reach of the terminal's Ctrl-C, and ends when it is closed, or with this one.

    Args:
        name: what tables call it.
        source: checkpoint folder or hub id.
        options: of `Host.open`.

    Attributes:
        facts: what its config tells, once it was opened.
        weights: how its weights lie, once they were loaded.
    """

    def __init__(self, name: str, source: str, options: dict[str, Any]) -> None:
        self.name, self.source, self._options = name, source, options
        self._process: subprocess.Popen[str] | None = None
        self.facts: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}
        self._is_loaded = False

    def open(self) -> None:
        """Start the process and read the config.

        Raises:
            MoeoptError: what the process raised.
        """
        if self._process is not None:
            return
        paths, threads = [str(Path(moeopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")], {}
        if self._options["threads"] is not None:
            threads["OMP_NUM_THREADS"] = str(self._options["threads"])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moeopt.results.profiling.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **threads},
            text=True,
            start_new_session=True,
        )
        self.facts = self.ask("open", source=self.source, **self._options)

    def load(self, stream: list[int]) -> None:
        """Load the weights; `stream` is the token ids that prompts are cut from."""
        self.open()
        if not self._is_loaded:
            self.weights, self._is_loaded = self.ask("load", stream=stream), True

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer to one request; waits for it."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            print(json.dumps({"do": what, **arguments}), file=process.stdin, flush=True)
            line = process.stdout.readline()
        if not line:
            code = process.wait()
            hint = "; was there too little memory?" if code == -9 else ""
            raise ProfileError(f"the process that measures {self.source!r} ended with code {code}{hint}")
        answer = json.loads(line)
        if "error" in answer:
            kind = {"ModelError": ModelError, "PlanError": PlanError}.get(answer["error"], ProfileError)
            raise kind(answer["message"])
        return answer["answer"]

    def close(self) -> None:
        """End the process, if there is one, and free what it holds."""
        process, self._process, self._is_loaded = self._process, None, False
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
