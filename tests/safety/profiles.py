"""How long the fuzzers run: the same few examples on every run, unless MOEOPT_FUZZ says how many fresh ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

MANY = int(os.environ.get("MOEOPT_FUZZ", "0"))


def fuzzing(few: int) -> settings:
    return settings(
        max_examples=MANY or few,
        derandomize=not MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
