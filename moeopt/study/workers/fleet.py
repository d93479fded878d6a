"""Worker processes on this host, beside the one that made the study: `moeopt search --workers N`.

Each is `moeopt worker`, with GPUs or cores of its own. They coordinate through the study alone; what is done here is to
start them, to pass Ctrl-C on, and to start another where one died. Their storage's URL comes by environment, so that
no password is in the list of processes. Their standard input is a pipe from here: when it closes, because this process
was killed, they let their trial finish and end.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

from moeopt.defaults import STORAGE_VARIABLE

RESTARTS = 3
"""How often a worker that died is started again."""
GRACE = 30.0
"""Seconds that workers have to end after a second Ctrl-C."""
LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_LOCALID")
THREADS = "OMP_NUM_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Place:
    """A worker's place, the process that holds it now, what that writes as errors, and how often it was restarted."""

    number: int
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    restarts: int = 0
    ended: bool = False
    asked: bool = False


class Fleet:
    """So many `moeopt worker` processes, from `with` to its end; used on the main thread.

    Args:
        shares: for each, the environment variables that give it devices or threads of its own.
        arguments: of `moeopt worker`.
        storage: the study's URL.
        tell: is told what becomes of a worker that died, in a line.

    Attributes:
        interrupts: Ctrl-C's so far; each was passed on.
    """

    def __init__(
        self, shares: Sequence[dict[str, str]], arguments: Sequence[str], storage: str, tell: Callable[[str], None]
    ) -> None:
        self._shares, self._tell = shares, tell
        self._command = [sys.executable, "-P", "-m", "moeopt", "worker", "--quiet", "--while-stdin", *arguments]
        self._url = storage
        self._places: list[_Place] = []
        self._lock = threading.Lock()
        self._stopping = self._closing = False
        self.interrupts = 0

    def __enter__(self) -> Fleet:
        if self._shares:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # Python writes the number of every signal it handles there, whosever handler it is.
            self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._places = [_Place(i, *self._started(i)) for i in range(len(self._shares))]
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Let running trials finish everywhere, and wait for that; after a second Ctrl-C not for long."""
        if not self._shares:
            return
        self.stop()
        deadline: float | None = None
        while any(not place.ended for place in self._places):
            with suppress(KeyboardInterrupt):  # it was passed on
                time.sleep(0.05)
            if deadline is None and (self.interrupts > 1 or (kind is not None and kind is not KeyboardInterrupt)):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                for place in self._places:
                    place.process.kill()
                deadline = None
        self._closing = True
        self._watcher.join()
        signal.set_wakeup_fd(self._before)
        os.close(self._read)
        os.close(self._write)

    def stop(self) -> None:
        """Ask every worker to end after its running trial, unless it was asked before."""
        with self._lock:
            self._stopping = True
            for place in self._places:
                if not place.asked:
                    self._ask(place)

    def _started(self, number: int) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            self._command,
            env={**inherited, **self._shares[number], STORAGE_VARIABLE: self._url},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C comes from here alone, once
        )
        return process, errors

    def _watch(self) -> None:
        while not self._closing:
            readable, _, _ = select.select([self._read], [], [], 0.1)
            signals = os.read(self._read, 64) if readable else b""
            with self._lock:
                for _ in range(signals.count(signal.SIGINT)):
                    self.interrupts += 1
                    self._stopping = True
                    for place in self._places:
                        self._ask(place)
                for place in self._places:
                    if not place.ended and place.process.poll() is not None:
                        self._bury(place)

    def _ask(self, place: _Place) -> None:
        """To end after the running trial, by the end of its standard input; the second time at once, by SIGINT."""
        if place.asked and place.process.poll() is None:
            place.process.send_signal(signal.SIGINT)
        elif place.process.stdin is not None:
            place.process.stdin.close()
        place.asked = True

    def _bury(self, place: _Place) -> None:
        """Note that a worker ended; where it died before its time, say so and start another."""
        code, last = place.process.returncode, _last_line(place.stderr)
        assert place.process.stdin is not None
        place.process.stdin.close()
        place.stderr.close()
        place.ended = True
        if code == 0 or self._stopping:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        died = f"worker {place.number + 2} {how}" + (f": {last}" if last and code > 0 else "")
        if code == 2 or place.restarts == RESTARTS:
            self._tell(f"{died}; the others go on")
            return
        place.restarts += 1
        place.process, place.stderr = self._started(place.number)
        place.ended = False
        self._tell(f"{died}; started again ({place.restarts} of {RESTARTS} times)")


def shared(workers: int, device_map: str) -> list[dict[str, str]]:
    """Environment variables that divide this host's GPUs, or where there are none its cores, among so many workers.

    GPUs are divided where weights go to them by themselves (``"auto"``); more workers than GPUs share them. What the
    user set in the environment is divided further, or in the case of threads left as it is.
    """
    gpus = _gpus() if device_map == "auto" else []
    if gpus:
        return [{GPUS: ",".join(share)} for share in divided(gpus, workers)]
    if THREADS in os.environ or device_map not in ("auto", "cpu"):
        return [{} for _ in range(workers)]
    return [{THREADS: str(max(1, cores() // workers))} for _ in range(workers)]


def divided(gpus: Sequence[str], workers: int) -> list[list[str]]:
    """GPUs for every worker: all of them, in order, as evenly as they go.

    >>> divided("0123", 2), divided("01", 3)
    ([['0', '1'], ['2', '3']], [['0'], ['1'], ['0']])
    """
    if workers >= len(gpus):
        return [[gpus[i % len(gpus)]] for i in range(workers)]
    ends = [i * len(gpus) // workers for i in range(workers + 1)]
    return [list(gpus[first:end]) for first, end in pairwise(ends)]


def cores() -> int:
    """Cores that this process may run on."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def take(share: dict[str, str]) -> None:
    """Make a share this process's own, before it uses a GPU."""
    import torch

    if GPUS in share:
        os.environ[GPUS] = share[GPUS]
    if THREADS in share:
        torch.set_num_threads(int(share[THREADS]))


def _gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPUS, "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 4000))
    lines = errors.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]
