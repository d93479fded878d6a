"""A profile as files: JSON that holds everything, CSV with a line a row and setting."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moeopt.files import csv_text, write_atomically
from moeopt.results.profiling.checks import ProfileError, Setting
from moeopt.results.profiling.result import LayerLoad, Part

if TYPE_CHECKING:
    from moeopt.results.profiling.result import Profile, Row

FORMAT, VERSION = "moeopt-profile", 1
PARTS = get_args(Part)


def save(profile: Profile, path: Path) -> None:
    """See `Profile.save`."""
    try:
        write_atomically(path, (json.dumps(record(profile), indent=2) + "\n").encode())
        write_atomically(path.with_suffix(".csv"), _csv(profile).encode())
    except OSError as error:
        raise ProfileError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def record(profile: Profile) -> dict[str, Any]:
    """Everything as JSON."""
    p = profile
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": [vars(setting) for setting in p.settings],
        "new_tokens": p.new_tokens,
        "repeats": p.repeats,
        "resident": p.resident,
        "peak_setting": vars(p.largest),
        "tokens": dict(p.tokens),
        "machine": dict(p.machine),
        "rows": [_row(p, row) for row in p.rows],
    }


def _row(profile: Profile, row: Row) -> dict[str, Any]:
    return {
        **_facts(row),
        "experts": list(row.experts),
        "devices": list(row.devices),
        "layers": [_load(load) for load in row.loads],
        "without_layers": row.without_loads,
        "speeds": [
            {
                **vars(speed.setting),
                **{f"{part}_seconds": list(getattr(speed, part)) for part in PARTS},
                **_speed(profile, row, speed.setting),
            }
            for speed in row.speeds
        ],
    }


def _facts(row: Row) -> dict[str, Any]:
    """What a row is apart from its speed."""
    return {
        "name": row.name,
        "source": row.source,
        "plan": None if row.plan is None else row.plan.fingerprint,
        "parameters": row.parameters,
        "active_parameters": row.active_parameters,
        "active_experts": row.active_experts,
        "weight_gib": row.weight_bytes / 2**30,
        "peak_gib": row.peak_bytes / 2**30,
        "memory": "computed" if row.computed else "measured",
        "dtype": row.dtype,
        "balance": _balance(row),
    }


def _balance(row: Row) -> dict[str, float] | None:
    """Means over layers, and the worst layer's maximum over mean."""
    if not row.loads:
        return None
    return {
        "cv": statistics.fmean(load.cv for load in row.loads),
        "max_over_mean": statistics.fmean(load.max_over_mean for load in row.loads),
        "worst_max_over_mean": max(load.max_over_mean for load in row.loads),
        "entropy": statistics.fmean(load.entropy for load in row.loads),
    }


def _load(load: LayerLoad) -> dict[str, Any]:
    numbers = ("tokens", "active", "cv", "max_over_mean", "entropy", "busiest", "idlest")
    return {
        "layer": load.layer,
        "experts": list(load.experts),
        "counts": list(load.counts),
        "shares": list(load.shares),
        **{name: getattr(load, name) for name in numbers},
    }


def _speed(profile: Profile, row: Row, setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in PARTS:
        found[f"{part}_tokens_per_second"] = profile.rate(row, setting, part)
        found[f"{part}_over_first"] = vars(profile.ratio(row, setting, part))
    return found


def _csv(profile: Profile) -> str:
    lines = []
    for row in profile.rows:
        facts = _flat(_facts(row))
        for speed in row.speeds:
            lines.append(facts | vars(speed.setting) | _flat(_speed(profile, row, speed.setting)))
    return csv_text(lines, dict.fromkeys(name for line in lines for name in line))


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a record in it as columns of their own."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}_{part}": number for part, number in value.items()}
        elif not (name == "balance" and value is None):
            found[name] = value
    return found
