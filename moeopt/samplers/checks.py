"""Checks of what samplers are given, and the name of a start among their settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeopt.errors import SamplerError
from moeopt.trials.description import FINITE
from moeopt.trials.genome import Vector


def check_counts(counts: Mapping[str, Any], *, least: int = 1) -> None:
    """Raise SamplerError, naming the argument, unless all are integers of at least so much."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise SamplerError(f"{name} must be an integer of at least {least}, got {count!r}")


def check_positive(values: Mapping[str, Any]) -> None:
    """Raise SamplerError, naming the argument, unless all are positive numbers."""
    for name, value in values.items():
        if not FINITE.holds(value) or value <= 0:
            raise SamplerError(f"{name} must be a positive number, got {value!r}")


def check_at_least_0(values: Mapping[str, Any]) -> None:
    """Raise SamplerError, naming the argument, unless all are finite numbers of at least 0."""
    for name, value in values.items():
        if not FINITE.holds(value) or value < 0:
            raise SamplerError(f"{name} must be a number of at least 0, got {value!r}")


def check_probabilities(values: Mapping[str, Any]) -> None:
    """Raise SamplerError, naming the argument, unless all are numbers from 0 to 1."""
    for name, value in values.items():
        if not FINITE.holds(value) or not 0 <= value <= 1:
            raise SamplerError(f"{name} is a probability between 0 and 1, got {value!r}")


def digest(x: Vector) -> str:
    """16 hex digits that name a genotype in a sampler's settings."""
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()[:16]
