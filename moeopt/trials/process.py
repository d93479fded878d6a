"""Which process runs a trial, and whether it still lives."""

from __future__ import annotations

import math
import os
import socket
from functools import cache
from typing import Any


@cache
def _started(pid: int) -> float | None:
    """When a process was started, in seconds that no correction of the clock moves; None where there is no such."""
    import psutil

    try:
        # On Linux, psutil adds the time of boot, which moves with the clock, to what the kernel counts since then.
        return round(float(psutil.Process(pid).create_time() - (psutil.boot_time() if psutil.LINUX else 0.0)), 2)
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
