"""Which process runs a trial, and whether it still lives."""

from __future__ import annotations

import math
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

STARTED = 19
"""Where the start stands in `/proc/<pid>/stat`, after the name (proc(5): field 22)."""


@cache
def _started(pid: int) -> float | None:
    """When a process was started, in seconds that no correction of the clock moves; None where there is no such."""
    if sys.platform == "linux":  # what the kernel counts since the boot; psutil adds the time of that, which moves
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        except OSError:
            return None
        return round(int(after_name.split()[STARTED]) / os.sysconf("SC_CLK_TCK"), 2)
    import psutil

    try:
        return round(float(psutil.Process(pid).create_time()), 2)
    except psutil.Error:
        return None


@cache
def _namespace() -> int | None:
    """What process ids count in: containers that share a host's name may all be process 1; None where nothing says."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def this_worker() -> dict[str, Any]:
    """Names this process, so that a later one on the same host can tell whether it still runs."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "namespace": _namespace(), "pid": pid, "started": _started(pid)}


def is_dead(worker: Any, other_hosts: bool = False) -> bool:
    """Whether `worker` (of `this_worker`) runs no more.

    Where it is of another host, or of another container that goes by this host's name, `other_hosts` is the answer.
    """
    if not isinstance(worker, dict) or not isinstance(worker.get("pid"), int):
        return False
    if (worker.get("host"), worker.get("namespace", _namespace())) != (socket.gethostname(), _namespace()):
        return other_hosts
    _started.cache_clear()
    started = _started(worker["pid"])
    recorded = worker.get("started")
    return started is None or (isinstance(recorded, float) and not math.isclose(started, recorded, abs_tol=2.0))
