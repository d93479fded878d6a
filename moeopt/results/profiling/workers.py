"""The other end of `moeopt.results.profiling.worker`: a process that holds one checkpoint, asked over a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moeopt
from moeopt.errors import ModelError, PlanError
from moeopt.results.profiling.checks import ProfileError


class Worker:
    """A process of its own for a checkpoint, so that one model's memory does not count for another.

    It is out of reach of the terminal's Ctrl-C, and ends when it is closed, or with this process.

    Args:
        source: checkpoint folder or hub id.
        options: of `Host.open`.

    Attributes:
        facts: what the checkpoint's config tells.

    Raises:
        MoeoptError: what the worker raised.
    """

    def __init__(self, source: str, **options: Any) -> None:
        self.source = source
        paths = [str(Path(moeopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        threads = {} if options["threads"] is None else {"OMP_NUM_THREADS": str(options["threads"])}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moeopt.results.profiling.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **threads},
            text=True,
            start_new_session=True,
        )
        try:
            self.facts: dict[str, Any] = self.ask("open", source=source, **options)
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer to one request; waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            hint = "; was there too little memory?" if code == -9 else ""
            raise ProfileError(f"the process that measures {self.source!r} ended with code {code}{hint}")
        answer = json.loads(line)
        if "error" in answer:
            kind = {"ModelError": ModelError, "PlanError": PlanError}.get(answer["error"], ProfileError)
            raise kind(answer["message"])
        return answer["answer"]

    def close(self) -> None:
        """End the process and free what it holds."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
