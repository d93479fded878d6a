"""Which process runs a trial, and whether it still lives."""

from __future__ import annotations

import math
import os
import socket
from functools import cache
from typing import Any


@cache
def _boot_of(pid: int) -> float | None:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def this_worker() -> dict[str, Any]:
    """Names this process, so that a later one on the same host can tell whether it still runs."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _boot_of(os.getpid())}


def is_dead(worker: Any, other_hosts: bool = False) -> bool:
    """Whether `worker` (of `this_worker`) runs no more; where it is of another host, `other_hosts` is the answer."""
    if not isinstance(worker, dict) or not isinstance(worker.get("pid"), int):
        return False
    if worker.get("host") != socket.gethostname():
        return other_hosts
    _boot_of.cache_clear()
    started = _boot_of(worker["pid"])
    recorded = worker.get("started")
    return started is None or (isinstance(recorded, float) and not math.isclose(started, recorded, abs_tol=2.0))
